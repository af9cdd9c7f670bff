"""After a weight update: does the engine answer as the trainer's own forward does?"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import torch

from priorzero.types import TokenisedRequest

if TYPE_CHECKING:  # both rooms use this one
    from priorzero.llm.engines.base import LLMEngine
    from priorzero.llm.update.protocol import LLMTrainer

# Allowed difference of an action's summed log-probability: a constant and a share of its size.
# bfloat16 rounds differently in every engine, so there only gross faults are found.
_TOLERANCE = {(torch.float32, "cpu"): (2e-3, 1e-4), (torch.float32, "cuda"): (0.02, 1e-3)}
_COARSE_TOLERANCE = (0.8, 0.03)


class StaleWeightsError(RuntimeError):
    """An engine does not answer with the weights it was given."""


async def canary_difference(
    engine: LLMEngine,
    trainer: LLMTrainer,
    request: TokenisedRequest,
    tolerance: float | None = None,
) -> tuple[float, bool]:
    """Compare engine and trainer on one state.

    The trainer computes in the engine's dtype: rounding a weight to bfloat16 can undo a small
    update, on both sides.

    Args:
        engine: was given the trainer's weights.
        trainer: knows the right answer.
        request: the state. Its thought, where it has one, stands in the prompt: two thoughts
            generated one after the other would differ.
        tolerance: absolute bound; None: what is usual for the engine's dtype.

    Returns:
        largest difference in a summed action log-probability (nats), and whether all differences
        are within the tolerance.

    Raises:
        StaleWeightsError: the engine answers with another version.
        LLMEngineError: it does not answer.
    """
    assert not request.reasoning, "a canary must not generate"
    # Not through a score cache: its answer would prove nothing about the engine.
    source = getattr(engine, "inner", engine)
    answer = (await source.score([request]))[0]
    if answer.weights_version != trainer.version:
        raise StaleWeightsError(
            f"the engine answers with weights {answer.weights_version}, the trainer has "
            f"{trainer.version}"
        )

    # All layers anew: an engine that shares the trainer's trunk cache may answer from it.
    expected = (await asyncio.to_thread(trainer.score, [request], engine.dtype, all_layers=True))[0]
    usual = _TOLERANCE.get((engine.dtype, trainer.device.type), _COARSE_TOLERANCE)
    constant, share = (tolerance, 0.0) if tolerance is not None else usual
    pairs = list(zip(answer.totals(), expected.totals(), strict=True))
    within = all(abs(a - b) <= constant + share * abs(b) for a, b in pairs)
    return max((abs(a - b) for a, b in pairs), default=0.0), within
