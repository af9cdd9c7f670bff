"""Groups of runs at equal environment steps and at equal time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import mean
from typing import Any

import numpy as np

from priorzero.comparison.published import beside
from priorzero.comparison.runs import Group, Run
from priorzero.comparison.statistics import estimate, probability_of_improvement
from priorzero.types import PriorZeroError

SLACK = 0.05
"""Runs are evaluated at steps that differ a little from seed to seed. A run has reached a place of
an axis if its last evaluation is at most this share before it."""

AXES = ("steps", "minutes")

Curve = list[tuple[float, float]]


def curve(run: Run, axis: str) -> Curve:
    """(place on the axis, value) of every evaluation; empty where the run has no times.

    Args:
        axis: one of `AXES`.
    """
    if axis == "steps":
        return [(point.step, point.value) for point in run.points]
    return [(p.minutes, p.value) for p in run.points if p.minutes is not None]


def common_place(curves: Sequence[Curve]) -> float | None:
    """The last evaluation that every run has reached; None where no curve has one.

    Runs that ended before a second evaluation have no say, where there are others: they would
    have all of them compared at the start.
    """
    ends = [one[-1][0] for one in curves if len(one) > 1] or [one[-1][0] for one in curves if one]
    if not ends:
        return None
    return max(x for one in curves for x, _ in one if x * (1 - SLACK) <= min(ends))


def reached(one: Curve, place: float) -> bool:
    """Whether a run is to be judged there."""
    return bool(one) and one[0][0] <= place and one[-1][0] >= place * (1 - SLACK)


def value_at(one: Curve, place: float) -> float:
    """The last evaluation at or before the place."""
    return [value for x, value in one if x <= place][-1]


def area_under(one: Curve, place: float) -> float:
    """Mean height of the curve from 0 to the place: straight between evaluations, level before the
    first and after the last one at or before the place.
    """
    points = [(x, value) for x, value in one if x <= place]
    if place == 0:
        return points[-1][1]
    x, y = np.array([(0.0, points[0][1]), *points, (place, points[-1][1])]).T
    return float(np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2) / place)


# ---- the comparison ------------------------------------------------------------------------------


def compare(
    games: Mapping[str, Sequence[Group]], steps: int | None = None, minutes: float | None = None
) -> dict[str, Any]:
    """Everything that page, files and picture tell.

    Args:
        games: as `runs.group_runs` gives them.
        steps, minutes: where to compare; None: at the last evaluation every run of the game
            reached.

    Returns:
        Plain values. `games`: per game its name, `steps`, `minutes`, `groups`, `pairs`, `notes`,
        and `published` (see `published.beside`).

    Raises:
        PriorZeroError: no run has the metric.
    """
    runs = [run for groups in games.values() for group in groups for run in group.runs]
    if not any(run.points for run in runs):
        names = ", ".join(dict.fromkeys(run.metric for run in runs))
        raise PriorZeroError(
            f"no run has {names}: there was no evaluation, or not in this mode (eval.modes, "
            "--eval-freq); --metric names another metric of log/metrics.jsonl"
        )
    return {"games": [_game(name, groups, (steps, minutes)) for name, groups in games.items()]}


def _game(
    name: str, groups: Sequence[Group], asked: tuple[float | None, float | None]
) -> dict[str, Any]:
    runs = [run for group in groups for run in group.runs]
    places = {}
    for axis, at in zip(AXES, asked, strict=True):
        common = common_place([curve(run, axis) for run in runs])
        # Without any times there is no place to compare at, whatever was asked for.
        places[axis] = common if at is None or common is None else at
    told = {
        "game": name,
        **places,
        "groups": [_group(group, places) for group in groups],
        "pairs": [_pair(a, b, places) for a, b in combinations(groups, 2)],
        "notes": _notes(groups, places),
    }
    return told | {"published": beside(name, groups, told)}


def _group(group: Group, places: Mapping[str, float | None]) -> dict[str, Any]:
    told = {
        "name": group.name,
        "label": group.label,
        "metric": group.metric,
        "runs": [_run(run, places) for run in group.runs],
    }
    for axis, place in places.items():
        values, areas = (
            _judged(group, axis, place, value_at),
            _judged(group, axis, place, area_under),
        )
        told[axis] = {"runs": len(values)}
        if values:
            told[axis] |= {
                "value": estimate(values)._asdict(),
                "area": estimate(areas)._asdict(),
                "mean": mean(values),
            }
    return told


def _run(run: Run, places: Mapping[str, float | None]) -> dict[str, Any]:
    told: dict[str, Any] = {"folder": str(run.folder), "seed": run.seed}
    for axis, place in places.items():
        one = curve(run, axis)
        is_judged = place is not None and reached(one, place)
        told |= {
            f"value_at_{axis}": value_at(one, place) if is_judged else None,
            f"area_to_{axis}": area_under(one, place) if is_judged else None,
            f"last_{axis}": one[-1][0] if one else None,
        }
    return told


def _judged(
    group: Group, axis: str, place: float | None, figure: Callable[[Curve, float], float]
) -> list[float]:
    """The figure of every run that reached the place."""
    curves = [curve(run, axis) for run in group.runs]
    return [figure(c, place) for c in curves if place is not None and reached(c, place)]


def _pair(ours: Group, theirs: Group, places: Mapping[str, float | None]) -> dict[str, Any]:
    """Probability of improvement of the value; None where a group has no run there."""
    told: dict[str, Any] = {"ours": ours.name, "theirs": theirs.name}
    for axis, place in places.items():
        sides = [_judged(group, axis, place, value_at) for group in (ours, theirs)]
        told[axis] = probability_of_improvement(*sides)._asdict() if all(sides) else None
    return told


def _notes(groups: Sequence[Group], places: Mapping[str, float | None]) -> list[str]:
    """What a reader must know of single runs, a line each."""
    notes = []
    if places["steps"] is not None and places["minutes"] is None:
        notes.append("No run left times (`log/metrics.jsonl`): nothing is compared at equal time.")
    for group in groups:
        seeds = [run.seed for run in group.runs]
        for seed in sorted({s for s in seeds if seeds.count(s) > 1}):
            notes.append(
                f"{group.name} has seed {seed} {seeds.count(seed)} times: if these runs are copies "
                "of each other, its interval is too narrow."
            )
        for run in group.runs:
            notes += _notes_of(run, group.name, places)
    return notes


def _notes_of(run: Run, group: str, places: Mapping[str, float | None]) -> list[str]:
    name = f"{run.folder} ({group}, seed {run.seed})"
    if not run.points:
        return [f"{name} has no {run.metric} and is left out."]

    notes = []
    for axis, place in places.items():
        one = curve(run, axis)
        if place is None:
            continue
        if not one:
            notes.append(f"{name} left no times and is not compared at equal time.")
        elif not reached(one, place):
            first, last = in_words(one[0][0], axis), in_words(one[-1][0], axis)
            own = f"evaluations lie between {first} and {last}"
            if len(one) == 1:
                own = f"only evaluation is at {first}"
            notes.append(f"{name} is not compared at {in_words(place, axis)}: its {own}.")
    return notes


def in_words(place: float, axis: str) -> str:
    """`4,000 steps`, `12.59 minutes`."""
    return f"{place:,.{0 if axis == 'steps' else 2}f} {axis}"
