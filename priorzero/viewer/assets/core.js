// What all views share: the data, small helpers for elements, the place in the address, the tabs.

const SERIES = [
  ["llm", "LLM", "--llm"],
  ["world_model", "Model", "--wm"],
  ["mixture", "Mixture", "--mixture"],
  ["visits", "Visits", "--visits"],
  ["improved", "Improved", "--improved"],
  ["target_world_model", "Model's target", "--target"],
  ["target_llm", "LLM's target", "--target"],
];
const RUN_COLOURS = ["#2b6cb0", "#c2410c"];
const views = {}; // name -> function that fills its section, called when it is first opened
let data = null; // {runs, stamp}

// Text or JSON that the page carries compressed.
async function unpacked(name) {
  const packed = atob(document.getElementById(`data-${name}`).textContent);
  const bytes = new Uint8Array(packed.length);
  for (let at = 0; at < packed.length; at++) bytes[at] = packed.charCodeAt(at);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Response(stream).text();
}

const opened = new Map(); // the steps of episodes that somebody has looked at
function stepsOf(run, episode) {
  const name = `episode-${run}-${episode}`;
  if (!opened.has(name)) opened.set(name, unpacked(name).then(JSON.parse));
  return opened.get(name);
}

let library = null;
function plotly() {
  // Half a second of a browser's time: taken when the first plot comes into view.
  library ??= unpacked("plotly").then((source) => {
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
    return window.Plotly;
  });
  return library;
}

// An element: tag.class, its attributes and handlers, its children (texts or elements).
function make(what, attributes = {}, ...children) {
  const [tag, ...classes] = what.split(".");
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") element.style.cssText = value;
    else if (value !== false && value != null) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

const short = (value, digits = 2) =>
  value == null ? "–" : Number.isInteger(value) ? String(value) : value.toFixed(digits).replace(/^-(0\.0*)$/, "$1");
const percent = (value) => (value == null ? "–" : (100 * value).toFixed(value < 0.0995 ? 1 : 0));
const largest = (values) => values.indexOf(Math.max(...values));
const commandOf = (step) => step.commands[step.chosen];

// One column per run.
function panes(section, fill) {
  section.classList.toggle("beside", data.runs.length > 1);
  const grid = make("div.panes", { style: `--panes: ${data.runs.length}` });
  data.runs.forEach((run, place) => {
    const pane = make("div.pane", { style: `--run: ${RUN_COLOURS[place]}` });
    pane.append(make("h2", {}, `${run.name} `, make("span.note", {}, run.game)));
    fill(pane, run, place);
    grid.append(pane);
  });
  section.append(grid);
}

// ---- the place in the address: #tab=episodes&0=3.37&1=0.0 (episode and step of each run) ----------

function place() {
  return new URLSearchParams(location.hash.slice(1));
}

function setPlace(changes) {
  const now = place();
  for (const [name, value] of Object.entries(changes)) now.set(name, value);
  history.replaceState(null, "", `#${now}`);
}

// ---- tabs -----------------------------------------------------------------------------------------

const TABS = ["curves", "episodes", "findings", "settings"];

function openTab(name) {
  for (const tab of TABS) {
    const chosen = tab === name;
    const button = document.getElementById(`tab-${tab}`);
    button.setAttribute("aria-selected", chosen);
    button.tabIndex = chosen ? 0 : -1;
    document.getElementById(`view-${tab}`).hidden = !chosen;
  }
  setPlace({ tab: name });
  const section = document.getElementById(`view-${name}`);
  if (!section.hasChildNodes()) views[name](section);
}

function startTabs() {
  const bar = document.getElementById("tabs");
  bar.addEventListener("click", (event) => {
    if (event.target.id.startsWith("tab-")) openTab(event.target.id.slice(4));
  });
  bar.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const at = TABS.findIndex((tab) => document.activeElement.id === `tab-${tab}`);
    const next = TABS[(at + step + TABS.length) % TABS.length];
    openTab(next);
    document.getElementById(`tab-${next}`).focus();
    event.preventDefault();
  });
}

// ---- a run that goes on -----------------------------------------------------------------------------

function watchForNewer() {
  if (!data.stamp) return;
  const button = document.getElementById("newer");
  button.addEventListener("click", () => location.reload());
  setInterval(async () => {
    const answer = await fetch("stamp").catch(() => null);
    button.hidden = !answer?.ok || (await answer.text()) === data.stamp;
  }, 10000);
}

document.addEventListener("DOMContentLoaded", async () => {
  data = JSON.parse(await unpacked("summary"));
  startTabs();
  watchForNewer();
  const wanted = place().get("tab");
  openTab(TABS.includes(wanted) ? wanted : "curves");
  document.body.dataset.ready = "true";
});
