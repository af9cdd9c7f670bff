"""The training of a warm-up: in parts, with evaluations on games held out between them.

The weights with the lowest log loss on the games held out are kept. Training ends where `patience`
evaluations brought none better, where the time is up, or where plain English has become less likely
than `max_text_loss` allows: an LLM that has lost its language knows nothing of a game it has not
seen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorzero.evidence.metrics import figures, judge, reduce, uniform_figures
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.update.trainers.builtin import BuiltinTrainer
from priorzero.llm.weights.trained import lay_over
from priorzero.settings.llm import LLMTrainSettings
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import TokenisedRequest
from priorzero.warmup.examples import Example

logger = logging.getLogger(__name__)

REDUCTIONS = ("sum", "mean")
_REPORTS = 10  # lines of progress between two evaluations, about
_TOGETHER = 32  # decisions scored in one call
_GIVEN = 8  # tokens of the plain text that are not judged

Figures = dict[str, Any]


@dataclass
class Tuned:
    """What came of a training.

    Attributes:
        before, after: figures on the games held out and on plain text; after: of the weights kept.
        curve: every evaluation, with the optimiser steps before it.
        ended: why it ended.
        steps, decisions, seconds: optimiser steps, decisions trained on, of the training.
    """

    before: Figures
    after: Figures
    curve: list[Figures] = field(default_factory=list)
    ended: str = ""
    steps: int = 0
    decisions: int = 0
    seconds: float = 0.0


def train_settings(settings: WarmupSettings, examples: int, all_weights: bool) -> LLMTrainSettings:
    """The optimiser's settings: half a cosine over all passes, behind a twentieth of warm-up."""
    rate = settings.learning_rate or (5e-5 if all_weights else 2e-3)
    total = settings.epochs * ceil(examples / (settings.train.batch_size or examples))
    warm = max(1, total // 20)
    return replace(
        settings.train,
        learning_rate=rate,
        schedule="cosine",
        warmup_steps=warm,
        decay_steps=max(warm + 1, total),
        min_learning_rate_share=0.05,
    )


class Tuning:
    """See the module.

    Args:
        trainer: of the LLM; with an objective named sft.
        tokeniser: of the LLM.
        settings: of the warm-up.
        train, held_out: decisions to train on, and of games held out.
        clock: seconds; for the time limit.
    """

    def __init__(
        self,
        trainer: BuiltinTrainer,
        tokeniser: Tokeniser,
        settings: WarmupSettings,
        train: Sequence[Example],
        held_out: Sequence[Example],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trainer, self._settings, self._clock = trainer, settings, clock
        self._rng = np.random.default_rng(settings.seed)
        self._train = list(train)
        self._held_out = list(held_out)
        self._text = plain_request(tokeniser)
        self._steps = self._decisions = 0

    def run(self) -> Tuned:
        """Train; the trainer then holds the best weights."""
        started, reduction = self._clock(), self._settings.reduction
        before = self._evaluate()
        uniform = uniform_figures([e.outcomes for e in self._held_out])
        logger.info("Uniform choice on the games held out: %s", _told(uniform))
        logger.info("Before: %s", self._line(before))
        done = Tuned(before, before, [before])
        best, kept, worse = before, self._weights(), 0

        for part in self._parts():
            limit = 60 * self._settings.minutes - (self._clock() - started)
            whole = self._learn(part, limit if self._settings.minutes else None)
            now = self._evaluate()
            done.curve.append(now)
            logger.info("After %d steps: %s", self._steps, self._line(now))

            if now["text_loss"] - before["text_loss"] > self._settings.max_text_loss:
                done.ended = (
                    f"plain English lost {now['text_loss'] - before['text_loss']:.2f} nats per "
                    f"token, more than max_text_loss ({self._settings.max_text_loss:g})"
                )
                logger.warning("It ends: %s; the weights before that are kept", done.ended)
                break
            if now[reduction]["log_loss"] < best[reduction]["log_loss"]:
                best, kept, worse = now, self._weights(), 0
            else:
                worse += 1
            if worse >= self._settings.patience:
                done.ended = f"{worse} evaluations without a better one"
                break
            if not whole:
                done.ended = f"the time was up (minutes={self._settings.minutes:g})"
                break
        else:
            done.ended = "all passes were made"

        self._put_back(kept)
        done.after, done.steps, done.decisions = best, self._steps, self._decisions
        done.seconds = self._clock() - started
        logger.info(
            "Ended: %s. Kept, after %d steps: %s", done.ended, best["steps"], self._line(best)
        )
        return done

    # ---- learning --------------------------------------------------------------------------------

    def _parts(self) -> Iterator[list[Example]]:
        """What is trained on between two evaluations, in an order of its own in each pass."""
        for _ in range(self._settings.epochs):
            order = self._rng.permutation(len(self._train))
            for part in np.array_split(order, self._settings.evaluations):
                if len(part):
                    yield [self._train[i] for i in part]

    def _learn(self, part: Sequence[Example], seconds: float | None) -> bool:
        """Train on a part; False where the time was up before its end."""
        size = self._settings.train.batch_size or len(part)
        piece = size * max(1, ceil(len(part) / size / _REPORTS))
        started, total = self._clock(), 0
        for start in range(0, len(part), piece):
            if seconds is not None and self._clock() - started > seconds:
                return False
            chosen = part[start : start + piece]
            metrics = self._trainer.update({"sft": [e.sample() for e in chosen]})
            self._steps += ceil(len(chosen) / size)
            self._decisions += len(chosen)

            total += len(chosen)
            rate = total / max(1e-9, self._clock() - started)
            logger.info(
                "  %d/%d decisions, %.1f a second, loss %.3f, accuracy %.2f",
                total,
                len(part),
                rate,
                metrics.get("sft_loss", float("nan")),
                metrics.get("sft_accuracy", float("nan")),
            )
        return True

    # ---- judging ---------------------------------------------------------------------------------

    def _evaluate(self) -> Figures:
        """Figures by reduction on the games held out, and the loss of plain English."""
        judged: dict[str, list] = {name: [] for name in REDUCTIONS}
        for start in range(0, len(self._held_out), _TOGETHER):
            part = self._held_out[start : start + _TOGETHER]
            for example, answer in zip(
                part, self._trainer.score([e.request for e in part]), strict=True
            ):
                nothing = np.zeros(len(example.outcomes))
                for name in REDUCTIONS:
                    scores = reduce(answer.token_logprobs, nothing, name)
                    judged[name].append(judge(scores, example.outcomes, 1.0))
        (plain,) = self._trainer.score([self._text])
        loss = -float(np.mean(plain.token_logprobs[0]))
        return {
            "steps": self._steps,
            "text_loss": loss,
            **{name: figures(own) for name, own in judged.items()},
        }

    def _line(self, now: Figures) -> str:
        own = now[self._settings.reduction]
        return f"{_told(own)}; plain English {now['text_loss']:.2f} nats per token"

    def _weights(self) -> dict[str, torch.Tensor]:
        """A copy of what trains."""
        return {n: t.clone() for n, t in self._trainer.state_dict()["model"].items()}

    def _put_back(self, weights: dict[str, torch.Tensor]) -> None:
        with self._trainer.lock:
            odd = lay_over(self._trainer.weights().module, weights)
        assert not odd, f"its own weights do not fit: {odd[:3]}"


def plain_request(tokeniser: Tokeniser) -> TokenisedRequest:
    """Plain English as if it were one long command: so the trainer's own forward scores it."""
    text = Path(__file__).with_name("plain_text.txt").read_text(encoding="utf-8").strip()
    ids = tokeniser.ids(text)
    longest = tokeniser.max_tokens
    return TokenisedRequest((), ids[:_GIVEN], (ids[_GIVEN:longest],))


def _told(own: Figures) -> str:
    return (
        f"top-1 {own['top1']:.3f}, MRR {own['mrr']:.3f}, log loss {own['log_loss']:.3f} "
        f"({own['decisions']} decisions)"
    )
