"""How trained weights leave the trainer: tensors, an ordinary checkpoint folder, an adapter folder.

A trainer hands out one `Weights`; engines and exports read from it what they need. Adapters
(LoRA) are merged in float32 only: an update smaller than half a step of bfloat16 would be rounded
away by merging into a 16-bit weight, so 16-bit engines take the adapters unmerged.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from priorzero.llm.module import base_model, sync_head


class Weights:
    """A view of a trainer's live weights; nothing is copied before it is asked for.

    Read it under the trainer's lock: the next update writes the same tensors. A trainer that works
    in another process hands out a subclass, whose `module` is None.

    Args:
        module: the Hugging Face causal LM that trains, or its PEFT wrapper.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module: torch.nn.Module | None = module

    @property
    def adapter_config(self):
        """PEFT's configuration of the active adapter; None where all weights train."""
        return self._adapter()[1] if self.has_adapter else None

    @property
    def has_adapter(self) -> bool:
        """Whether low-rank adapters train instead of all weights."""
        return bool(getattr(self.module, "peft_config", None))

    @property
    def generation_config(self):
        """How the base model is sampled from; None where it does not say."""
        return getattr(base_model(self.module), "generation_config", None)

    def _adapter(self):
        """Name and configuration of the one active adapter."""
        names = list(self.module.active_adapters)
        assert len(names) == 1, f"one adapter trains at a time, active are {names}"
        return names[0], self.module.peft_config[names[0]]

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All weights under their Hugging Face names, adapters merged in float32.

        A tied output head is left out, as in a published checkpoint.

        Args:
            dtype: of floating-point tensors; None: as they are (merged ones float32).

        Returns:
            tensors that may share memory with the live ones.
        """
        inner = base_model(self.module)
        tied = bool(getattr(inner.config, "tie_word_embeddings", False))
        deltas = _lora_deltas(inner)

        weights: dict[str, torch.Tensor] = {}
        for key, tensor in inner.state_dict().items():
            if ".lora_" in key or (tied and key == "lm_head.weight"):
                continue
            name, value = key.replace(".base_layer.", "."), tensor.detach()
            if name in deltas:
                # The frozen weight may be kept in bfloat16, which is too coarse to add in.
                value = value.float() + deltas[name].float()
            cast = dtype is not None and value.is_floating_point()
            weights[name] = value.to(dtype) if cast else value
        return weights

    def adapter_tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor] | None:
        """The active adapter's tensors under PEFT's names; None where all weights train."""
        if not self.has_adapter:
            return None
        from peft import get_peft_model_state_dict

        # PEFT's own save_pretrained would look up the base model's vocabulary, on the hub if need
        # be.
        tensors = get_peft_model_state_dict(
            self.module, adapter_name=self._adapter()[0], save_embedding_layers=False
        )
        return {
            k: t.detach() if dtype is None else t.detach().to(dtype) for k, t in tensors.items()
        }

    def copy_into(self, model: torch.nn.Module, *, merge: bool) -> int:
        """Let another copy of the same base model answer with these weights, in place.

        Args:
            model: a causal LM of the same architecture; with `merge=False` its own weights must be
                those the adapters were trained on, and it gets adapters of its own on first use.
            merge: copy all weights, adapters merged. Right for a copy that multiplies in float32;
                a 16-bit copy would lose a part of small updates. Without adapters always so.

        Returns:
            bytes written.

        Raises:
            ValueError: the copy lacks weights of these names or shapes.
        """
        inner = base_model(model)
        if self.has_adapter and not merge:
            _ensure_adapter(inner, self._adapter()[1])
            weights = {k: p for k, p in base_model(self.module).named_parameters() if ".lora_" in k}
        else:
            weights = self.tensors()

        own = inner.state_dict()
        odd = [k for k, v in weights.items() if k not in own or own[k].shape != v.shape]
        if odd:
            raise ValueError(f"the copy lacks weights of these names or shapes: {odd[:3]}")
        moved = 0
        with torch.no_grad():
            for key, value in weights.items():
                own[key].copy_(value)
                moved += value.numel() * own[key].element_size()
        sync_head(inner)
        return moved

    def save(self, folder: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
        """Write weights and configuration as an ordinary checkpoint, adapters merged in float32.

        Args:
            folder: must not exist; it appears by rename, when it is complete.
            dtype: see `tensors`.

        Returns:
            bytes and number of tensors.
        """
        from safetensors.torch import save_file

        weights = {k: v.contiguous().cpu() for k, v in self.tensors(dtype).items()}
        making = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
        making.mkdir(parents=True)
        save_file(weights, making / "model.safetensors", metadata={"format": "pt"})
        base_model(self.module).config.save_pretrained(making)
        os.rename(making, folder)
        return _num_bytes(weights), len(weights)

    def save_adapter(self, folder: Path, dtype: torch.dtype | None = None) -> tuple[int, int]:
        """Write the active adapter in PEFT's format.

        Args:
            folder: must not exist.
            dtype: see `tensors`.

        Returns:
            bytes and number of adapted modules.
        """
        from safetensors.torch import save_file

        tensors = self.adapter_tensors(dtype)
        assert tensors is not None, "all weights train, there is no adapter"
        tensors = {k: t.cpu().contiguous() for k, t in tensors.items()}
        folder.mkdir(parents=True)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        self.adapter_config.save_pretrained(folder)
        modules = sum(".lora_A." in k or k.endswith(".lora_embedding_A") for k in tensors)
        return _num_bytes(tensors), modules


def _num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _lora_deltas(inner: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the active adapters add to each weight they stand on, by the weight's name."""
    deltas: dict[str, torch.Tensor] = {}
    for name, module in inner.named_modules():
        if not (hasattr(module, "get_delta_weight") and hasattr(module, "active_adapters")):
            continue
        with torch.no_grad():
            parts = [
                module.get_delta_weight(a) for a in module.active_adapters if a in module.lora_A
            ]
        if parts:
            deltas[f"{name}.weight"] = torch.stack(parts).sum(0)
    return deltas


def _ensure_adapter(inner: torch.nn.Module, config) -> None:
    """Put adapters of this configuration on a plain model, unless it has them.

    PEFT gives them the dtype of the layers they stand on, which is what those multiply in: the
    numbers are those of float32 adapters under autocast, and a model that is 16-bit throughout is
    asked without autocast.
    """
    if any(".lora_" in name for name, _ in inner.named_parameters()):
        return
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, inner)
    inner.requires_grad_(False).eval()
