"""Tables and plot of the learning check, made from the summaries its runs left."""

from __future__ import annotations

import csv
import json
import logging
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from priorzero.sweeping.record import FINAL
from priorzero.types import PriorZeroError

logger = logging.getLogger("priorzero.benchmarks.learning")

# (run, evaluation mode) -> the method's name in tables; their order here is the order there.
NAMES = {
    ("priorzero", "world_model_llm"): "PriorZero",
    ("priorzero", "world_model"): "PriorZero, search without prior",
    ("unizero", "world_model"): "UniZero",
    ("priorzero", "llm"): "LLM alone",
    ("priorzero", "random"): "random",
    ("unizero", "random"): "random",
}
COLOURS = {
    "PriorZero": "tab:red",
    "PriorZero, search without prior": "tab:orange",
    "UniZero": "tab:blue",
    "LLM alone": "tab:green",
    "random": "tab:gray",
}


@dataclass(frozen=True)
class Row:
    """One evaluation: `return_mean` and `return_std` over its `episodes`."""

    game: str
    method: str
    seed: int
    env_steps: int
    iteration: int | None
    return_mean: float
    return_std: float
    episodes: int


def collect_rows(out: Path) -> list[Row]:
    """Evaluations of every run kept in `out`/runs.

    Raises:
        PriorZeroError: there is none.
    """
    rows: list[Row] = []
    folders = sorted(p.parent for p in (out / "runs").glob("*/run.json"))
    if not folders:
        raise PriorZeroError(
            f"{out / 'runs'} holds no runs; run the check without --plot-only first"
        )
    for folder in folders:
        run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        if (folder / "summary.json").is_file():
            found = _from_summary(folder / "summary.json", run)
        elif (folder / "metrics.jsonl").is_file():
            logger.warning(
                "%s has no summary (status %s): its metrics are read", folder.name, run["status"]
            )
            found = _from_metrics(folder / "metrics.jsonl", run)
        else:
            logger.warning("%s left nothing (status %s)", folder.name, run["status"])
            continue
        rows += found
    order = list(dict.fromkeys(NAMES.values()))
    return sorted(rows, key=lambda r: (r.game, order.index(r.method), r.seed, r.env_steps))


def _from_summary(path: Path, run: dict[str, Any]) -> list[Row]:
    rows = []
    for evaluation in json.loads(path.read_text(encoding="utf-8"))["evaluations"]:
        for mode, values in evaluation.items():
            if isinstance(values, dict):
                returns = values["returns"]
                rows.append(
                    Row(
                        run["game"],
                        NAMES[run["variant"], mode],
                        run["seed"],
                        evaluation["env_steps"],
                        evaluation["iteration"],
                        mean(returns),
                        pstdev(returns),
                        len(returns),
                    )
                )
    return rows


def _from_metrics(path: Path, run: dict[str, Any]) -> list[Row]:
    """A killed run's evaluations; a last line may be cut in the middle."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            logger.warning("%s: a damaged line is left out", path)
            continue
        for mode in {k.partition("/")[0] for k in values if k.endswith("/return_mean")}:
            average, spread, episodes = (
                values[f"{mode}/{k}"] for k in ("return_mean", "return_std", "episodes")
            )
            rows.append(
                Row(
                    run["game"],
                    NAMES[run["variant"], mode],
                    run["seed"],
                    values["step"],
                    None,
                    average,
                    spread,
                    int(episodes),
                )
            )
    return rows


def common_end(rows: list[Row], game: str) -> int:
    """Environment steps up to which every learning method and seed of a game was evaluated."""
    last: dict[tuple[str, int], int] = {}
    for row in rows:
        if row.game == game and row.method != "random":
            key = (row.method, row.seed)
            last[key] = max(last.get(key, 0), row.env_steps)
    return min(last.values(), default=0)


def final_table(rows: list[Row]) -> list[dict[str, Any]]:
    """Per game and method: mean and standard deviation over seeds at the common end, and of the
    best evaluation.

    The untrained LLM is judged by each seed's first evaluation, random play by the mean of all of a
    seed's.
    """
    table = []
    for game in dict.fromkeys(r.game for r in rows):
        end = common_end(rows, game)
        by_method: dict[str, dict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            if row.game == game:
                by_method[row.method][row.seed].append(row)

        for method, seeds in by_method.items():
            if method == "random":
                means = [mean(r.return_mean for r in s) for s in seeds.values()]
                table.append(_entry(game, method, 0, means, None))
                continue
            if method == "LLM alone":
                firsts = [min(s, key=lambda r: r.env_steps) for s in seeds.values()]
                means = [r.return_mean for r in firsts]
                table.append(_entry(game, "LLM alone, untrained", 0, means, None))

            ends = [
                max((r for r in s if r.env_steps <= end), key=lambda r: r.env_steps)
                for s in seeds.values()
            ]
            best = [max(r.return_mean for r in s if r.env_steps <= end) for s in seeds.values()]
            name = "LLM alone, trained" if method == "LLM alone" else method
            table.append(_entry(game, name, end, [r.return_mean for r in ends], best))
    return table


def _entry(
    game: str, method: str, steps: int, values: list[float], best: list[float] | None
) -> dict[str, Any]:
    entry = {
        "game": game,
        "method": method,
        "env_steps": steps,
        "seeds": len(values),
        "mean": mean(values),
        "std": pstdev(values),
    }
    return entry | ({"best_mean": mean(best), "best_std": pstdev(best)} if best else {})


def write_report(out: Path, rows: list[Row]) -> list[dict[str, Any]]:
    """runs.csv, summary.md, learning_curves.png and README.md; returns the final table."""
    table = final_table(rows)
    with (out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=[*Row.__dataclass_fields__, "n"])
        writer.writeheader()
        for row in rows:
            seeds = {r.seed for r in rows if (r.game, r.method) == (row.game, row.method)}
            writer.writerow(asdict(row) | {"n": len(seeds)})

    (out / "summary.md").write_text(_markdown(table), encoding="utf-8")
    (out / "README.md").write_text(_readme(out, table), encoding="utf-8")
    if rows:
        plot(out / "learning_curves.png", rows)
    return table


def _markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "Mean evaluation return, ± standard deviation over seeds. At the end: the last evaluation "
        "at or before the environment steps that every learning run of the game reached. Best: "
        "each seed's best evaluation up to then (chosen after the fact, so it flatters noisy "
        "methods).",
        "",
        "| game | method | env steps | seeds | return at the end | best evaluation |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for e in table:
        best = f"{e['best_mean']:.2f} ± {e['best_std']:.2f}" if "best_mean" in e else ""
        steps = f"{e['env_steps']}" if e["env_steps"] else "any" if e["method"] == "random" else "0"
        end = f"{e['mean']:.2f} ± {e['std']:.2f}"
        lines.append(f"| {e['game']} | {e['method']} | {steps} | {e['seeds']} | {end} | {best} |")
    return "\n".join(lines) + "\n"


def _readme(out: Path, table: list[dict[str, Any]]) -> str:
    path = out / "sweep.json"
    if not path.is_file():
        return "# Learning check\n\nThe command was not recorded.\n\n" + _markdown(table)

    facts = json.loads(path.read_text(encoding="utf-8"))
    machine = facts["machine"]
    gpu = machine["gpu"] or "no GPU"
    unfinished = ", ".join(n for n, state in facts["runs"].items() if state not in FINAL) or "none"

    return "\n".join(
        [
            "# Learning check",
            "",
            "```",
            facts["command"],
            "```",
            "",
            f"Commit {facts['commit']}, {facts['date']}, {facts['minutes']} minutes on "
            f"{machine['cores']} cores of {machine['cpu']}, {gpu}; Python {machine['python']}, "
            f"torch {machine['torch']}. "
            f"Runs that failed, were interrupted or were not started: {unfinished}.",
            "",
            "`runs.csv` has every evaluation (n: seeds of that method), `runs/` each run's "
            "settings, summary and metrics. The same command with `--plot-only` makes tables and "
            "plot anew.",
            "",
            _markdown(table),
            "",
            "![learning curves](learning_curves.png)",
            "",
        ]
    )


def plot(path: Path, rows: list[Row]) -> None:
    """One panel per game: mean over seeds with the band from the lowest to the highest seed, over
    environment steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    games = list(dict.fromkeys(r.game for r in rows))
    figure, axes = pyplot.subplots(1, len(games), figsize=(6 * len(games), 4.5), squeeze=False)
    for axis, game in zip(axes[0], games, strict=True):
        for method, colour in COLOURS.items():
            chosen = [r for r in rows if r.game == game and r.method == method]
            if not chosen:
                continue
            if method == "random":
                axis.axhline(
                    mean(r.return_mean for r in chosen), color=colour, linestyle="--", label=method
                )
                continue
            steps, low, middle, high = curve(chosen)
            label = f"{method} ({len({r.seed for r in chosen})} seeds)"
            axis.plot(steps, middle, color=colour, marker=".", label=label)
            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=game, xlabel="environment steps", ylabel="mean evaluation return")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def curve(rows: list[Row]) -> tuple[list[float], list[float], list[float], list[float]]:
    """(env steps, minimum, mean, maximum over seeds). Seeds are joined by the number of their
    evaluation, because the environment steps at an evaluation differ a little from seed to seed;
    only numbers that every seed has are shown.
    """
    seeds: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        seeds[row.seed].append(row)
    aligned = list(
        zip(*(sorted(s, key=lambda r: r.env_steps) for s in seeds.values()), strict=False)
    )
    values = [[r.return_mean for r in point] for point in aligned]
    steps = [mean(r.env_steps for r in point) for point in aligned]
    return steps, [min(v) for v in values], [mean(v) for v in values], [max(v) for v in values]
