"""Optimiser steps that came to nothing, because a number in them was NaN or infinite.

Such a step is skipped: weights and optimiser stay what they were. What it would have learnt from is
written down, so that the fault can be looked at and computed again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from priorzero.llm.update.samples import LLMSample
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

_FILES = 5  # the first ones of a run tell most


class NotFinite(ArithmeticError):
    """A number of a step is NaN or infinite.

    Args:
        what: of the LLM: "loss", "gradient norm", "log-probabilities".
        value: what it became.
        decisions: places in the step's samples it comes from; empty where that is not known.
    """

    def __init__(self, what: str, value: float, decisions: Sequence[int] = ()) -> None:
        super().__init__(f"the LLM's {what} became {value}")
        self.what, self.value, self.decisions = what, value, tuple(decisions)


class BadSteps:
    """Counts skipped steps, keeps their batches, and ends a run that has too many in a row.

    A file is what `torch.load(weights_only=True)` reads: `what`, `value`, `decisions` as in
    `NotFinite`; `objective`, `version` of the weights, `step` (optimiser steps taken before);
    `samples`, the fields of `LLMSample` and its request; `targets`, what the objective prepared.

    Args:
        folder: where the first few are kept; None: nowhere.
        limit: so many in a row end the run.

    Attributes:
        in_a_row: skipped since the last step that was taken.
    """

    def __init__(self, folder: Path | None, limit: int) -> None:
        self._folder, self._limit = folder, limit
        self.in_a_row = 0

    def passed(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def skipped(
        self,
        fault: NotFinite,
        samples: Sequence[LLMSample],
        targets: Sequence[Any],
        **place: str | int,
    ) -> None:
        """A step was not taken.

        Args:
            fault: why.
            samples: those of the step.
            targets: what was prepared of each; empty where it did not come to that.
            place: `objective`, `version`, `step`.

        Raises:
            PriorZeroError: it is one too many in a row.
        """
        self.in_a_row += 1
        kept = self._keep(fault, samples, targets, place)
        if self.in_a_row >= self._limit:
            raise PriorZeroError(
                f"{fault} in {self.in_a_row} training steps in a row (llm.train.max_bad_steps); "
                "lower llm.train.learning_rate and go on from the last checkpoint with --resume. "
                f"{kept}"
            ) from fault
        logger.warning(
            "a training step of the LLM was skipped, because %s; its weights are as before. %s",
            fault,
            kept,
        )

    def _keep(self, fault: NotFinite, samples, targets, place: dict[str, str | int]) -> str:
        """Write the step down; returns where, in words."""
        if self._folder is None:
            return "Its decisions were not written down"
        number = len(list(self._folder.glob("*.pt"))) + 1
        if number > _FILES:
            return f"{self._folder} holds {_FILES} such steps already, so this one is not kept"

        path = self._folder / f"{number}_{place['objective']}.pt"
        making = path.with_suffix(".tmp")
        record = {
            "what": fault.what,
            "value": fault.value,
            "decisions": list(fault.decisions),
            "samples": [_plain(sample) for sample in samples],
            "targets": [_plain(target) for target in targets],
        }
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(record | place, making)
            os.replace(making, path)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch's own writer, disk full
            with contextlib.suppress(OSError):
                making.unlink()
            return f"Its decisions could not be written to {path} ({error})"
        return f"Its decisions are in {path}"


def _plain(value: Any) -> Any:
    """Records of ours as dictionaries; the restricted loader knows no classes."""
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value
