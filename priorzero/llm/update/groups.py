"""Decisions of the LLM playing alone, rated within groups of episodes: what reinforcement has in
place of a value function (GRPO, arXiv:2402.03300).

A group is the episodes of one game that the same weights played to their end, so they are answers
to one question; what the game's own dice did differently is noise.

Letters: `n` episodes of a group, `T` steps of its longest one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from priorzero.data.episodes import Episode
from priorzero.data.segment import StepRecord
from priorzero.llm.update.samples import LLMSample

if TYPE_CHECKING:
    from priorzero.settings.llm import RFTSettings

_TINY = 1e-6


class Outcome(NamedTuple):
    """How a decision turned out.

    Attributes:
        target: the return it is rated by.
        expected: the group's baseline.
        spread: what the difference of the two is divided by.
    """

    target: float
    expected: float
    spread: float


Rated = tuple[StepRecord, Outcome]
Rate = Callable[[Sequence[Episode]], list[Rated]]
# (how many, of the newest so many transitions, which decisions of whole episodes) -> decisions
SampleEpisodes = Callable[[int, int, Rate], list[LLMSample]]


class Compared(NamedTuple):
    """A group's episodes against each other, `[n, T]` each.

    Attributes:
        outcome, baseline, spread: as `Outcome` has them.
        differs: whether there is a difference between the group's outcomes at all.
    """

    outcome: np.ndarray
    baseline: np.ndarray
    spread: np.ndarray
    differs: np.ndarray


def compare(rewards: Sequence[np.ndarray], advantage: str, to_go: bool) -> Compared:
    """Outcomes R of a group's episodes, and what to hold them against.

        R_it = sum_u r_iu, over all steps u; with to_go over u >= t, 0 after the end

        group            (R - mean) / (std + tiny)         GRPO, arXiv:2402.03300
        group_mean       R - mean                          Dr. GRPO, arXiv:2503.20783
        leave_one_out    R - mean of the other episodes    RLOO, arXiv:2402.14740

    Mean and (population) deviation are over the episodes i, for each step t by itself. Returns are
    not discounted: they are the points that evaluations count.

    Args:
        rewards: of each episode, `[n_i]`.
        advantage: one of these names.
    """
    episodes, longest = len(rewards), max(len(own) for own in rewards)
    earned = np.zeros((episodes, longest))
    for row, own in enumerate(rewards):
        earned[row, : len(own)] = own

    if to_go:
        outcome = np.cumsum(earned[:, ::-1], axis=1)[:, ::-1]
    else:
        outcome = np.repeat(earned.sum(axis=1, keepdims=True), longest, axis=1)
    total = outcome.sum(axis=0)

    baseline = np.broadcast_to(total / episodes, outcome.shape)
    spread = np.ones_like(outcome)
    if advantage == "group":
        spread *= outcome.std(axis=0) + _TINY
    elif advantage == "leave_one_out":
        baseline = (total - outcome) / max(1, episodes - 1)
    else:
        assert advantage == "group_mean", advantage

    differs = np.broadcast_to(np.ptp(outcome, axis=0) > _TINY, outcome.shape)
    return Compared(outcome, baseline, spread, differs)


class GroupDraw:
    """Draws a phase's decisions, rated within their groups; `LLMPhase.run` takes it.

    A group of one episode, or one whose episodes earned the same, says nothing about any decision:
    it is counted, and nothing is drawn from it. Every decision of the others is drawn with the
    same probability, however long its episode (as in Dr. GRPO).

    Args:
        sample: the buffer's `sample_episodes`.
        settings: the `llm.rft` group; `max_staleness` says how old a group may be.
        version: of the LLM's present weights.

    Attributes:
        metrics: of the last call. rft_groups: groups considered; rft_groups_flat: those that teach
            nothing; rft_group_episodes, rft_group_return, rft_group_spread: means over the groups
            of their episodes, mean return and its (population) deviation.
    """

    def __init__(self, sample: SampleEpisodes, settings: RFTSettings, version: int) -> None:
        assert settings.relative, settings.advantage
        self._sample, self._settings, self._version = sample, settings, version
        self.metrics: dict[str, float] = {}

    def __call__(self, count: int, recent: int) -> list[LLMSample]:
        """Draw at most `count` decisions from the newest `recent` transitions."""
        return self._sample(count, recent, self._rate)

    def _rate(self, episodes: Sequence[Episode]) -> list[Rated]:
        """Every decision that teaches something."""
        groups = self._groups(episodes)
        to_go = self._settings.group_return == "to_go"
        rated: list[Rated] = []
        flat = 0
        for group in groups:
            compared = compare([e.rewards for e in group], self._settings.advantage, to_go)
            flat += not compared.differs.any()
            rated += _rated(group, compared)

        self.metrics = {"rft_groups": float(len(groups)), "rft_groups_flat": float(flat)}
        if groups:
            returns = [np.array([e.rewards.sum() for e in group]) for group in groups]
            self.metrics["rft_group_episodes"] = float(np.mean([len(group) for group in groups]))
            self.metrics["rft_group_return"] = float(np.mean([r.mean() for r in returns]))
            self.metrics["rft_group_spread"] = float(np.mean([r.std() for r in returns]))
        return rated

    def _groups(self, episodes: Sequence[Episode]) -> list[list[Episode]]:
        """Episodes by the weights that played their last step, oldest first, and by game. Left out
        are those that are too old, and those in which the LLM did not play alone: their returns are
        not its own.
        """
        limit = self._settings.max_staleness
        groups: dict[tuple[int, str], list[Episode]] = {}
        for episode in episodes:
            if any(step.searched for step in episode.steps):
                continue
            version = episode.steps[-1].scores.weights_version
            if limit is None or self._version - version <= limit:
                groups.setdefault((version, episode.game), []).append(episode)
        return [groups[key] for key in sorted(groups)]


def _rated(group: Sequence[Episode], compared: Compared) -> list[Rated]:
    """The decisions of a group that are better or worse than others."""
    return [
        (
            step,
            Outcome(
                float(compared.outcome[i, t]),
                float(compared.baseline[i, t]),
                float(compared.spread[i, t]),
            ),
        )
        for i, episode in enumerate(group)
        for t, step in enumerate(episode.steps)
        if compared.differs[i, t]
    ]
