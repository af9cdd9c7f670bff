"""Checkpoints: one folder each, written whole or not at all; the latest, the one before it and the
best are kept.

    <exp>/ckpt/iter_00000040/{state.pt, llm.pt, meta.json}
    <exp>/ckpt/latest, previous, best                           names of folders

A folder is filled under a temporary name, flushed to disk and renamed; the pointer file is replaced
the same way. A run that dies while saving leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)
_TEMPORARY = ".tmp-"
_POINTERS = ("latest", "previous", "best")


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
        self._newest: str | None = None  # that this object wrote or goes on from
        self._held: str | None = None

    def save(
        self,
        iteration: int,
        state: dict[str, Any],
        llm: dict[str, Any] | None,
        meta: dict[str, Any],
        best: bool = False,
    ) -> Path:
        """Write the checkpoint of this iteration and make it the latest (and the best); the latest
        so far becomes the previous one. Drop those no longer named.

        Args:
            iteration: the run's.
            state: everything but the LLM: plain values, tensors and numpy arrays, which come back
                as tensors.
            llm: weights and optimiser, or None without one.
            meta: small JSON facts (progress, game, encoder, LLM) for a reader.
            best: it is the best so far.

        Returns:
            the checkpoint's folder.

        Raises:
            OSError: the disk is full, or fails; the checkpoints there are stand as they were.
        """
        name = self._free_name(iteration)
        final, temporary = self._folder / name, self._folder / f"{_TEMPORARY}{name}-{os.getpid()}"

        # Fill a folder of another name, so that a half-written one is never taken for whole.
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            _write_tensors(_tensors(state), temporary / "state.pt")
            if llm is not None:
                _write_tensors(llm, temporary / "llm.pt")
            (temporary / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
            for path in temporary.iterdir():
                with path.open("rb") as handle:
                    os.fsync(handle.fileno())
            temporary.rename(final)
        except OSError:
            shutil.rmtree(temporary, ignore_errors=True)  # it takes space that is wanted
            raise

        # A run that went on from an older one, or passed over a damaged one, builds on that.
        before = self._newest or self._read_pointer("latest")
        if before is not None:
            self._point("previous", before)
        self._point("latest", name)
        if best:
            self._point("best", name)
        self._newest, self.saved_iteration = name, iteration
        self._prune()
        return final

    def go_on_from(self, name: str) -> None:
        """The run continues this checkpoint, which the next save makes the previous one."""
        self._newest = name

    def _free_name(self, iteration: int) -> str:
        """A folder's name; the same iteration again gets another, and the older one goes once
        nothing names it.
        """
        name, repeat = f"iter_{iteration:08d}", 1
        while (self._folder / name).exists():
            repeat += 1
            name = f"iter_{iteration:08d}_{repeat}"
        return name

    def hold(self) -> str:
        """Keep the latest checkpoint, which is being judged, until `release`; returns its name."""
        assert self._held is None, "one checkpoint is judged at a time"
        self._held = self._read_pointer("latest")
        return self._held

    def release(self) -> None:
        """What was held goes with the next save, if nothing else names it."""
        self._held = None

    def mark_best(self, name: str | None = None) -> None:
        """Make a checkpoint the best.

        Args:
            name: of its folder; None: the latest.
        """
        self._point("best", name or self._read_pointer("latest"))
        self._prune()

    def _point(self, pointer: str, name: str) -> None:
        temporary = self._folder / f"{_TEMPORARY}{pointer}"
        temporary.write_text(name, encoding="utf-8")
        os.replace(temporary, self._folder / pointer)

    def _prune(self) -> None:
        keep = {self._held, *(self._read_pointer(pointer) for pointer in _POINTERS)}
        for path in self._folder.iterdir():
            if path.is_dir() and path.name not in keep:
                shutil.rmtree(path)

    def _read_pointer(self, pointer: str) -> str | None:
        path = self._folder / pointer
        return path.read_text(encoding="utf-8").strip() if path.exists() else None

    def load(
        self, which: str = "latest", map_location: str = "cpu"
    ) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
        """Read a checkpoint. Where the latest is damaged, the previous one takes its place, and the
        log says so.

        Args:
            which: `latest`, `best` or a folder's name. map_location: device of the tensors.

        Returns:
            (state, llm, meta) as they were given to `save`; `meta` also holds the folder's name as
            `checkpoint`.

        Raises:
            PriorZeroError: there is none, or it cannot be read; nothing is deleted.
        """
        name = self._read_pointer(which) if which in _POINTERS else which
        if not name or not (self._folder / name).is_dir():
            raise PriorZeroError(
                f"no checkpoint {which!r} in {self._folder}: start without --resume, or name the "
                "experiment that has one with --exp-name"
            )

        previous = self._read_pointer("previous") if which == "latest" else None
        try:
            return self._read(name, map_location)
        except _Damaged as damage:
            if not previous or previous == name:
                raise self._error(damage, name) from damage
            try:
                found = self._read(previous, map_location)
            except _Damaged as second:
                raise self._error(f"{damage}; the one before, {second}", name, previous) from second
            logger.warning(
                "checkpoint %s; the one before takes its place: %s. What was damaged is left as it "
                "is until the next save",
                damage,
                previous,
            )
            return found

    def load_llm(self, which: str = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
        """The LLM's part of one checkpoint, for a reader that does not go on training; see
        `load_state`.
        """
        return self._load_part(which, "llm.pt")

    def load_state(self, which: str = "latest") -> tuple[dict[str, Any], dict[str, Any]]:
        """Everything but the LLM's part of one checkpoint, for a reader that does not go on
        training. Its tensors stay on disk until they are used; every byte is checked.

        Args:
            which: `latest`, `previous`, `best` or a folder's name. No other takes its place.
        Returns:
            (state, meta) as they were given to `save`, but that arrays are tensors.
        Raises:
            PriorZeroError: there is none, or it cannot be read.
        """
        return self._load_part(which, "state.pt")

    def path_of(self, which: str = "latest") -> Path:
        """The folder of one checkpoint.

        Args:
            which: as of `load_state`.

        Raises:
            PriorZeroError: there is none.
        """
        name = self._read_pointer(which) if which in _POINTERS else which
        if name is None or name not in self._names():
            raise PriorZeroError(
                f"no checkpoint {which!r} in {self._folder}. Checkpoints here: {self._others()}"
            )
        return self._folder / name

    def _load_part(self, which: str, file: str) -> tuple[dict[str, Any], dict[str, Any]]:
        path = self.path_of(which)
        name = path.name
        try:
            # Mapped files are not checked while they are read.
            with zipfile.ZipFile(path / file) as whole:
                broken = whole.testzip()
            if broken:
                raise zipfile.BadZipFile(f"{broken} in {file} is not what was written")
            part = torch.load(path / file, map_location="cpu", weights_only=True, mmap=True)
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            return dict(part), meta | {"checkpoint": name}
        except Exception as error:
            raise PriorZeroError(
                f"checkpoint {path} is damaged ({type(error).__name__}: {error}). Other "
                f"checkpoints here: {self._others(name)}"
            ) from error

    def _read(
        self, name: str, map_location: str
    ) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, Any]]:
        """Raises _Damaged."""
        path = self._folder / name
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
            raise _Damaged(f"{path} is damaged ({type(error).__name__}: {error})") from error
        return state, llm, meta | {"checkpoint": name}

    def _error(self, damage: object, *names: str) -> PriorZeroError:
        return PriorZeroError(
            f"checkpoint {damage}. It was left as it is. Other checkpoints here: "
            f"{self._others(*names)}; name one with --checkpoint, or start anew without "
            "--resume"
        )

    def _names(self) -> list[str]:
        """Whole checkpoints."""
        if not self._folder.is_dir():
            return []
        folders = sorted(p.name for p in self._folder.iterdir() if p.is_dir())
        return [name for name in folders if not name.startswith(_TEMPORARY)]

    def _others(self, *names: str) -> str:
        """Whole checkpoints of other names, in words."""
        return ", ".join(n for n in self._names() if n not in names) or "none"


class _Damaged(Exception):
    """A checkpoint cannot be read; the text begins with its path."""


def _write_tensors(state: dict[str, Any], path: Path) -> None:
    """`torch.save`, with an OSError where the disk does not take the file."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        # torch's own writer says no more than that a write failed.
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(
            f"{path.name} could not be written ({str(error).splitlines()[0]}; {free:.0f} MiB are "
            "free)"
        ) from error


def _tensors(tree: Any) -> Any:
    """Arrays as tensors: the restricted loader knows no numpy."""
    if isinstance(tree, dict):
        return {name: _tensors(value) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_tensors(value) for value in tree]
    # A copy, where numpy says that the array must not be written to.
    return (
        torch.from_numpy(np.require(tree, requirements="W"))
        if isinstance(tree, np.ndarray)
        else tree
    )
