"""The comparison as files: README.md (the page), compare.json, runs.csv and curves.png."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from priorzero.comparison.figures import AXES, in_words
from priorzero.comparison.plots import plot_curves
from priorzero.comparison.runs import Group

Row = Mapping[str, Any]

_IN_LINES = 4  # groups: more of them have too many pairs for a line each
_PROTOCOL = ("env_steps", "max_steps", "seeds")

_EXPLAINED = (
    "Interquartile mean over runs (with three or fewer the mean) and in brackets its 95 % "
    "percentile bootstrap interval (arXiv:2108.13264); a single run has no interval, and with "
    "three runs it is hardly more than their range. *At*: the last evaluation at or before the "
    "place; a run counts if that is at most 5 % before it. *Up to*: mean height of the curve from "
    "0, its area over its length. Minutes are the iterations' (`perf/seconds_iteration`), "
    "evaluation and saving aside; compare them only where the runs had the same machine."
)


def write_files(out: Path, report: Row, games: Mapping[str, Sequence[Group]]) -> None:
    """Write everything into the folder `out`.

    Args:
        report: what `figures.compare` returns, and the command.
        games: what it was made from.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    (out / "compare.json").write_text(text + "\n", encoding="utf-8")
    picture = "\n![curves](curves.png)\n"
    (out / "README.md").write_text(page(report) + picture, encoding="utf-8")

    rows = [
        {"game": game["game"], "group": group["name"], "metric": group["metric"]}
        | run
        | {"label": group["label"]}
        for game in report["games"]
        for group in game["groups"]
        for run in group["runs"]
    ]
    with (out / "runs.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)

    plot_curves(out / "curves.png", games, report)


def page(report: Row) -> str:
    """The page, in Markdown."""
    parts = ["# Comparison of runs", f"```\n{report['command']}\n```", _EXPLAINED]
    for game in report["games"]:
        parts += [f"## {game['game']}", _values(game)]
        parts.append("\n".join(f"- {g['name']}: {g['label']}" for g in game["groups"]))
        if game["pairs"]:
            parts += [
                "Probability that a run of the first group is above one of the second, ties half:",
                _pairs(game),
            ]
        if game["notes"]:
            parts.append("\n".join(f"- {note}" for note in game["notes"]))
        if game["published"]:
            parts += _published(game["published"])
    return "\n\n".join(parts) + "\n"


def _places(game: Row) -> dict[str, str]:
    """The axes on which the game's runs can be compared, and the place in words."""
    return {axis: in_words(game[axis], axis) for axis in AXES if game[axis] is not None}


def _values(game: Row) -> str:
    places = _places(game)
    header = ["group", "metric", "runs"]
    header += [f"{word} {place}" for place in places.values() for word in ("at", "up to")]

    rows = []
    for group in game["groups"]:
        cells = [group["name"], f"`{group['metric']}`", _counts(group, places)]
        for axis in places:
            cells += [_told(group[axis].get(name)) for name in ("value", "area")]
        rows.append(cells)
    return _table(header, rows)


def _counts(group: Row, axes: Iterable[str]) -> str:
    """Runs of the group; where not all are compared, how many are on each axis."""
    total, judged = len(group["runs"]), {axis: group[axis]["runs"] for axis in axes}
    if set(judged.values()) <= {total}:
        return str(total)
    return f"{total} ({', '.join(f'{axis}: {count}' for axis, count in judged.items())})"


def _pairs(game: Row) -> str:
    """A line per pair; of many groups a table per place, the first group of a pair by line."""
    places = _places(game)
    if len(game["groups"]) > _IN_LINES:
        return "\n\n".join(_matrix(game, axis, place) for axis, place in places.items())
    rows = [
        [f"P({pair['ours']} > {pair['theirs']})", *(_told(pair[axis]) for axis in places)]
        for pair in game["pairs"]
    ]
    return _table(["groups", *(f"at {place}" for place in places.values())], rows)


def _matrix(game: Row, axis: str, place: str) -> str:
    names = [group["name"] for group in game["groups"]]
    told = {(pair["ours"], pair["theirs"]): _told(pair[axis]) for pair in game["pairs"]}
    rows = [[f"P({a} > …)", *(told.get((a, b), "") for b in names[1:])] for a in names[:-1]]
    return _table([f"at {place}", *names[1:]], rows)


def _published(found: Row) -> list[str]:
    """Parts of the page: ours and theirs in one table, best first, the differences, the sources."""
    both = sorted(found["ours"] + found["theirs"], key=lambda row: -(row["share"] or row["score"]))
    header = ["who", "score", "of the maximum", "env steps", "steps an episode", "seeds"]
    maximum = found["max_score"]
    return [
        "### Beside published scores",
        f"Maximum: {maximum:g}." if maximum else "Of single games nothing was found.",
        _table([*header, "protocol", "source"], [_published_row(found, row) for row in both]),
        "\n".join(f"- {line}" for line in found["differences"]),
        "\n".join(
            f"- {name}: {source['cite']}. {source['found'].capitalize()}."
            for name, source in found["sources"].items()
        ),
    ]


def _published_row(found: Row, row: Row) -> list[str]:
    share = "–" if row["share"] is None else f"{row['share']:.1f} %"
    is_theirs = "source" in row
    protocol = found["protocols"][row["protocol"]] if is_theirs else row
    cells = [share, *("–" if (n := protocol[key]) is None else f"{n:,}" for key in _PROTOCOL)]
    if not is_theirs:
        return [f"**{row['who']}**", _told(row | {"value": row["score"]}), *cells, "ours", ""]
    score = _number(row["score"]) + ("" if row["std"] is None else f" ± {_number(row['std'])}")
    return [row["who"], score, *cells, f"`{row['protocol']}`", row["source"]]


def _told(estimate: Row | None) -> str:
    """`value [low, high]`, or a dash where no run was compared."""
    if estimate is None:
        return "–"
    value, low, high = (
        None if x is None else _number(x)
        for x in (estimate["value"], estimate["low"], estimate["high"])
    )
    return value if low is None else f"{value} [{low}, {high}]"


def _number(x: float) -> str:
    return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
