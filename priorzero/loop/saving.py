"""What a checkpoint holds, and how a run goes on from one."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from priorzero.loop.parts import Parts
from priorzero.loop.progress import History, Progress
from priorzero.run.checkpoint import CheckpointStore
from priorzero.run.randomness import global_states, set_global_states
from priorzero.settings.env import in_words
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

# Of the state, what every process of a data-parallel run has of its own, and saves itself.
_OWN = ("replay", "episodes", "texts", "random")


async def save(parts: Parts, best: bool = False) -> bool:
    """Write a checkpoint of everything; the replay buffer's finished segments go to files of their
    own, so that only new ones are written.

    A disk that is full, or fails, costs this checkpoint and not the run: it is logged and counted,
    and the checkpoint before stays the latest. `require_saved` says so again at the end.

    Args:
        best: it is the best so far.

    Returns:
        whether the checkpoint is on disk.
    """
    try:
        if parts.checkpoints.saved_iteration == parts.progress.iteration:
            # The evaluation just before has written it.
            if best:
                parts.checkpoints.mark_best()
            return True
        with parts.watch("save"):
            path = await asyncio.to_thread(_write, parts, best)
    except OSError as error:
        parts.progress.save_failures += 1
        logger.error(
            "the checkpoint of iteration %d could not be written (%s); the one before stands as it "
            "was and the run goes on. Free space in %s, or make it writable, before the next save",
            parts.progress.iteration,
            error,
            parts.folder,
        )
        return False
    logger.info("✓ Saved %s%s", path, " (best so far)" if best else "")
    return True


def mark_best(parts: Parts, name: str | None) -> bool:
    """Make a checkpoint that was written earlier the best; a disk that fails does not end the run.

    Args:
        name: of its folder; None where it could not be written.

    Returns:
        whether it is the best now.
    """
    if name is None:
        logger.error("the best evaluation so far has no checkpoint: it could not be written")
        return False
    try:
        parts.checkpoints.mark_best(name)
    except OSError as error:
        logger.error("checkpoint %s could not be marked as the best (%s)", name, error)
        return False
    logger.info("✓ %s is the best so far", name)
    return True


def require_saved(parts: Parts) -> None:
    """At the end of a run: raise PriorZeroError where the last save failed."""
    saved = parts.checkpoints.saved_iteration
    if not parts.eval_only and saved != parts.progress.iteration:
        raise PriorZeroError(
            f"the run's last checkpoint could not be written, see the log; the newest that this "
            f"run wrote is of {f'iteration {saved}' if saved is not None else 'no iteration'}. "
            f"Free space in {parts.folder} and continue with --resume"
        )


def _write(parts: Parts, best: bool) -> Path:
    progress = asdict(parts.progress)
    state = {
        "policy": parts.policy.learn_mode.state_dict(),
        "progress": progress,
        "history": asdict(parts.history),
        "replay": {
            "chunks": parts.archive.write(parts.buffer.numbered_segments()),
            "buffer": parts.buffer.state_dict(),
        },
        "episodes": parts.collector.state_dict(),
        "texts": parts.encoder.state_dict(),
        "random": global_states(),
    }
    llm = None
    if not parts.ranks.first:
        state = {name: state[name] for name in _OWN} | {"rng": state["policy"]["rng"]}
    elif parts.llm is not None:
        state["thought_calls"] = parts.llm.engine.thought_calls
        llm = parts.llm.trainer.state_dict()

    path = parts.checkpoints.save(
        parts.progress.iteration, state, llm, progress | _facts(parts), best
    )
    parts.archive.commit()
    return path


def _facts(parts: Parts) -> dict[str, Any]:
    return {
        "game": in_words(parts.game_names),
        "games": parts.game_names,
        "encoder": parts.settings.text.encoder,
        "llm": parts.llm_name,
        "llm_seen": parts.llm_seen.as_list(),
    }


async def load(parts: Parts, which: str) -> None:
    """Continue from a checkpoint, as if the run had not been interrupted. With `eval_only` what
    training alone needs is left alone.

    Args:
        which: latest, best, or a folder's name.

    Raises:
        PriorZeroError: there is none, it is damaged, or its network does not fit these settings.
    """
    state, llm, meta = _read(parts, which)

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

    told = ""
    if not parts.eval_only:
        told = "; " + await _load_play(parts, state)
        parts.checkpoints.go_on_from(meta["checkpoint"])
    logger.info(
        "Resumed %s at iteration %d, %d environment steps%s",
        meta["game"],
        parts.progress.iteration,
        parts.progress.env_steps,
        told,
    )


def _read(parts: Parts, which: str) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
    """The checkpoint, see `CheckpointStore.load`. But for the first process of a data-parallel run,
    replay buffer, episodes and random states are the process's own, where it saved them.
    """
    if parts.ranks.first:
        state, llm, meta = parts.checkpoints.load(which, parts.device)
        parts.ranks.from_first(meta["checkpoint"])
        return state, llm, meta

    name = parts.ranks.from_first(which)
    state, llm, meta = CheckpointStore(parts.folder / "ckpt").load(name, parts.device)
    for key in _OWN:
        state.pop(key, None)
    state["policy"].pop("rng", None)
    try:
        own, _, _ = parts.checkpoints.load(name, parts.device)
    except PriorZeroError as error:
        logger.warning("this process begins with an empty replay buffer: %s", error)
        return state, llm, meta
    state["policy"]["rng"] = own.pop("rng")
    return state | own, llm, meta


async def _load_play(parts: Parts, state: Mapping[str, Any]) -> str:
    """Replay buffer, running episodes and random states; returns them in words."""
    if "replay" not in state:
        return "the replay buffer starts empty, an earlier version did not save it"
    parts.encoder.load_state_dict(_on_cpu(state["texts"]))

    replay = _on_cpu(state["replay"])
    segments = await asyncio.to_thread(parts.archive.read, replay["chunks"])
    missing = parts.buffer.load_state_dict(replay["buffer"], segments)
    parts.buffer.remove_oldest_data_to_fit()

    episodes = _on_cpu(state["episodes"])
    lost = await parts.collector.resume(episodes)
    parts.progress.episodes_lost += lost

    if parts.llm is not None and "thought_calls" in state:
        parts.llm.engine.thought_calls = state["thought_calls"]
    # Last, since loading may have drawn.
    set_global_states(state["random"])

    told = f"the replay buffer holds {parts.buffer.get_num_of_transitions()} transitions"
    if missing:
        told += f" ({missing} are not on disk any more)"
    # Episodes that ran in other processes have no slots here.
    running = len(episodes["slots"]) + episodes.get("elsewhere", 0)
    return f"{told}, {running - lost} of {running} episodes go on"


def _on_cpu(tree: Any) -> Any:
    """Tensors as numpy arrays, wherever the checkpoint was loaded to; the rest as it is."""
    if isinstance(tree, dict):
        return {name: _on_cpu(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_on_cpu(value) for value in tree]
    return tree.cpu().numpy() if hasattr(tree, "cpu") else tree
