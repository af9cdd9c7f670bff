// Episodes, move by move. A pane per run; the keys go to the pane that was used last.

const HELP = "Keys: j and k go to the next move and back, n and p to the next episode and back, t opens the tree.";
const paneStates = []; // per run: {episode, step, show(episode, step), next(by)}
let active = 0;

views.episodes = (section) => {
  panes(section, episodePane);
  section.append(make("p.note.keys", {}, HELP));
};

function episodePane(pane, run, at) {
  if (!run.episodes.length) {
    pane.append(make("p.note", {}, "This run's folder holds no recorded decisions."));
    return;
  }
  const chooser = make("select", { "aria-label": `Episode of ${run.name}` });
  const mode = make("select", { "aria-label": `Whose episodes of ${run.name}` }, make("option", { value: "" }, "all modes"));
  mode.append(...[...new Set(run.episodes.map((e) => e.mode))].map((name) => make("option", {}, name)));
  const games = [...new Set(run.episodes.map((e) => e.game))];
  const game = make("select", { "aria-label": `Game of ${run.name}`, hidden: games.length < 2 }, make("option", { value: "" }, "all games"));
  game.append(...games.map((name) => make("option", {}, name)));
  const chosen = (e) => (!mode.value || e.mode === mode.value) && (!game.value || e.game === game.value);
  const body = make("div");
  const left = run.recorded - run.episodes.length;
  pane.append(
    make("div.controls", {}, game, mode, chooser),
    left ? make("p.note", {}, `${left} further recorded episodes are not on this page (--episodes).`) : "",
    body,
  );

  const state = { episode: 0, step: 0, asked: 0, shown: run.episodes.map((_, index) => index) };
  paneStates[at] = state;
  const list = () => {
    state.shown = run.episodes.flatMap((e, index) => (chosen(e) ? [index] : []));
    chooser.replaceChildren(...state.shown.map((index) => {
      const e = run.episodes[index];
      const text = `${e.number}: ${e.name} · ${e.length} moves · return ${short(e.return)}`;
      return make("option", { value: index }, text);
    }));
  };

  state.show = async (episode, step) => {
    const asked = ++state.asked;
    const steps = await stepsOf(at, episode);
    if (asked !== state.asked) return; // somebody went on while it was unpacked
    if (!chosen(run.episodes[episode])) {
      mode.value = game.value = "";
      list();
    }
    chooser.value = episode;
    Object.assign(state, { episode, step: Math.min(Math.max(step, 0), steps.length - 1) });
    if (body.dataset.episode !== String(episode)) drawEpisode(body, run, at, steps, episode);
    drawMove(body, run, at, steps, state.step);
    setPlace({ [at]: `${episode}.${state.step}` });
  };
  state.next = (by) => {
    const index = state.shown.indexOf(state.episode) + by;
    if (index >= 0 && index < state.shown.length) state.show(state.shown[index], 0);
  };

  chooser.addEventListener("change", () => state.show(Number(chooser.value), 0));
  for (const filter of [mode, game]) {
    filter.addEventListener("change", () => {
      list();
      if (state.shown.length) state.show(state.shown[0], 0);
    });
  }
  pane.addEventListener("focusin", () => (active = at));
  pane.addEventListener("pointerdown", () => (active = at));
  list();
  const first = firstEpisode(run);
  const [episode, step] = (place().get(String(at)) ?? `${first}.0`).split(".").map(Number);
  state.show(episode < run.episodes.length ? episode : first, step || 0);
}

// The last one of the search with the LLM, else of the search: where most is to be seen.
function firstEpisode(run) {
  for (const mode of ["world_model_llm", "world_model", "collect"]) {
    const found = run.episodes.findLastIndex((e) => e.mode === mode);
    if (found >= 0) return found;
  }
  return 0;
}

function drawEpisode(body, run, at, steps, episode) {
  body.dataset.episode = episode;
  const moves = make("ol.moves", { "aria-label": "Moves" });
  moves.append(...steps.map((step, index) => {
    const gain = step.reward
      ? make(step.reward > 0 ? "span.earned" : "span.lost", {}, (step.reward > 0 ? "+" : "") + short(step.reward))
      : null;
    return make("li", {}, make("button", { onclick: () => paneStates[at].show(episode, index) },
      make("span.number", {}, String(index)), make("span.command", {}, commandOf(step)), gain));
  }));
  moves.addEventListener("keydown", async (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!by) return;
    event.preventDefault();
    await paneStates[at].show(episode, paneStates[at].step + by);
    moves.querySelector("[aria-current=true]").focus();
  });
  const course = make("div.course", { role: "img", "aria-label": "Values and what was earned, by move" });
  if (steps.some((step) => step.value != null)) {
    course.draw = () => drawCourse(course, steps, (index) => paneStates[at].show(episode, index));
    waiting.observe(course);
  } else {
    course.hidden = true;
  }
  body.replaceChildren(course, make("div.episode", {}, moves, make("div.move")));
}

async function drawCourse(element, steps, show) {
  const x = steps.map((_, index) => index);
  const line = (name, field, color, dash) =>
    ({ x, y: steps.map((s) => s[field] ?? null), name, mode: "lines", line: { color, dash, width: 1.5 } });
  const traces = [
    line("earned from here on", "to_go", "#1a202c"),
    line("value of the search", "value", "#2f855a"),
    line("network's own", "predicted_value", "#2b6cb0", "dot"),
  ];
  // Above the plot, and see-through: it must not hide a curve that is as high.
  const legend = { orientation: "h", y: 1, yanchor: "bottom", bgcolor: "rgba(0,0,0,0)", font: { size: 11 } };
  const look = { ...layout("", "move"), showlegend: true, legend };
  await plot(element, traces, look);
  element.on("plotly_click", (event) => show(event.points[0].x));
  markMove(element);
}

// A line where the present move is.
function markMove(element) {
  const at = Number(element.dataset.move);
  const line = { type: "line", x0: at, x1: at, yref: "paper", y0: 0, y1: 1, line: { color: "#f6ad55", width: 2 } };
  if (element.dataset.drawn) window.Plotly.relayout(element, { shapes: [line] });
}

function drawMove(body, run, at, steps, index) {
  const step = steps[index];
  const course = body.querySelector(".course");
  course.dataset.move = index;
  markMove(course);
  body.querySelectorAll(".moves button").forEach((button, number) => {
    button.setAttribute("aria-current", number === index);
    button.tabIndex = number === index ? 0 : -1;
    const list = button.closest("ol");
    const item = button.parentElement;
    if (number === index && (item.offsetTop < list.scrollTop || item.offsetTop + item.offsetHeight > list.scrollTop + list.clientHeight))
      list.scrollTop = item.offsetTop - list.clientHeight / 2;
  });

  const treeOpen = body.querySelector("details.tree")?.open;
  const promptOpen = body.querySelector("details.prompt")?.open;
  body.querySelector(".move").replaceChildren(
    make("pre", { tabindex: 0, "aria-label": "What the game said" }, step.text),
    facts(run, step),
    bars(step),
    step.tree ? treeOf(steps, index, treeOpen) : "",
    step.prompt ? promptOf(step, promptOpen) : "",
    step.last_text ? make("h3", {}, `The end (${step.end})`) : "",
    step.last_text ? make("pre", {}, step.last_text) : "",
  );
}

function facts(run, step) {
  const told = [
    ["played", commandOf(step)], ["reward", short(step.reward)], ["score", short(step.score)],
    ["network's value", short(step.predicted_value)], ["search's value", short(step.value)],
    ["earned from here on", short(step.to_go)], ["LLM's share", step.llm_share == null ? "–" : short(step.llm_share)],
  ];
  return make("div.facts", {}, ...told.map(([name, value]) => make("span", {}, `${name} `, make("b", {}, value))));
}

function bars(step) {
  const shares = { ...step };
  if (step.visits) {
    const total = step.visits.reduce((sum, n) => sum + n, 0);
    shares.visits = step.visits.map((n) => n / total);
  }
  const series = SERIES.filter(([name]) => shares[name]);
  const order = shares.improved ?? shares.llm;
  const rows = step.commands.map((_, index) => index);
  if (order) rows.sort((a, b) => (shares.visits?.[b] ?? 0) - (shares.visits?.[a] ?? 0) || order[b] - order[a]);

  const heads = series.map(([, title, colour]) => make("th", {}, make("span.key", { style: `--colour: var(${colour})` }, title)));
  const body = rows.map((index) => make(index === step.chosen ? "tr.chosen" : "tr", {},
    make("td", {}, step.commands[index]),
    ...series.map(([name, , colour]) => {
      const share = shares[name][index];
      const style = `--size: ${100 * share}%; --colour: var(${colour})`;
      const favourite = largest(shares[name]) === index ? " ★" : "";
      return make("td.bar", { style }, make("i"), make("span", {}, percent(share) + favourite));
    })));
  return make("table.bars", {},
    make("thead", {}, make("tr", {}, make("th", {}, series.length ? "command (%)" : "command"), ...heads)),
    make("tbody", {}, ...body));
}

function promptOf(step, open) {
  const parts = [make("pre", { tabindex: 0 }, step.prompt)];
  if (step.thought) parts.push(make("h3", {}, "Its thoughts"), make("pre", { tabindex: 0 }, step.thought));
  return make("details.prompt", { open }, make("summary", {}, `What the LLM read (weights ${step.llm_version ?? "–"})`), ...parts);
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || place().get("tab") !== "episodes") return;
  const state = paneStates[active];
  if (!state) return;
  if (event.key === "j") state.show(state.episode, state.step + 1);
  else if (event.key === "k") state.show(state.episode, state.step - 1);
  else if (event.key === "n") state.next(1);
  else if (event.key === "p") state.next(-1);
  else if (event.key === "t") {
    const tree = document.querySelectorAll("#view-episodes .pane")[active].querySelector("details.tree");
    if (tree) tree.open = !tree.open;
  }
});
