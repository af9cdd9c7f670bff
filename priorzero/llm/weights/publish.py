"""Hands trained weights to an engine and makes sure that it answers with them."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from priorzero.llm.weights.canary import StaleWeightsError, canary_difference
from priorzero.types import TokenisedRequest

if TYPE_CHECKING:  # both rooms use this one
    from priorzero.llm.engines.base import LLMEngine
    from priorzero.llm.update.protocol import LLMTrainer

logger = logging.getLogger(__name__)


async def publish(
    engine: LLMEngine,
    trainer: LLMTrainer,
    canary: TokenisedRequest | None,
    *,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Push the trainer's weights and score one state on both sides.

    Args:
        engine: takes the weights.
        trainer: gives them.
        canary: state to compare on; its thought, where it has one, stands in the prompt. None:
            nothing is compared.
        tolerance: see `canary_difference`.

    Returns:
        seconds, bytes, version, canary_diff (nats, where there was a canary), and what else the
        engine reports.

    Raises:
        StaleWeightsError: the engine answers with other weights.
        LLMEngineError: it does not take them, or does not answer.
    """
    report = dict(await engine.push_weights(trainer.weights(), trainer.version))

    if canary is not None:
        report["canary_diff"], good = await canary_difference(engine, trainer, canary, tolerance)
        if not good:
            raise StaleWeightsError(
                f"after weights {trainer.version} were pushed, the {engine.name} engine "
                f"({engine.dtype}) differs from the trainer by {report['canary_diff']:.4f} in a "
                "summed log-probability; its weights are stale or damaged"
            )

    logger.info(
        "LLM weights %d on %s: %.1f MB in %.2f s, %s",
        trainer.version,
        engine.name,
        report.get("bytes", 0.0) / 1e6,
        report.get("seconds", 0.0),
        f"canary differs by {report['canary_diff']:.2g}"
        if "canary_diff" in report
        else "not compared: no state has been drawn yet",
    )
    return report | {"version": float(trainer.version)}
