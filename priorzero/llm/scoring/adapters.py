"""Low-rank adapters in two products, for a while.

PEFT casts a layer's input to the adapter's dtype, autocast casts it back, and the adapter's part is
scaled and added in passes of their own. On a small model that is a large part of a layer's time.
Here the same sum, y = x W^T + s (x A^T) B^T, is one product behind W's that goes down to the rank,
and one that adds its result onto y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from weakref import WeakKeyDictionary

import torch

# The wrapped layers of each model: looking through all its modules takes as long as a layer.
_wrapped: WeakKeyDictionary[torch.nn.Module, list[torch.nn.Module]] = WeakKeyDictionary()


@contextlib.contextmanager
def plain_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Inside, PEFT's linear layers with one ordinary active adapter compute as above; all others,
    and those that are merged or switched off, as PEFT has them.

    Autocast is looked at here: enter it first.
    """
    found = [(module, name) for module in _layers(model) if (name := _ordinary(module))]
    for module, name in found:
        module.forward = partial(_adapted, module, name)
    try:
        yield
    finally:
        for module, _ in found:
            del module.forward


def _layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """PEFT's linear layers, known by their attributes: PEFT is not imported for other models."""
    if not _wrapped.get(model):  # a copy of a model gets its adapters later
        _wrapped[model] = [
            module
            for module in model.modules()
            if hasattr(module, "lora_A") and isinstance(module.base_layer, torch.nn.Linear)
        ]
    return _wrapped[model]


def _ordinary(module: torch.nn.Module) -> str | None:
    """Name of the one adapter that acts on a wrapped layer; None where it is otherwise."""
    names = [name for name in module.active_adapters if name in module.lora_A]
    if len(names) != 1 or module.disable_adapters or module.merged or "forward" in vars(module):
        return None

    name = names[0]
    weight, down = module.base_layer.weight, module.lora_A[name].weight
    ordinary = (
        # PEFT casts between two number formats; in the products above only autocast does.
        (weight.dtype == down.dtype or torch.is_autocast_enabled(weight.device.type))
        and name not in module.lora_variant
        and isinstance(module.lora_dropout[name], torch.nn.Identity)
        and module.lora_A[name].bias is None
        and module.lora_B[name].bias is None
    )
    return name if ordinary else None


def _adapted(module: torch.nn.Module, name: str, x: torch.Tensor) -> torch.Tensor:
    """`[..., out]` of `[..., in]`."""
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))  # once for both products
    result = module.base_layer(x)
    low = module.lora_A[name](x)
    total = torch.addmm(
        result.flatten(0, -2),
        low.flatten(0, -2),
        module.lora_B[name].weight.t(),
        alpha=module.scaling[name],
    )
    return total.view_as(result)
