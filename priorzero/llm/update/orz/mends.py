"""What makes Open-Reasoner-Zero's newest snapshot (June 2025) import and run on packages of today.

ORZ was written for ray 2.40, torch 2.5, transformers 4.48 and vllm 0.6.5. Each mend is one function
here, with the versions that need it; it looks for the fault itself, so that nothing is mended
where nothing is broken. They are applied where ORZ is imported, by `orz_imported`, in the run's
process and in every Ray worker, and nowhere else; the last five by the worker itself
(`actors.py`). No file of ORZ is changed.

| mend | needed by | what is missing there |
| --- | --- | --- |
| `scheduling_strategy` | ray >= 2.58 | a class that ray.util.placement_group exported |
| `shutdown_backend` | torch >= 2.13 | torch.distributed's `_shutdown_backend`, which ORZ imports |
| `flash_attention` | no flash-attn | imported even where it is switched off |
| `engine_module` | every vllm but 0.6 | the V0 engine; our own engines answer instead |
| `no_cuda` | a machine without CUDA | `torch.cuda.current_device` and two more |
| `separate_samples` | transformers >= 4.48 | attention that reads the samples' numbers in a mask |
| `float32_logits` | transformers >= 4.45 | logits in float32 from a model in bfloat16 |
| `torch_adam` | a machine without CUDA's or a C++ compiler | an optimiser that need not be built |
| `accumulate` | deepspeed 0.19 | gradients of all packs of a step but the last, with ZeRO 2 |
| `link_moments` | deepspeed 0.19 | the moments of ORZ's second group of weights |
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from priorzero.orz import find_source
from priorzero.types import PriorZeroError

ACCELERATOR = "DS_ACCELERATOR"  # what DeepSpeed asks the environment for
ENGINE_MODULE = "orz.exp_engine.accelerators.inference.vllm_engine"


@contextlib.contextmanager
def orz_imported() -> Iterator[list[str]]:
    """Inside, ORZ can be imported and its objects can be made; yields the names of the mends.

    What other packages could mistake for the real thing (flash_attn, a device on a machine without
    CUDA) is taken away behind it; what ORZ goes on using stays.

    Raises:
        PriorZeroError: its source is not there.
    """
    folder, reason = find_source()
    if folder is None:
        raise PriorZeroError(
            f"Open-Reasoner-Zero is not found ({reason}): clone it and let ORZ_HOME name the folder"
        )
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

    applied = [mend.__name__ for mend in (scheduling_strategy, shutdown_backend) if mend()]
    applied += [engine_module.__name__] if engine_module() else []
    with contextlib.ExitStack() as stack:
        for passing in (flash_attention, no_cuda):
            if stack.enter_context(passing()):
                applied.append(passing.__name__)
        yield applied


def scheduling_strategy() -> bool:
    """ray >= 2.58: `PlacementGroupSchedulingStrategy` is imported from ray.util.placement_group,
    which exports it no more.
    """
    import ray.util.placement_group  # noqa: F401 (ray.util has a function of the same name)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    module = sys.modules["ray.util.placement_group"]
    return _give(module, "PlacementGroupSchedulingStrategy", PlacementGroupSchedulingStrategy)


def shutdown_backend() -> bool:
    """torch >= 2.13: torch.distributed has no `_shutdown_backend`, which ORZ imports for a function
    that is never called here.
    """

    def gone(group) -> None:
        raise NotImplementedError("torch has no _shutdown_backend any more")

    return _give(torch.distributed.distributed_c10d, "_shutdown_backend", gone)


def engine_module() -> bool:
    """Every vllm but 0.6: ORZ's vLLM worker is written for the V0 engine of that time. Our engines
    answer in play, and get the weights from us, so that none of ORZ's is ever made.
    """
    if ENGINE_MODULE in sys.modules:
        return False

    class LLMActor:
        def __init__(self, *args, **kwargs) -> None:
            raise NotImplementedError("PriorZero's own engines answer, none of ORZ's is made")

    module = _module(ENGINE_MODULE)
    module.LLMActor = LLMActor
    sys.modules[ENGINE_MODULE] = module
    return True


@contextlib.contextmanager
def flash_attention() -> Iterator[bool]:
    """Without flash-attn: ORZ imports a function of it for ring attention, which is not used."""
    if importlib.util.find_spec("flash_attn") is not None:
        yield False
        return
    names = ("flash_attn", "flash_attn.utils", "flash_attn.utils.distributed")
    modules = {name: _module(name) for name in names}
    modules[names[-1]].all_gather = None
    sys.modules.update(modules)
    try:
        yield True
    finally:
        for name in names:
            del sys.modules[name]


@contextlib.contextmanager
def no_cuda() -> Iterator[bool]:
    """A machine without CUDA: ORZ asks for the current CUDA device and moves tensors there."""
    if torch.cuda.is_available():
        yield False
        return
    before = {name: getattr(torch.cuda, name) for name in _CUDA_ON_CPU}
    no_cuda_for_good()
    try:
        yield True
    finally:
        _replace(torch.cuda, before)


def no_cuda_for_good() -> None:
    """`no_cuda` for the rest of this process: a Ray worker that trains on the CPU, where there is
    no GPU or where DeepSpeed is told to leave it alone.
    """
    if os.environ.get(ACCELERATOR) == "cpu" or not torch.cuda.is_available():
        _replace(torch.cuda, _CUDA_ON_CPU)


def separate_samples(model: torch.nn.Module, flash: bool) -> None:
    """transformers >= 4.48: several samples in one row see each other, silently. ORZ passes a mask
    whose numbers count the samples, and attention takes every number but 0 for "look here".
    Without a mask transformers finds the samples by their positions, which ORZ starts anew.

    Args:
        model: Hugging Face causal LM inside ORZ's actor.
        flash: FlashAttention is used; otherwise torch's own attention takes the place of ORZ's
            `eager`, which keeps a number for every pair of tokens.
    """

    def without_mask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": None}

    model.register_forward_pre_hook(without_mask, with_kwargs=True)
    if not flash:
        model.set_attn_implementation("sdpa")


def float32_logits(model: torch.nn.Module) -> None:
    """transformers >= 4.45: a model in bfloat16 gives its logits in bfloat16, and ORZ takes their
    log-softmax as it gets them. Near -8, two log-probabilities then differ by 1/32 or not at all,
    and so does PPO's ratio.

    Args:
        model: Hugging Face causal LM inside ORZ's actor.
    """

    def in_float32(module, args, output):
        output.logits = output.logits.float()
        return output

    model.register_forward_hook(in_float32)


def torch_adam() -> None:
    """Every deepspeed: its own AdamW is built at the first use, for GPUs by nvcc, for CPUs by g++.
    torch's, which is fused too, takes the same steps. With `adam_offload` DeepSpeed's stays.
    """
    from orz.ppo import openrlhf_deepspeed

    openrlhf_deepspeed.FusedAdam = functools.partial(torch.optim.AdamW, fused=True)


def accumulate(engine, last: bool) -> None:
    """deepspeed 0.19 with ZeRO 2: of the packs of a step only the last one's gradient counts. ORZ
    tells DeepSpeed that every pack is a step's last, and takes the step when it likes.

    Args:
        engine: DeepSpeed's.
        last: whether the next pack is the step's last.
    """
    engine.set_gradient_accumulation_boundary(last)


def link_moments(optimizer) -> None:
    """deepspeed 0.19 with ZeRO 2: it notes where each weight's moments are behind the first step of
    the first group of weights, before those of ORZ's second group exist.

    Args:
        optimizer: DeepSpeed's, after a step.
    """
    if getattr(optimizer, "_hp_optimizer_states_linked", False):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


class _CPU(str):
    """A device that torch takes for the CPU, and that stands for the number 0 in a name."""

    def __format__(self, spec: str) -> str:
        return "0"


_CUDA_ON_CPU: dict[str, Callable] = {
    "current_device": lambda: _CPU("cpu"),
    "set_device": lambda device: None,
    "synchronize": lambda device=None: None,
}


def _replace(module, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        setattr(module, name, value)


def _give(module, name: str, value) -> bool:
    """Add what a module lacks; returns whether it lacked it."""
    if hasattr(module, name):
        return False
    setattr(module, name, value)
    return True


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    # transformers asks for the specification of every optional package.
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    return module
