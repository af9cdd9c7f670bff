// Settings by their names; where two runs differ is marked.

views.settings = (section) => {
  const search = make("input", { type: "search", placeholder: "Find a setting", "aria-label": "Find a setting" });
  const all = data.runs.map((run) => ({ ...prefixed("schedule.", run.schedule), ...run.settings }));
  const names = [...new Set(all.flatMap((settings) => Object.keys(settings)))];
  const rows = names.map((name) => {
    const values = all.map((settings) => (name in settings ? JSON.stringify(settings[name]) : "(not there)"));
    const differs = new Set(values).size > 1;
    return make(differs ? "tr.differs" : "tr", { "data-name": name },
      make("td", {}, name), ...values.map((value) => make("td", {}, value)));
  });
  rows.sort((a, b) => b.classList.contains("differs") - a.classList.contains("differs"));
  search.addEventListener("input", () => {
    for (const row of rows) row.hidden = !row.dataset.name.includes(search.value);
  });
  section.append(make("div.controls", {}, search), make("table.settings", {},
    make("thead", {}, make("tr", {}, make("th", {}, "setting"), ...data.runs.map((run) => make("th", {}, run.name)))),
    make("tbody", {}, ...rows)));
};

function prefixed(prefix, values) {
  return Object.fromEntries(Object.entries(values).map(([name, value]) => [prefix + name, value]));
}
