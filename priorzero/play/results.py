"""What playing gives: the collector's segments and the evaluator's episodes, with their metrics."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from priorzero.data.segment import Segment


@dataclass(frozen=True)
class CollectResult:
    """What one call of the collector played.

    segments: the finished ones. steps: environment steps of this call, those of unfinished segments
    included. collect: metrics about episodes. prior: metrics about the LLM's effect on the search.
    begun: episodes that began in this call. running: those that go on after it.
    """

    segments: list[Segment]
    steps: int
    collect: dict[str, float]
    prior: dict[str, float]
    begun: int = 0
    running: int = 0

    @property
    def transitions(self) -> int:
        """Steps in the finished segments."""
        return sum(len(segment) for segment in self.segments)


@dataclass(frozen=True)
class Totals:
    """Totals of what collection plays with, since the process started.

    games, encoder, llm: of environments, sentence encoder and prior, as their `stats` tell them;
    llm is empty without one. search: positions_clamped. workers: of collectors in other processes;
    empty where there are none.
    """

    games: Mapping[str, float]
    encoder: Mapping[str, float]
    llm: Mapping[str, float]
    search: Mapping[str, float]
    workers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class EvalResult:
    """Episodes of one mode.

    returns, scores, lengths, kinds: `[n]`, one per episode; of several games of those that are told
    together, one after the other. max_score: of the game, or nan where it is unknown, or where
    there are several. by_game: the results of each game by its plain name; empty where there is
    one. judged_by: names of those games that judge the checkpoint.
    """

    mode: str
    returns: tuple[float, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    max_score: float
    by_game: Mapping[str, EvalResult] = field(default_factory=dict)
    judged_by: Collection[str] = ()

    def metrics(self) -> dict[str, float]:
        """Of one game `MODE/figure` for each of `figures`.

        Of several games `GAME/MODE/figure` too. `MODE/figure` is then over the games that judge,
        `unseen/MODE/figure` over the others; where none judges, `MODE/figure` is over all.
        """
        if not self.by_game:
            return {f"{self.mode}/{name}": value for name, value in self.figures().items()}

        figures = {game: one.figures() for game, one in self.by_game.items()}
        told = {
            f"{game}/{self.mode}/{name}": value
            for game, own in figures.items()
            for name, value in own.items()
        }
        judging = [own for game, own in figures.items() if game in self.judged_by]
        others = [own for game, own in figures.items() if game not in self.judged_by]
        told |= {f"{self.mode}/{n}": v for n, v in _together(judging or others).items()}
        if judging and others:
            told |= {f"unseen/{self.mode}/{n}": v for n, v in _together(others).items()}
        return told

    def judgement(self) -> float:
        """What tells which checkpoint is best: the mean return; of several games, whose points
        differ, the mean over those that judge of the share of the maximal score, where it is known
        of all of them. nan where no game judges.
        """
        if not self.by_game:
            return float(np.mean(self.returns))
        judging = [self.by_game[game].figures() for game in self.by_game if game in self.judged_by]
        if not judging:
            return float("nan")
        told = "score_share" if all("score_share" in own for own in judging) else "return_mean"
        return float(np.mean([own[told] for own in judging]))

    def figures(self) -> dict[str, float]:
        """Of one game: mean, std, best, worst, length, share of the maximal score, and episodes
        per way of ending.
        """
        values = {
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "return_best": float(np.max(self.returns)),
            "return_worst": float(np.min(self.returns)),
            "length": float(np.mean(self.lengths)),
            "episodes": float(len(self.returns)),
            "terminated": float(sum(kind == "terminated" for kind in self.kinds)),
            "hangs": float(sum(kind == "hang" for kind in self.kinds)),
        }
        if np.isfinite(self.max_score) and self.max_score > 0:
            values["score_share"] = float(np.mean(self.scores)) / self.max_score
        return values


_COUNTS = ("episodes", "terminated", "hangs")  # are summed over games


def _together(games: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over the games that have a figure; counts are sums."""
    rows: dict[str, list[float]] = {}
    for own in games:
        for name, value in own.items():
            rows.setdefault(name, []).append(value)
    return {
        name: float(np.sum(values) if name in _COUNTS else np.mean(values))
        for name, values in rows.items()
    }


def joined(mode: str, games: Mapping[str, EvalResult], judged_by: Collection[str]) -> EvalResult:
    """The results of several games in one mode, by plain name, as one."""
    together = [one for game, one in games.items() if game in judged_by] or list(games.values())
    columns = {
        name: tuple(chain.from_iterable(getattr(one, name) for one in together))
        for name in ("returns", "scores", "lengths", "kinds")
    }
    return EvalResult(
        mode, **columns, max_score=float("nan"), by_game=dict(games), judged_by=judged_by
    )
