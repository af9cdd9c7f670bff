"""What an objective is to a trainer, and what an LLM says to one decision.

An objective first prepares a phase (what has to be known before the first step), then gives the
loss of one decision after the other. It knows nothing of batches, optimisers or models.

Letters: `A` valid actions of a state, `K` tokens of all its actions one after another, `W` tokens
of its chain of thought that the LLM wrote.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from priorzero.llm.scoring.logits import action_totals, split_actions
from priorzero.llm.update.samples import LLMSample
from priorzero.types import TokenisedRequest

Metrics = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """Log-probabilities an LLM gives to the tokens of one decision, with gradients or without.

    Attributes:
        request: the decision's token ids.
        actions: `[K]`.
        thought: `[W]`; empty where nobody asked for them.
    """

    request: TokenisedRequest
    actions: torch.Tensor
    thought: torch.Tensor

    @classmethod
    def collected(cls, sample: LLMSample) -> Answer | None:
        """What the engine gave when the action was chosen; None where it did not answer."""
        if sample.collected_logprobs is None:
            return None
        flat = [value for tokens in sample.collected_logprobs for value in tokens]
        return cls(
            sample.request,
            torch.tensor(flat, dtype=torch.float64),
            torch.tensor(sample.thought_logprobs, dtype=torch.float64),
        )

    def totals(self, reduction: str) -> torch.Tensor:
        """`[A]`, one number per action: "sum" or "mean" of its tokens."""
        return action_totals(self.actions, self.request, reduction)

    def policy(self, reduction: str) -> torch.Tensor:
        """`[A]` log-probabilities over the valid actions, the softmax of their totals.

        Not floored as the root prior's are: a ratio of floored ones would not be the policies'.
        """
        return self.totals(reduction).log_softmax(-1)

    def tokens(self, action: int) -> torch.Tensor:
        """Those of one action's tokens, the terminator's last."""
        return split_actions(self.actions, self.request)[action]


class Score(Protocol):
    """Scores decisions with the weights as they are before the phase."""

    def __call__(
        self, samples: Sequence[LLMSample], *, thoughts: bool = False, initial: bool = False
    ) -> list[Answer]:
        """Token log-probabilities of the samples' actions, in float64 on the CPU.

        Args:
            thoughts: of the thoughts' written tokens too.
            initial: with the weights as they were before any training; only for objectives that
                say so (`Objective.initial`).
        """
        ...


class Objective(ABC):
    """One way to learn from decisions.

    Attributes:
        passes: over the decisions of a phase.
        thoughts: whether `loss` needs the thoughts' log-probabilities.
        initial: whether `prepare` asks for scores of the LLM before any training.
    """

    passes = 1
    thoughts = False
    initial = False

    @abstractmethod
    def prepare(self, samples: Sequence[LLMSample], score: Score) -> tuple[list[Any], Metrics]:
        """Before the first step of a phase.

        Args:
            samples: all decisions of the phase, at least one.

        Returns:
            what `loss` needs of each sample (plain values, tensors, or a dataclass of these: a step
            that fails is written down with it), and metrics of the whole phase.
        """

    @abstractmethod
    def loss(self, answer: Answer, prepared: Any) -> tuple[torch.Tensor, Metrics]:
        """Loss of one decision, and metrics that are averaged over the decisions of a phase.

        Args:
            answer: under the present weights, with gradients.
            prepared: what `prepare` gave for it.
        """

    def stops(self, step: Mapping[str, float]) -> bool:
        """Whether the phase ends before this optimiser step, whose mean metrics are `step`."""
        return False

    def finish(self, means: Mapping[str, float]) -> None:  # noqa: B027 - an optional hook
        """After a phase, with the means of its metrics."""

    def state_dict(self) -> dict[str, float]:
        """What has to be kept between phases, as plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:  # noqa: B027 - an optional hook
        """Undo `state_dict`."""
