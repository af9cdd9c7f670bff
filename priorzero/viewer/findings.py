"""Decisions worth looking at: where the search overruled the LLM and was right, where the value was
surprised, where the prior was wrong.

Nobody knows what another command would have brought, so each of these is a rule about what is
known; the page and docs/DECISIONS.md state them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from priorzero.decisions.reader import RecordedEpisode

# In the order in which the page offers them.
KINDS = ("overruled", "surprise", "prior_wrong")


class Finding(NamedTuple):
    """One decision: its episode's place among those given, its step, and how much of it there is,
    in points for values and in probability for the prior.
    """

    episode: int
    step: int
    size: float


def returns_to_go(rewards: Sequence[float], discount: float) -> list[float]:
    """Discounted sum of what was really earned from each step on, as far as the episode went."""
    returns, below = [], 0.0
    for reward in reversed(rewards):
        below = reward + discount * below
        returns.append(below)
    return returns[::-1]


def find(episodes: Sequence[RecordedEpisode], discount: float) -> dict[str, list[Finding]]:
    """The decisions of each kind, largest first.

    overruled: the command that was played is not the LLM's favourite, and more was earned from
    there on than the network expected before the search; size: the difference.

    surprise: what was earned from there on and the search's value of the state differ by more than
    twice the spread of all such differences; size: the difference, with its sign.

    prior_wrong: the search's policy puts at least half on a command to which the LLM gave less than
    chance; size: the probability it lacked to chance.
    """
    found: dict[str, list[Finding]] = {kind: [] for kind in KINDS}
    gaps: list[Finding] = []
    for number, episode in enumerate(episodes):
        earned = returns_to_go([s["reward"] for s in episode.steps], discount)
        for step, to_go in zip(episode.steps, earned, strict=True):
            if "visits" not in step:
                continue
            here = number, step["step"]
            gaps.append(Finding(*here, to_go - step["value"]))
            found["overruled"] += [Finding(*here, size) for size in _overruled(step, to_go)]
            found["prior_wrong"] += [Finding(*here, size) for size in _prior_wrong(step)]

    spread = math.sqrt(np.mean([gap.size**2 for gap in gaps])) if gaps else 0.0
    found["surprise"] = [gap for gap in gaps if abs(gap.size) > 2 * spread]
    return {kind: sorted(of, key=lambda f: -abs(f.size)) for kind, of in found.items()}


def _overruled(step: dict[str, Any], to_go: float) -> Iterator[float]:
    more = to_go - step["predicted_value"]
    if "llm" in step and step["chosen"] != int(np.argmax(step["llm"])) and more > 0 and to_go > 0:
        yield more


def _prior_wrong(step: dict[str, Any]) -> Iterator[float]:
    best = int(np.argmax(step["improved"]))
    chance = 1 / len(step["commands"])
    if "llm" in step and step["improved"][best] >= 0.5 and step["llm"][best] < chance:
        yield chance - step["llm"][best]
