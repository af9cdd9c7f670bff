// The first view: evaluations as a table, metrics as curves, both runs in one plot.

const FIRST_CURVES = [
  /^eval\/[^/]+\/return_mean$/, /^eval\/[^/]+\/[^/]+\/return_mean$/, /^collect\/episode_return_mean$/, /^wm\/wm_loss$/, /^wm\/value_loss$/,
  /^llm\/sft_loss$/, /^llm\/rft_loss$/, /^prior\/llm_overridden$/, /^prior\/kl_from_wm$/,
  /^perf\/seconds_iteration$/,
];

const MOST_AT_ONCE = 12; // curves of one kind, such as those of many games; "Add a curve" has the others

function layout(title, bottom) {
  return {
    title: { text: title, font: { size: 13 }, x: 0.02 },
    margin: { l: 48, r: 12, t: 30, b: 50 },
    xaxis: { title: { text: bottom, font: { size: 11 } }, tickfont: { size: 10 }, gridcolor: "#edf0f4" },
    yaxis: { tickfont: { size: 10 }, gridcolor: "#edf0f4", zerolinecolor: "#d8dee6" },
    showlegend: false,
    font: { family: "system-ui, sans-serif" },
  };
}

// Draws when the element comes into view.
const waiting = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (!entry.isIntersecting) continue;
    waiting.unobserve(entry.target);
    entry.target.draw();
  }
});

// Plots follow the width of their place, which changes while they are hidden, too.
const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) if (target.offsetWidth) window.Plotly.Plots.resize(target);
});

async function plot(element, traces, look) {
  const Plotly = await plotly();
  await Plotly.newPlot(element, traces, look, { displayModeBar: false });
  resized.observe(element);
  element.dataset.drawn = "true";
}

function curve(name) {
  const element = make("div.plot", { role: "img", "aria-label": `Curve of ${name}` });
  element.draw = () => {
    const traces = data.runs.flatMap((run, at) => {
      const points = run.curves[name];
      if (!points) return [];
      const mode = points[0].length < 40 ? "lines+markers" : "lines";
      const look = { line: { color: RUN_COLOURS[at], width: 1.6 }, marker: { size: 4 } };
      return [{ x: points[0], y: points[1], name: run.name, mode, ...look }];
    });
    return plot(element, traces, layout(name, "environment steps"));
  };
  waiting.observe(element);
  return element;
}

function evaluations(pane, run) {
  const several = new Set(run.evaluations.map((row) => row.game)).size > 1;
  const body = run.evaluations.map((row) => {
    const mean = row.returns.reduce((sum, one) => sum + one, 0) / row.returns.length;
    const cells = [
      row.label, ...(several ? [row.game] : []), row.mode, row.env_steps, short(mean), short(Math.max(...row.returns)), row.returns.length,
      short(row.length, 1),
    ];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, String(cell))));
  });
  const heads = ["evaluation", ...(several ? ["game"] : []), "mode", "steps", "mean return", "best", "episodes", "length"];
  pane.append(
    make("p.note", {}, run.llm ? `LLM: ${run.llm}` : "The run goes on, or ended without a summary."),
    make("div.scroll", {}, make("table", {},
      make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))),
      make("tbody", {}, ...body))),
  );
}

views.curves = (section) => {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))].sort();
  const first = FIRST_CURVES.flatMap((wanted) => names.filter((name) => wanted.test(name)).slice(0, MOST_AT_ONCE));
  const plots = make("div.plots", {}, ...first.map(curve));
  const more = make("select", { "aria-label": "Add a curve" }, make("option", { value: "" }, "Add a curve …"));
  more.append(...names.filter((name) => !first.includes(name)).map((name) => make("option", {}, name)));
  more.addEventListener("change", () => {
    if (more.value) plots.prepend(curve(more.value));
    more.selectedOptions[0].remove();
    more.value = "";
  });

  if (!names.length) plots.append(make("p.note", {}, "The run's folder holds no metrics.jsonl."));
  section.append(make("div.controls", {}, more), plots, make("h3", {}, "Evaluations"));
  panes(section, evaluations);
};
