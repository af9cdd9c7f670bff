"""Which model a checkpoint's weights belong to: adapters mean nothing on another one."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass

import torch

_SAMPLES = 16  # numbers looked at per weight; a fine-tuned model differs in nearly all of them


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is called, what it looks like inside, and a digest of its weights.

    Attributes:
        name: folder or hub name it was loaded from; for messages only, folders move.
        architecture: digest of its type and of its weights' names and shapes.
        weights: digest of a sample of its weights' values, rounded to bfloat16 so that the number
            format it was loaded in does not matter.
    """

    name: str
    architecture: str
    weights: str

    @classmethod
    def of(cls, model: torch.nn.Module) -> ModelIdentity:
        """Identity of a Hugging Face model as it was loaded, before any adapter."""
        shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
        architecture = hashlib.sha256(repr((model.config.model_type, shapes)).encode())

        weights = hashlib.sha256()
        for _, parameter in model.named_parameters():
            flat = parameter.detach().flatten()
            sampled = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to(torch.bfloat16)
            weights.update(sampled.view(torch.int16).cpu().numpy().tobytes())
        return cls(
            model.config.name_or_path or model.config.model_type,
            architecture.hexdigest()[:16],
            weights.hexdigest()[:16],
        )

    def fits(self, other: ModelIdentity, *, adapters: bool) -> bool:
        """Whether weights that were trained from this model may be laid over the other one.

        Args:
            adapters: The weights are adapters, which need the same weights below them; all weights
                replace them and need the same names and shapes only.
        """
        same = self.architecture == other.architecture
        return same and (not adapters or self.weights == other.weights)

    def as_dict(self) -> dict[str, str]:
        """For a checkpoint."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.name} ({self.architecture[:6]}-{self.weights[:6]})"
