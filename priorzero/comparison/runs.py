"""A run's folder as one curve, and groups of runs that differ only in the seed. A sweep's runs
(`priorzero.sweep`) are grouped by variant, whose name they bear.

A curve comes from `log/metrics.jsonl` (or `metrics.jsonl`, where only that was kept). Where neither
is there it comes from `summary.json`, which knows evaluation returns and lengths but no times.
"""

from __future__ import annotations

import json
import logging
from bisect import insort
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from priorzero.settings.env import SUITE, in_words, plain_name
from priorzero.settings.evaluation import judging_mode
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

# What may differ in a group: the seed, names, how the process was started and shown. The game has a
# heading of its own.
_SAME_GROUP = (
    "settings.seed",
    "settings.exp_name",
    "settings.env.env_id",
    "schedule.resume",
    "schedule.checkpoint",
    "settings.metrics.wandb",
    "settings.metrics.wandb_project",
    "settings.metrics.live",
    "settings.decisions.page",
    "settings.decisions.page_mib",
)

_OF_SUMMARY: dict[str, Callable[[Mapping[str, list[float]]], float]] = {
    "return_mean": lambda episodes: mean(episodes["returns"]),
    "return_std": lambda episodes: pstdev(episodes["returns"]),
    "return_best": lambda episodes: max(episodes["returns"]),
    "return_worst": lambda episodes: min(episodes["returns"]),
    "length": lambda episodes: mean(episodes["lengths"]),
}


@dataclass(frozen=True)
class Point:
    """A metric's value after `step` environment steps and `minutes` of iterations (evaluation and
    saving aside); None: the files hold no times.
    """

    step: int
    minutes: float | None
    value: float


@dataclass(frozen=True)
class Run:
    """One run, or what it says of one of its games. `settings`: those of its config.json by dotted
    name; `points`: in their order; `variant`: its name in a sweep, empty for other runs.
    """

    folder: Path
    game: str
    seed: int
    settings: Mapping[str, Any]
    metric: str
    points: tuple[Point, ...]
    variant: str = ""


@dataclass(frozen=True)
class Group:
    """Runs of a game whose settings are equal but for the seed. `label`: the settings in which the
    game's groups differ, with this group's values.
    """

    name: str
    label: str
    runs: tuple[Run, ...]

    @property
    def metric(self) -> str:
        """The metric of all its runs: they have the same evaluation modes."""
        return self.runs[0].metric


# ---- reading -------------------------------------------------------------------------------------


def read_runs(folders: Sequence[Path], metric: str | None = None) -> list[Run]:
    """Read every folder once, in the order given. A run of several games gives one of each of them,
    and one of all together.

    Args:
        metric: `namespace/name` as in metrics.jsonl; None: the mean return of each run's judging
            mode.

    Raises:
        PriorZeroError: a folder is no run, or a metric has no namespace.
    """
    if metric is not None and "/" not in metric:
        raise PriorZeroError(
            f"--metric {metric} has no namespace; give one as docs/METRICS.md names it, "
            "such as eval/world_model/return_mean"
        )
    unique = list({folder.resolve(): folder for folder in folders}.values())
    strange = [str(f) for f in unique if not (f / "config.json").is_file()]
    if strange:
        raise PriorZeroError(
            f"no run is in {', '.join(strange)}: there is no config.json; give the folders of "
            "experiments, such as data_priorzero/NAME"
        )
    return [run for folder in unique for run in _read_run(folder, metric)]


def _read_run(folder: Path, metric: str | None) -> Iterator[Run]:
    path, config = folder / "config.json", _json(folder / "config.json")
    try:
        settings = config["settings"]
        env, seed = settings["env"], settings["seed"]
        played = _as_list(env["env_id"])
        metric = metric or f"eval/{judging_mode(settings['eval']['modes'])}/return_mean"
        flat = dict(_flat(config))
    except (KeyError, TypeError, AttributeError) as error:
        raise PriorZeroError(
            f"{path} is not what a run writes ({error!r} is missing or of the wrong kind)"
        ) from error

    summary = _json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    kept = _json(folder / "run.json") if (folder / "run.json").is_file() else {}
    variant = str(kept.get("variant", ""))

    # The settings may say "auto"; the summary knows what it was.
    known = summary.get("games", [summary["game"]] if "game" in summary else played)
    headings = _headings(known, _evaluated(env, summary, known), metric)
    for number, (game, own) in enumerate(headings.items()):
        points = tuple(_points(folder, summary, own))
        if points or number == 0:
            yield Run(folder, game, seed, flat, own, points, variant)


def _evaluated(
    env: Mapping[str, Any], summary: Mapping[str, Any], played: Sequence[str]
) -> Sequence[str]:
    named = env.get("eval_env_id")
    return summary.get("eval_games", played if named is None else _as_list(named))


def _headings(played: Sequence[str], evaluated: Sequence[str], metric: str) -> dict[str, str]:
    """What a run is told under -> the metric's name there: first all games together, then, where
    there are several, each of them.

    Args:
        played: games trained on. evaluated: games evaluated.
    """
    namespace, _, name = metric.partition("/")
    told = evaluated if namespace == "eval" else played
    together = in_words([game for game in told if game in played] or list(told))
    if len(told) < 2:
        return {together: metric}
    each = {game: f"{namespace}/{plain_name(game)}/{name}" for game in told}
    return {together: metric} | each


def _as_list(env_id: str | list[str]) -> list[str]:
    return [env_id] if isinstance(env_id, str) else env_id


def _points(folder: Path, summary: Mapping[str, Any], metric: str) -> list[Point]:
    for lines in (folder / "log" / "metrics.jsonl", folder / "metrics.jsonl"):
        if lines.is_file():
            return _from_metrics(lines, metric)
    return _from_summary(summary, metric)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PriorZeroError(f"{path} cannot be read ({error}); leave this run out") from error
    if not isinstance(found, dict):
        raise PriorZeroError(f"{path} is not what a run writes; leave this run out")
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of everything that is no dictionary; 32 and 32.0 are one value."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            whole = isinstance(value, float) and value.is_integer()
            yield prefix + name, int(value) if whole else value


def _from_metrics(path: Path, metric: str) -> list[Point]:
    """The curve with its times, from the lines a run wrote.

    A resumed run goes back to its checkpoint and plays some steps again: what was written of them
    before counts no more. An evaluation beside training, and one of `eval`, stands behind what was
    played later; it belongs to the curve at its own place, if the run has none there.
    """
    namespace, _, name = metric.partition("/")
    iterations: list[tuple[int, float]] = []  # environment steps after it, seconds
    found: list[tuple[int, int, float]] = []  # iterations before it, environment steps, value
    for row in _lines(path):
        step, last = row["step"], iterations[-1][0] if iterations else 0
        is_evaluation = row["namespace"] == "eval"
        if step < last and not is_evaluation:
            iterations = [one for one in iterations if one[0] < step]
            found = [one for one in found if one[1] < step]

        if row["namespace"] == "perf" and "seconds_iteration" in row:
            iterations.append((step, row["seconds_iteration"]))
        if row["namespace"] != namespace or name not in row:
            continue
        if is_evaluation and step < last:
            # It was played beside training (`async_eval`), or by `eval` afterwards.
            if all(one[1] != step for one in found):
                before = sum(end <= step for end, _ in iterations)
                insort(found, (before, step, row[name]))
        elif not (is_evaluation and found and found[-1][0] == len(iterations)):
            found.append((len(iterations), step, row[name]))

    def minutes(before: int) -> float | None:
        return sum(seconds for _, seconds in iterations[:before]) / 60 if iterations else None

    return [Point(step, minutes(before), value) for before, step, value in found]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl; a killed run's last line may be cut in the middle."""
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and {"namespace", "step"} <= row.keys():
            yield row
        else:
            logger.warning("%s: a damaged line is left out", path)


def _from_summary(summary: Mapping[str, Any], metric: str) -> list[Point]:
    """The curve without times, where only the summary was kept."""
    namespace, *path, name = metric.split("/")
    if namespace != "eval" or not path or name not in _OF_SUMMARY:
        return []
    *game, mode = path
    return [
        Point(one["env_steps"], None, float(_OF_SUMMARY[name](episodes)))
        for one in summary.get("evaluations", ())
        if (episodes := _episodes(one.get(mode, {}), game))
    ]


def _episodes(of_mode: Mapping[str, Any], game: Sequence[str]) -> Mapping[str, list[float]]:
    """Returns and lengths of a mode, or of one of its games; empty where there are none."""
    for name in game:
        of_mode = of_mode.get("games", {}).get(name, {})
    return of_mode


# ---- groups --------------------------------------------------------------------------------------


def group_runs(runs: Sequence[Run]) -> dict[str, list[Group]]:
    """Per game its groups, games and groups in the order of their first runs."""
    games: dict[str, dict[str, list[Run]]] = {}
    for run in runs:
        key = json.dumps([run.variant, _compared(run)], sort_keys=True)
        games.setdefault(run.game, {}).setdefault(key, []).append(run)

    return {
        game: [
            Group(name, label, tuple(members))
            for name, label, members in zip(
                _names([m[0] for m in groups.values()]),
                _labels([m[0] for m in groups.values()]),
                groups.values(),
                strict=True,
            )
        ]
        for game, groups in games.items()
    }


def _compared(run: Run) -> dict[str, Any]:
    compared = {name: value for name, value in run.settings.items() if name not in _SAME_GROUP}
    env_id = run.settings["settings.env.env_id"]
    if env_id == SUITE or isinstance(env_id, list):
        # Under a game's heading, what else the agent was trained on tells runs apart.
        compared["settings.env.env_id"] = env_id
    return compared


def _names(firsts: Sequence[Run]) -> list[str]:
    """A name for every group, from one run each: its variant's, where these tell groups apart."""
    variants = [run.variant for run in firsts]
    if all(variants) and len(set(variants)) == len(variants):
        return variants
    return [f"G{number}" for number in range(1, len(firsts) + 1)]


def _labels(firsts: Sequence[Run]) -> list[str]:
    """A label for every group, from one run each."""
    settings = [{n: json.dumps(v) for n, v in _compared(run).items()} for run in firsts]
    names = dict.fromkeys(name for one in settings for name in one)
    # A setting that an older version did not have is told as such.
    rows = {name: [one.get(name, "(not there)") for one in settings] for name in names}
    differing = {name: row for name, row in rows.items() if len(set(row)) > 1}
    return [
        ", ".join(
            f"{name.removeprefix('settings.')}={row[number]}" for name, row in differing.items()
        )
        or "all runs"
        for number in range(len(firsts))
    ]
