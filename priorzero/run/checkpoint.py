"""Checkpoints: one folder each, written whole or not at all; the latest and the best are kept.

    <exp>/ckpt/iter_00000040/{state.pt, llm.pt, meta.json}
    <exp>/ckpt/latest, <exp>/ckpt/best                          names of folders

A folder is filled under a temporary name, flushed to disk and renamed; the pointer file is replaced
the same way. A run that dies while saving leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"


class CheckpointStore:
    """Saves and loads checkpoints of one experiment.

    Attributes:
        saved_iteration: of the newest checkpoint that this object wrote; None before the first.

    Args:
        folder: `<exp>/ckpt`.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.saved_iteration: int | None = None

    def save(
        self,
        iteration: int,
        state: dict[str, Any],
        llm: dict[str, Any] | None,
        meta: dict[str, Any],
        best: bool = False,
    ) -> Path:
        """Write the checkpoint of this iteration and make it the latest (and the best); drop those
        no longer named.

        Args:
            iteration: the run's.
            state: world model, optimiser, target, vocabulary, progress, history.
            llm: weights and optimiser, or None without one.
            meta: small JSON facts (progress, game, encoder, LLM) for a reader.
            best: it is the best so far.
        Returns:
            The checkpoint's folder.
        """
        name = self._free_name(iteration)
        final, temporary = self._folder / name, self._folder / f"{_TEMPORARY}{name}-{os.getpid()}"

        # Fill a folder of another name, so that a half-written one is never taken for whole.
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        torch.save(state, temporary / "state.pt")
        if llm is not None:
            torch.save(llm, temporary / "llm.pt")
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        temporary.rename(final)

        self._point("latest", name)
        if best:
            self._point("best", name)
        self._prune()
        self.saved_iteration = iteration
        return final

    def _free_name(self, iteration: int) -> str:
        """A folder's name; the same iteration again gets another, and the older one goes once
        nothing names it.
        """
        name, repeat = f"iter_{iteration:08d}", 1
        while (self._folder / name).exists():
            repeat += 1
            name = f"iter_{iteration:08d}_{repeat}"
        return name

    def mark_best(self) -> None:
        """Make the latest checkpoint the best."""
        self._point("best", self._read_pointer("latest"))
        self._prune()

    def _point(self, pointer: str, name: str) -> None:
        temporary = self._folder / f"{_TEMPORARY}{pointer}"
        temporary.write_text(name, encoding="utf-8")
        os.replace(temporary, self._folder / pointer)

    def _prune(self) -> None:
        keep = {self._read_pointer(p) for p in ("latest", "best")}
        for path in self._folder.iterdir():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)

    def _read_pointer(self, pointer: str) -> str | None:
        path = self._folder / pointer
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def load(
        self, which: str = "latest", map_location: str = "cpu"
    ) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
        """Read a checkpoint.

        Args:
            which: `latest`, `best` or a folder's name. map_location: device of the tensors.
        Returns:
            (state, llm, meta) as they were given to `save`.
        Raises:
            PriorZeroError: there is none, or it cannot be read; nothing is deleted.
        """
        name = self._read_pointer(which) if which in ("latest", "best") else which
        path = self._folder / name if name else None
        if path is None or not path.is_dir():
            raise PriorZeroError(
                f"no checkpoint {which!r} in {self._folder}: start without --resume, or name the "
                "experiment that has one with --exp-name"
            )
        try:
            state = torch.load(path / "state.pt", map_location=map_location, weights_only=True)
            llm_path = path / "llm.pt"
            llm = (
                torch.load(llm_path, map_location=map_location, weights_only=True)
                if llm_path.exists()
                else None
            )
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
        except Exception as error:
            others = sorted(p.name for p in self._folder.iterdir() if p.is_dir() and p != path)
            raise PriorZeroError(
                f"checkpoint {path} is damaged ({type(error).__name__}: {error}). It was left as "
                f"it is. Other checkpoints here: {', '.join(others) or 'none'}; name one with "
                "--checkpoint, or start anew without --resume"
            ) from error
        return state, llm, meta
