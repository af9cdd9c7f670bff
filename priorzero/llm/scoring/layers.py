"""What scoring asks of a model's layers: windows, number formats, running some of them only, or
for some tokens only,
computing them a second time instead of keeping what they gave, whether their weights have changed,
and whether memory ran out in them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from priorzero.llm.module import base_model


def sliding_window(config) -> int | None:
    """Tokens a layer looks back on; None where every layer looks back on all."""
    types = getattr(config, "layer_types", None)  # Mistral names none: all its layers slide
    slides = "sliding_attention" in types if types else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if slides else None


def multiplying_dtype(causal_lm: torch.nn.Module, device: torch.device) -> torch.dtype:
    """The dtype attention computes in at this moment: autocast's, or the weights' own."""
    return (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else causal_lm.dtype
    )


@contextlib.contextmanager
def only_layers(decoder: torch.nn.Module, first: int, last: int):
    """Let a decoder run its layers from `first` to before `last` only, for a while.

    The final norm follows the last layer only; before it the hidden states come out as the next
    layer takes them.
    """
    layers, norm = decoder.layers, decoder.norm
    decoder.layers = layers[first:last]
    if last < len(layers):
        decoder.norm = torch.nn.Identity()
    try:
        yield
    finally:
        decoder.layers, decoder.norm = layers, norm


@contextlib.contextmanager
def last_product(decoder: torch.nn.Module, rows: torch.Tensor) -> Iterator[None]:
    """Let the feed-forward part of the last layer run for the tokens `rows` [R] of `[1, tokens, D]`
    only, for a while: nobody attends to what it gives. The other tokens get zeros from it.
    """
    network = getattr(decoder.layers[-1], "mlp", None)
    if network is None:  # a layer that is built otherwise runs as a whole
        yield
        return
    whole, own = network.forward, network.__dict__.get("forward")  # usually the class's, so nothing

    def some(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        asked = whole(hidden[:, rows], *args, **kwargs)
        result = asked.new_zeros(*hidden.shape[:-1], asked.shape[-1])
        return result.index_copy(1, rows, asked)

    network.forward = some
    try:
        yield
    finally:
        if own is None:
            del network.forward
        else:
            network.forward = own


def checkpointable_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of a model that transformers itself would checkpoint; empty for a foreign one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = base_model(model).get_decoder()
    return [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]


@contextlib.contextmanager
def checkpointed_layers(model: torch.nn.Module) -> Iterator[None]:
    """Gradient checkpointing (arXiv:1604.06174) of every layer's forward, for a while.

    transformers' own switch acts in training mode only, which has dropout, and takes the attention
    for granted that is set when the backward comes. Only for forwards without a cache of keys and
    values: computing a layer again would add to it again.
    """
    layers = checkpointable_layers(model)
    before = [layer.__dict__.get("forward") for layer in layers]  # usually the class's, so nothing
    config = base_model(model).get_decoder().config
    for layer in layers:
        layer.forward = partial(run_checkpointed, layer.forward, config)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            if own is None:
                del layer.forward
            else:
                layer.forward = own


def run_checkpointed(function: Callable, config, *args, **kwargs) -> Any:
    """`function(*args, **kwargs)`, of which the backward computes again what it needs.

    The backward runs when all contexts of the forward are left, so those that decide how attention
    is computed are entered again. (Autocast's, torch restores itself.)

    Args:
        config: the decoder's, which names its attention.
    """
    if not torch.is_grad_enabled():
        return function(*args, **kwargs)
    attention, kernels = config._attn_implementation, _sdpa_kernels()

    @contextlib.contextmanager
    def again():
        meanwhile, config._attn_implementation = config._attn_implementation, attention
        try:
            with torch.nn.attention.sdpa_kernel(kernels):
                yield
        finally:
            config._attn_implementation = meanwhile

    return checkpoint(
        function,
        *args,
        use_reentrant=False,
        preserve_rng_state=False,  # nothing is drawn: models are in eval mode
        context_fn=lambda: (contextlib.nullcontext(), again()),
        **kwargs,
    )


def _sdpa_kernels() -> list:
    """The attention kernels that are allowed at this moment."""
    from torch.nn.attention import SDPBackend

    allowed = {
        SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled(),
        SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled(),
    }
    return [kernel for kernel, on in allowed.items() if on]


def weights_stamp(weights: Iterable[torch.nn.Parameter]) -> int:
    """A number that changes whenever a weight is written in place (PyTorch's tensor version
    counters).
    """
    return sum(p._version for p in weights)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation ran out of memory, on a GPU or (PyTorch has no class for it) a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "not enough memory" in text
