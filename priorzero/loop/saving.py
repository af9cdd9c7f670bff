"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from priorzero.loop.parts import Parts
from priorzero.loop.progress import History, Progress
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


async def save(parts: Parts, best: bool = False) -> None:
    """Write a checkpoint of everything but the replay buffer.

    Args:
        best: it is the best so far.
    """
    if parts.checkpoints.saved_iteration == parts.progress.iteration:
        # The evaluation just before has written it.
        if best:
            parts.checkpoints.mark_best()
        return
    with parts.watch("save"):
        path = await asyncio.to_thread(_write, parts, best)
    logger.info("✓ Saved %s%s", path, " (best so far)" if best else "")


def _write(parts: Parts, best: bool) -> Path:
    progress = asdict(parts.progress)
    state = {
        "policy": parts.policy.learn_mode.state_dict(),
        "progress": progress,
        "history": asdict(parts.history),
    }
    llm = parts.llm.trainer.state_dict() if parts.llm is not None else None
    return parts.checkpoints.save(
        parts.progress.iteration, state, llm, progress | _facts(parts), best
    )


def _facts(parts: Parts) -> dict[str, Any]:
    return {
        "game": parts.game.env_id,
        "encoder": parts.settings.text.encoder,
        "llm": parts.llm_name,
    }


async def load(parts: Parts, which: str) -> None:
    """Continue from a checkpoint; the replay buffer starts empty and is refilled by playing.

    Args:
        which: latest, best, or a folder's name.
    Raises:
        PriorZeroError: there is none, it is damaged, or its network does not fit these settings.
    """
    state, llm, meta = parts.checkpoints.load(which, parts.device)

    try:
        parts.policy.learn_mode.load_state_dict(state["policy"])
    except RuntimeError as error:
        first = str(error).strip().splitlines()[-1].strip()
        raise PriorZeroError(
            "the checkpoint's world model does not fit these settings (for example: "
            f"{first}). Start it with the settings in {parts.folder / 'config.json'}"
        ) from error

    parts.progress = Progress(**state["progress"])
    if not parts.eval_only:  # the summary goes on where the run left off
        parts.history = History(**state["history"])

    if parts.llm is not None and llm is not None:
        parts.llm.trainer.load_state_dict(llm)
        parts.llm.trainer.version = parts.progress.llm_version
        await parts.llm.phase.publish()

    logger.info(
        "Resumed %s at iteration %d, %d environment steps; the replay buffer starts empty",
        meta["game"],
        parts.progress.iteration,
        parts.progress.env_steps,
    )
