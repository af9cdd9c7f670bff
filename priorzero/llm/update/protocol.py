"""The one seam between a run and whoever trains its LLM.

A trainer is one file in `trainers/` with `make(model, tokenizer, settings, reduction, folder) ->
LLMTrainer`, chosen by its file name (`llm.trainer`). `folder` is the run's, where it may leave
files; None: it leaves none. The loop, the engines and the checkpoints
know nothing more of it than what stands here. A trainer knows nothing of engines.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from priorzero.llm.scoring.trunk import TrunkCache
    from priorzero.llm.update.samples import LLMSample
    from priorzero.llm.weights.export import Weights
    from priorzero.types import ActionScores, TokenisedRequest


class LLMTrainer(Protocol):
    """Trains the LLM. Methods are synchronous and heavy: call them with `asyncio.to_thread`.

    Attributes:
        version: which weights these are; one more with every `update` that changed them. The
            loop saves it with its progress and sets it after `load_state_dict`.
        device: where `score` computes; engines elsewhere round differently.
        lock: held while weights move. An engine that shares the model or the trunk takes it too.
        trunk: outputs of layers that no update changes, for engines to share; None where there
            are none.
    """

    version: int
    device: torch.device
    lock: threading.RLock
    trunk: TrunkCache | None

    def update(self, samples: Mapping[str, Sequence[LLMSample]]) -> dict[str, float]:
        """Train one phase.

        Args:
            samples: by objective ("sft", "rft"), in the order in which they are to be trained.

        Returns:
            metrics, each with its objective's name as prefix ("sft_loss").

        Raises:
            PriorZeroError: losses or gradients stay not finite (`llm.train.max_bad_steps`).
        """
        ...

    def weights(self) -> Weights:
        """The trained weights, for engines and exports."""
        ...

    def score(
        self,
        requests: Sequence[TokenisedRequest],
        dtype: torch.dtype | None = None,
        *,
        all_layers: bool = False,
    ) -> list[ActionScores]:
        """Token log-probabilities under the trained weights, by the trainer's own forward.

        Args:
            requests: their chains of thought, where they have one, already stand in the prompts.
            dtype: compute in another dtype than training does.
            all_layers: take nothing from a cache.
        """
        ...

    def state_dict(self) -> dict:
        """Everything needed to go on, as tensors and plain values."""
        ...

    def load_state_dict(self, state: dict) -> None:
        """Undo `state_dict`.

        Raises:
            PriorZeroError: the state belongs to another model; nothing was changed.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Counters since the start, for logging."""
        ...

    def close(self) -> None:
        """Release everything; the trainer cannot be used afterwards."""
        ...
