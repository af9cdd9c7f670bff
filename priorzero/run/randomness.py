"""Random states as plain data: of one generator, and of everything that draws from a global one."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch


def generator_state(generator: np.random.Generator) -> str:
    """Where a generator of ours stands; its integers are too large for anything but text."""
    return json.dumps(generator.bit_generator.state)


def set_generator_state(generator: np.random.Generator, state: str) -> None:
    """Undo `generator_state`."""
    generator.bit_generator.state = json.loads(state)


def global_states() -> dict[str, Any]:
    """Of Python, numpy and torch, with every CUDA device; for `torch.save`."""
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    return {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([name, keys.tolist(), position, has_gauss, gauss]),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_global_states(states: dict[str, Any]) -> None:
    """Undo `global_states`. CUDA's states are left alone where there are other devices now."""
    version, internal, gauss = json.loads(states["python"])
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = json.loads(states["numpy"])
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002

    # torch wants them on the CPU, wherever the checkpoint was loaded to.
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])
