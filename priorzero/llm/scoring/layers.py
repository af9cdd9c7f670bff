"""What scoring asks of a model's layers: windows, number formats, running some of them only,
whether their weights have changed, and whether memory ran out in them.
"""

from __future__ import annotations

import contextlib

import torch


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


def weights_stamp(model: torch.nn.Module) -> int:
    """A number that changes whenever a weight is written in place (PyTorch's tensor version
    counters).
    """
    return sum(p._version for p in model.parameters())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a computation ran out of memory, on a GPU or (PyTorch has no class for it) a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "not enough memory" in text
