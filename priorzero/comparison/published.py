"""Published scores beside ours, each with what it was allowed: `published.json` and its reading."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from priorzero.comparison.runs import Group
from priorzero.settings.env import in_words

_FILE = Path(__file__).with_name("published.json")
_JERICHO = "jericho-*"
_STORY = re.compile(r"\.z\d$")
_RETURN = re.compile(r"eval/(\w+)/return_mean|collect/episode_return_mean")
_PLAYERS = {
    None: "its training episodes",
    "world_model": "search, no LLM",
    "world_model_llm": "search with the LLM's prior",
    "llm": "the LLM alone",
    "random": "uniform over the valid actions",
}

Row = dict[str, Any]


def beside(game: str, groups: Sequence[Group], told: Mapping[str, Any]) -> Row | None:
    """What was published for a game, and ours on the same scale.

    Args:
        game: as the runs name it.
        groups: ours.
        told: what `figures.compare` found of them: `steps` and per group the value there.

    Returns:
        Plain values. `max_score`; `ours` and `theirs`, rows with score and its share of the
        maximum; `protocols`, what theirs counted and was allowed; `differences`, a line each;
        `sources`. None where nothing is known of the game, or no group was judged by its mean
        return.
    """
    known = _known(game, groups)
    ours = [
        row
        for group, one in zip(groups, told["groups"], strict=True)
        if (row := _ours(group, one, told["steps"])) is not None
    ]
    if not known or not ours:
        return None

    theirs = [_theirs(figure) for figure in known]
    # Means over Jericho's games are of shares; of the other families every game has 100 points.
    max_score = next((f["max_score"] for f in known if f["game"] != _JERICHO), None)
    for row in ours:
        row["share"] = None if max_score is None else 100 * row["score"] / max_score
    used = dict.fromkeys(row["protocol"] for row in theirs)
    return {
        "max_score": max_score,
        "ours": ours,
        "theirs": sorted(theirs, key=lambda row: -row["share"]),
        "protocols": {name: _read()["protocols"][name] for name in used},
        "differences": _differences(groups, used, told["steps"]),
        "sources": {
            name: _read()["sources"][name] for name in sorted({t["source"] for t in theirs})
        },
    }


@lru_cache(maxsize=1)
def _read() -> dict[str, Any]:
    return json.loads(_FILE.read_text(encoding="utf-8"))


def _known(game: str, groups: Sequence[Group]) -> list[Row]:
    """The figures of a game and of its family, or of the family alone where the heading is of
    several games; slots that are not filled are left out. Means over Jericho's games are of shares,
    which returns of several are not: there they stand below single games only.
    """
    several = _evaluated(groups)
    if game == in_words(several) and len(several) > 1:
        names = {_family(one) for one in several} - {_JERICHO}
        names = names if len(names) == 1 else set()
    else:
        names = {_base(game), _family(game)}
    return [f for f in _figures() if f["game"] in names]


def _evaluated(groups: Sequence[Group]) -> list[str]:
    """The games that the runs' evaluations play, as far as the settings name them."""
    settings = groups[0].runs[0].settings
    named = settings.get("settings.env.eval_env_id") or settings.get("settings.env.env_id", [])
    return [named] if isinstance(named, str) else list(named)


def _figures() -> list[Row]:
    return [f for f in _read()["figures"] if f["score"] is not None]


def _base(game: str) -> str:
    return _STORY.sub("", Path(game.partition(":")[0]).name)


def _family(game: str) -> str:
    base = _base(game)
    is_story = base != Path(game.partition(":")[0]).name
    if is_story or any(f["game"] == base and "-" not in base for f in _figures()):
        return _JERICHO
    return f"{base.partition('-')[0]}-*"


def _theirs(figure: Row) -> Row:
    return {
        "who": figure["method"] + (" (mean of all games)" if "*" in figure["game"] else ""),
        "score": figure["score"],
        "std": figure.get("std"),
        "share": 100 * figure["score"] / figure["max_score"],
        "protocol": figure["protocol"],
        "source": figure["source"],
    }


def _ours(group: Group, told: Mapping[str, Any], steps: float | None) -> Row | None:
    mode = _RETURN.fullmatch(group.metric)
    estimate = told["steps"].get("value")
    if mode is None or estimate is None:
        return None
    return {
        "who": f"{group.name}: {_PLAYERS[mode[1]]}",
        "score": estimate["value"],
        "low": estimate["low"],
        "high": estimate["high"],
        "env_steps": steps,
        "max_steps": group.runs[0].settings.get("settings.env.max_steps"),
        "seeds": told["steps"]["runs"],
    }


def _differences(groups: Sequence[Group], protocols: Sequence[str], steps: float) -> list[str]:
    """What keeps ours from being theirs, a line each."""
    lines = [
        "Ours: mean return, that is points since an episode's start, of evaluation episodes unless"
        " `--metric collect/episode_return_mean` asks for training episodes; valid actions are"
        " listed; no walkthrough is seen."
    ]
    lengths = {group.runs[0].settings.get("settings.env.max_steps") for group in groups}
    for name in protocols:
        protocol = _read()["protocols"][name]
        told = []
        if protocol["env_steps"]:
            share = 100 * steps / protocol["env_steps"]
            told.append(f"ours has had {share:.3g} % of its {protocol['env_steps']:,} steps")
        if protocol["max_steps"] and lengths != {protocol["max_steps"]}:
            own = ", ".join(str(n or "the game's own number of") for n in sorted(lengths, key=str))
            told.append(f"its episodes have {protocol['max_steps']} steps, ours {own}")
        if protocol["seeds"]:
            told.append(f"it has {protocol['seeds']} seeds")
        told += [f"it counts {protocol['counts']}", f"allowed: {protocol['allowed']}"]
        lines.append(f"`{name}`: " + "; ".join(told) + f" ({protocol['source']}).")
    return lines
