"""One run's folder as what the page shows of it: settings, curves, evaluations, episodes."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from priorzero.decisions.reader import RecordedEpisode, is_recorded, read_episodes
from priorzero.settings.env import in_words
from priorzero.types import PriorZeroError
from priorzero.viewer.curves import read_curves
from priorzero.viewer.findings import find, returns_to_go

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShownRun:
    """A run as the page wants it.

    Attributes:
        summary: what the page reads at once; plain values.
        episodes: the decisions of each episode, which it reads when somebody looks at one.
    """

    summary: dict[str, Any]
    episodes: list[list[dict[str, Any]]]


def read_run(folder: Path, most: int) -> ShownRun:
    """Read a run's folder. Of a run that recorded no decisions, or whose records were not kept,
    there are curves, evaluations and settings.

    Args:
        most: episodes on the page. Where more are recorded, evaluations come before training
            episodes, and newer ones before older.

    Raises:
        PriorZeroError: it is no run's folder, its records cannot be read, or there is nothing to
            show.
    """
    config = _json(folder / "config.json")
    summary = _json(folder / "summary.json") if (folder / "summary.json").is_file() else {}
    try:
        settings = dict(_flat(config["settings"]))
        discount = settings["policy.discount_factor"]
        reduction = settings["policy.root_prior.reduction"]
        env_id = settings["env.env_id"]
    except (KeyError, TypeError) as error:
        raise PriorZeroError(
            f"{folder / 'config.json'} is not what a run writes ({error!r} is missing)"
        ) from error

    curves, evaluations = read_curves(folder), _kept_evaluations(summary)
    has_more = bool(curves or evaluations)
    recorded = [] if has_more and not is_recorded(folder) else read_episodes(folder)
    played = [episode.steps[0]["game"] for episode in recorded] or _names(summary, env_id)
    numbers = _chosen(recorded, most)
    shown = [recorded[number] for number in numbers]
    told = {
        "name": folder.resolve().name,
        "game": in_words(list(dict.fromkeys(played))),
        "llm": summary.get("llm"),
        "reduction": reduction,
        "discount": discount,
        "schedule": config.get("schedule", {}),
        "settings": settings,
        "curves": curves,
        "evaluations": _evaluations(recorded) or evaluations,
        "episodes": [
            _heading(number, episode) for number, episode in zip(numbers, shown, strict=True)
        ],
        "recorded": len(recorded),
        "findings": find(shown, discount),
    }
    return ShownRun(told, [_steps(episode, discount) for episode in shown])


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PriorZeroError(
            f"{path.parent} is no run's folder: it holds no {path.name}. Runs lie in "
            "data_priorzero/"
        ) from error
    except (OSError, ValueError) as error:
        raise PriorZeroError(f"{path} cannot be read ({error})") from error
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _chosen(episodes: Sequence[RecordedEpisode], most: int) -> list[int]:
    """Numbers of the episodes that are shown, in order."""
    newest = sorted(
        range(len(episodes)),
        key=lambda number: (episodes[number].steps[0]["source"] == "eval", number),
        reverse=True,
    )
    return sorted(newest[:most])


def _heading(number: int, episode: RecordedEpisode) -> dict[str, Any]:
    """An episode as the list tells it. `number`: its place among all that are recorded."""
    first, last = episode.steps[0], episode.steps[-1]
    return {
        "name": episode.name,
        "number": number,
        "game": first["game"],
        "mode": first["mode"],
        "label": first["label"],
        "env_steps": first["env_steps"],
        "length": len(episode.steps),
        "end": last["end"],
        "return": sum(step["reward"] for step in episode.steps),
    }


def _steps(episode: RecordedEpisode, discount: float) -> list[dict[str, Any]]:
    """The decisions, with what was really earned from each on as `to_go`."""
    earned = returns_to_go([step["reward"] for step in episode.steps], discount)
    # What the heading says already is left out.
    known = ("v", "episode", "source", "label", "mode", "game", "seed", "env_steps", "step", "goal")
    return [
        {name: value for name, value in step.items() if name not in known} | {"to_go": to_go}
        for step, to_go in zip(episode.steps, earned, strict=True)
    ]


def _evaluations(episodes: Sequence[RecordedEpisode]) -> list[dict[str, Any]]:
    """Evaluations in their order, by game: label, mode, environment steps, and their finished
    episodes.
    """
    rows: dict[tuple[str, str, str], list[RecordedEpisode]] = {}
    for episode in episodes:
        first, last = episode.steps[0], episode.steps[-1]
        if first["source"] == "eval" and last["end"] != "running":
            key = first["label"], first["mode"], first["game"]
            rows.setdefault(key, []).append(episode)
    return [
        {
            "label": label,
            "mode": mode,
            "game": game,
            "env_steps": own[0].steps[0]["env_steps"],
            "returns": [episode.steps[-1]["return"] for episode in own],
            "length": mean(len(episode.steps) for episode in own),
        }
        for (label, mode, game), own in rows.items()
    ]


def _names(summary: Mapping[str, Any], env_id: str | list[str]) -> list[str]:
    """Of the run's games, from its summary; the settings may say "auto"."""
    names = summary.get("games", summary.get("game", env_id))
    return [names] if isinstance(names, str) else names


def _kept_evaluations(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The same from `summary.json`, which knows returns and lengths."""
    return [
        {
            "label": f"iter{told['iteration']:06d}",
            "mode": mode,
            "game": game,
            "env_steps": told["env_steps"],
            "returns": own["returns"],
            "length": mean(own["lengths"]),
        }
        for told in summary.get("evaluations", ())
        for mode, episodes in told.items()
        if isinstance(episodes, dict)
        for game, own in episodes.get("games", {summary.get("game", ""): episodes}).items()
        if own["returns"]
    ]
