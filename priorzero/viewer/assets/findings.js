// Decisions worth looking at; the rules are those of priorzero/viewer/findings.py.

const FINDINGS = {
  overruled: ["The search overruled the LLM and was right",
    "The command played is not the LLM's favourite, and more was earned from there on than the network expected before the search. Size: the difference in points."],
  surprise: ["Surprises in value",
    "What was earned from there on and the search's value differ by more than twice the spread of all such differences. Size: the difference in points. An episode that was cut off earned no more, as far as is known."],
  prior_wrong: ["The prior was wrong",
    "The search's policy puts at least half on a command to which the LLM gave less than chance. Size: the probability it lacked to chance."],
};
const SHOWN = 100;

views.findings = (section) => {
  const count = (name) => data.runs.reduce((sum, run) => sum + run.findings[name].length, 0);
  const kind = make("select", { "aria-label": "Kind of finding" },
    ...Object.entries(FINDINGS).map(([name, [title]]) => make("option", { value: name }, `${title} (${count(name)})`)));
  kind.value = Object.keys(FINDINGS).find(count) ?? kind.value; // the first of which there are any
  const meaning = make("p.note");
  const body = make("div");
  const show = () => {
    meaning.textContent = FINDINGS[kind.value][1];
    body.replaceChildren();
    panes(body, (pane, run, at) => findingsOf(pane, run, at, kind.value));
  };
  kind.addEventListener("change", show);
  section.append(make("div.controls", {}, kind), meaning, body);
  show();
};

async function findingsOf(pane, run, at, kind) {
  const found = run.findings[kind];
  pane.append(make("p", {}, `${found.length} decisions${found.length > SHOWN ? `, the largest ${SHOWN} here` : ""}`));
  const list = make("ul.list");
  pane.append(list);
  for (const [episode, step, size] of found.slice(0, SHOWN)) {
    const name = run.episodes[episode].name;
    const label = make("span", {}, `${name}, move ${step}`);
    const open = () => {
      setPlace({ [at]: `${episode}.${step}` });
      active = at;
      openTab("episodes");
      paneStates[at].show(episode, step);
    };
    const button = make("button", { onclick: open }, make("span.size", {}, (size > 0 ? "+" : "") + size.toFixed(2)), label);
    list.append(make("li", {}, button));
    stepsOf(at, episode).then((steps) => {
      const s = steps[step];
      const favourite = s.llm ? `, the LLM's favourite “${s.commands[largest(s.llm)]}”` : "";
      label.textContent += `: “${commandOf(s)}”${favourite}`;
    });
  }
}
