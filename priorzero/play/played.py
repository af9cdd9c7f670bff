"""What a collector has played, and the figures that are made of it. Where several collectors play,
it is joined first, so that the figures mean the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from priorzero.data.segment import Segment
from priorzero.play.restarts import Ended
from priorzero.play.results import CollectResult
from priorzero.search.roots import SearchOutput
from priorzero.search.targets import visit_shares


@dataclass
class Played:
    """What one call of a collector has played so far.

    Attributes:
        before: environment steps of the run before the call.
        segments: finished ones.
        episodes: that ended.
        depths: steps at which episodes began that did not begin at a game's start.
        games: plain name of each episode's that ended; empty where there is one game.
        steps_of: environment steps by game.
        effects: `prior_effect` of each decision.
        steps: of the environments.
        begun: episodes.
    """

    before: int
    segments: list[Segment] = field(default_factory=list)
    episodes: list[Ended] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    games: list[str] = field(default_factory=list)
    steps_of: Counter[str] = field(default_factory=Counter)
    effects: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    begun: int = 0

    def join(self, other: Played) -> None:
        """Add what another collector played meanwhile."""
        self.segments += other.segments
        self.episodes += other.episodes
        self.depths += other.depths
        self.games += other.games
        self.steps_of += other.steps_of
        self.effects += other.effects
        self.steps += other.steps
        self.begun += other.begun

    def result(self, *, running: int, by_game: bool) -> CollectResult:
        """With its figures.

        Args:
            running: episodes that go on.
            by_game: whether figures are told by game too.
        """
        metrics = _episode_metrics(self)
        if by_game:
            metrics |= _by_game(self)
        return CollectResult(
            self.segments,
            self.steps,
            metrics,
            _means(self.effects),
            begun=self.begun,
            running=running,
        )


def prior_effect(plan: SearchOutput) -> dict[str, float]:
    """How the LLM's prior bore on one decision.

    kl_from_wm: KL(mixed || world model). entropy: of the mixture. overridden: 1 where the search's
    most visited action is not the mixture's favourite; llm_overridden: nor the LLM's own. weight:
    the LLM's share.
    """
    best = int(np.argmax(plan.visit_counts))
    effect = {
        "kl_from_wm": plan.prior.kl_from_wm,
        "entropy": plan.prior.entropy,
        "weight": plan.prior.weight,
        "overridden": float(best != int(np.argmax(plan.prior.log_mixed))),
    }
    if plan.prior.log_llm is not None:
        effect["llm_overridden"] = float(best != int(np.argmax(plan.prior.log_llm)))
        effect["llm_entropy"] = entropy(np.exp(plan.prior.log_llm))
    return effect


def _episode_metrics(played: Played) -> dict[str, float]:
    """Means over the steps of the finished segments, and over the episodes that ended."""
    steps = [step for segment in played.segments for step in segment.steps]
    metrics = {
        "segments": float(len(played.segments)),
        "transitions": float(len(steps)),
        "episodes": float(len(played.episodes)),
    }
    if steps:  # all episodes may have hung at their first
        metrics["reward_per_step"] = float(np.mean([s.reward for s in steps]))
        metrics["valid_actions"] = float(np.mean([len(s.valid_actions) for s in steps]))
    searched = [step for step in steps if step.searched]
    if searched:
        entropies = [entropy(visit_shares(s.visit_counts)) for s in searched]
        metrics["root_value"] = float(np.mean([s.root_value for s in searched]))
        metrics["visit_entropy"] = float(np.mean(entropies))
    if not played.episodes:
        return metrics

    kinds = Counter(ended.info["done_kind"] for ended in played.episodes)
    metrics |= {f"episodes_{k}": float(kinds[k]) for k in ("terminated", "truncated", "hang")}
    # What began at a visited state tells nothing of how far a whole episode gets.
    whole = [ended.info for ended in played.episodes if ended.began is None]
    if not whole:
        return metrics
    returns = [info["eval_episode_return"] for info in whole]
    return metrics | {
        "episode_return_mean": float(np.mean(returns)),
        "episode_return_max": float(np.max(returns)),
        "episode_length": float(np.mean([info["steps"] for info in whole])),
    }


def _by_game(played: Played) -> dict[str, float]:
    """What each game was played for, and the ended episodes' figures by game; `score_share` is the
    mean over the games too.
    """
    metrics = {f"{game}/steps": float(steps) for game, steps in sorted(played.steps_of.items())}
    shares = {}
    for game in sorted(set(played.games)):
        episodes = zip(played.episodes, played.games, strict=True)
        ended = [episode.info for episode, of in episodes if of == game]
        returns = [info["eval_episode_return"] for info in ended]
        metrics |= {
            f"{game}/episodes": float(len(ended)),
            f"{game}/episode_return_mean": float(np.mean(returns)),
            f"{game}/episode_return_max": float(np.max(returns)),
            f"{game}/episode_length": float(np.mean([info["steps"] for info in ended])),
        }
        top = ended[0]["max_score"]
        if top is not None and top > 0:
            shares[game] = float(np.mean([info["score"] for info in ended])) / top
            metrics[f"{game}/score_share"] = shares[game]
    if shares:
        metrics["score_share"] = float(np.mean(list(shares.values())))
    return metrics


def entropy(p: np.ndarray) -> float:
    """Of probabilities, in nats."""
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _means(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means per name over the rows that have it."""
    names = sorted({name for row in rows for name in row})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
