// The search's tree of one decision, and what it imagined against what came.

function treeOf(steps, index, open) {
  const tree = steps[index].tree;
  const children = tree.parent.map(() => []);
  tree.parent.forEach((parent, node) => parent >= 0 && children[parent].push(node));
  for (const below of children) below.sort((a, b) => tree.n[b] - tree.n[a]);
  const line = playedLine(tree, children, steps, index);

  const details = make("details.tree", { open });
  const fill = () => {
    if (!details.open || details.querySelector("ul")) return;
    details.append(make("ul", { role: "tree", "aria-label": "Search tree" },
      branch(tree, children, 0, line, steps, index)));
  };
  details.addEventListener("toggle", fill);
  details.append(make("summary", {}, `Tree of ${tree.n[0]} simulations`), imagined(tree, line, steps, index));
  fill();
  return details;
}

// node -> move, for the nodes along which the episode really went on.
function playedLine(tree, children, steps, index) {
  const line = new Map([[0, index]]);
  let node = 0;
  for (let at = index; at < steps.length && node != null; at++) {
    node = children[node].find((child) => tree.command[child] === commandOf(steps[at]));
    if (node != null) line.set(node, at + 1);
  }
  return line;
}

function imagined(tree, line, steps, index) {
  const rows = [...line].slice(1).map(([node, next]) => {
    const real = steps[next - 1];
    const after = steps[next]?.to_go ?? 0;
    const cells = [
      `${next - 1}: ${tree.command[node]}`, short(tree.reward[node]), short(real.reward), short(tree.value[node]), short(after),
    ];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
  });
  if (!rows.length) return make("p.note", {}, "The search did not try the command that was played.");
  const heads = ["played", "imagined reward", "real", "imagined value after it", "really earned after it"];
  return make("div.scroll", {}, make("table", {},
    make("thead", {}, make("tr", {}, ...heads.map((head) => make("th", {}, head)))), make("tbody", {}, ...rows)));
}

function branch(tree, children, node, line, steps, index) {
  const below = children[node];
  const numbers = [
    `N ${tree.n[node]}`, `Q ${short(tree.q[node])}`, node ? `P ${percent(tree.p[node])} %` : null,
    node ? `reward ${short(tree.reward[node])}` : null, `value ${short(tree.value[node])}`,
    line.has(node) && node ? `really ${short(steps[line.get(node) - 1].reward)}` : null,
  ].filter(Boolean);
  const button = make(line.has(node) && node ? "button.played" : "button",
    { role: "treeitem", "aria-expanded": below.length ? "false" : null },
    make("span.name", {}, tree.command[node] ?? "the state above"), ...numbers.map((text) => make("span", {}, text)));
  const item = make("li", { role: "none" }, button);

  const set = (open) => {
    button.setAttribute("aria-expanded", open);
    item.querySelector(":scope > ul")?.remove();
    if (open) item.append(make("ul", { role: "group" }, ...below.map((child) => branch(tree, children, child, line, steps, index))));
  };
  if (below.length) {
    button.addEventListener("click", () => set(button.getAttribute("aria-expanded") !== "true"));
    button.addEventListener("keydown", (event) => {
      if (event.key === "ArrowRight") set(true);
      else if (event.key === "ArrowLeft") set(false);
    });
    if (node === 0) set(true);
  }
  return item;
}
