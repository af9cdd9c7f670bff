"""Curves of groups of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from priorzero.comparison.figures import AXES, Curve, curve
from priorzero.comparison.runs import Group
from priorzero.comparison.statistics import estimate

_LABEL = 60  # characters in a legend; the page has the rest
_COLOURS = 10  # of tab10
_PLACES = 200  # of a curve that are drawn; losses have one per iteration and run
_NAMES = {"steps": "environment steps", "minutes": "minutes of iterations"}


def plot_curves(
    path: Path, games: Mapping[str, Sequence[Group]], report: Mapping[str, Any]
) -> None:
    """A row of panels per game: over environment steps and over time the interquartile mean of
    each group with its bootstrap band, up to where all its runs got; dotted where groups are
    compared. Without any times there are no panels over time.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = [axis for axis in AXES if any(game[axis] is not None for game in report["games"])]
    size = (6 * len(axes), 4 * len(games))
    figure, panels = pyplot.subplots(len(games), len(axes), figsize=size, squeeze=False)
    many = max(len(groups) for groups in games.values()) > _COLOURS
    colours = pyplot.get_cmap("tab20" if many else "tab10").colors

    for row, game in zip(panels, report["games"], strict=True):
        for panel, axis in zip(row, axes, strict=True):
            for number, group in enumerate(games[game["game"]]):
                _draw(panel, group, axis, colours[number % len(colours)])
            if game[axis] is not None:
                panel.axvline(game[axis], color="tab:gray", linestyle=":")
            panel.set(title=game["game"], xlabel=_NAMES[axis], ylabel=_metrics(game))
            panel.grid(True, alpha=0.3)
            if not panel.get_legend_handles_labels()[0]:  # no run of this game has this axis
                panel.set_axis_off()
        _name_groups(row)
    figure.tight_layout()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)


def _name_groups(row: Sequence[Any]) -> None:
    """One legend for a game, beside its panels: on them it would hide what it names."""
    named = {
        label: line
        for panel in row
        for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    if named:
        where = dict(loc="center left", bbox_to_anchor=(1.02, 0.5))
        row[-1].legend(named.values(), named.keys(), fontsize="x-small", **where)


def _draw(panel, group: Group, axis: str, colour: Sequence[float]) -> None:
    curves = [one for one in (curve(run, axis) for run in group.runs) if one]
    if not curves:
        return

    x, estimates = joined(curves)
    if not x:  # no place where all its runs are
        return

    label = f"{group.name} ({len(group.runs)})"
    if group.name != group.runs[0].variant:  # a variant's name says enough
        label += f": {group.label}"
    if len(label) > _LABEL:
        label = label[: _LABEL - 1] + "…"
    values = [one.value for one in estimates]
    (line,) = panel.plot(x, values, marker=".", color=colour, label=label)
    if estimates[0].low is not None:
        band = [one.low for one in estimates], [one.high for one in estimates]
        panel.fill_between(x, *band, color=line.get_color(), alpha=0.15, linewidth=0)


def joined(curves: Sequence[Curve]) -> tuple[list[float], list]:
    """Places of any run's evaluations that lie within every run's curve (of very many a share, the
    first and last among them), and the estimate there; between its evaluations a run's value lies
    on the straight line.
    """
    first, last = max(c[0][0] for c in curves), min(c[-1][0] for c in curves)
    places = sorted({x for one in curves for x, _ in one if first <= x <= last})
    if len(places) > _PLACES:
        places = [places[i] for i in np.linspace(0, len(places) - 1, _PLACES).round().astype(int)]
    heights = np.array([np.interp(places, *zip(*one, strict=True)) for one in curves])
    return places, [estimate(column) for column in heights.T]


def _metrics(game: Mapping[str, Any]) -> str:
    """The metrics of the panel; groups may have different judging modes."""
    return "\n".join(dict.fromkeys(group["metric"] for group in game["groups"]))
