"""What our trainer needs of ORZ, without importing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from priorzero.llm.update.orz.packs import Plan

MOMENTS = ("exp_avg", "exp_avg_sq")  # Adam's, as torch and DeepSpeed call them


class OrzFailure(RuntimeError):
    """A worker died, did not answer in time or could not do what it was asked."""


@dataclass(frozen=True)
class Learnt:
    """What came of a phase.

    Attributes:
        state: `model`, the weights in float32 under their Hugging Face names; `steps` taken by the
            optimiser; and where they were asked for, its `MOMENTS` under the same names.
        status: ORZ's own numbers, means over the packs.
        norms: of the gradients before clipping, one per optimiser step.
        gpu_gb: GiB of its GPU that a worker's tensors took at the most so far; 0 on a CPU.
        kl: from the reference before the phase (k3), mean over the tokens that have one.
    """

    state: dict[str, Any]
    status: dict[str, float]
    norms: list[float]
    gpu_gb: float
    kl: float


class Session(Protocol):
    """ORZ set up. Everything raises `OrzFailure` where it is not done; after that the workers are
    in a state that is not known.
    """

    def learn(self, plan: Plan, moments: bool) -> Learnt:
        """One phase; moments: hand over the optimiser's too."""
        ...

    def gather(self) -> dict[str, Any]:
        """The state (see `Learnt`) with moments, which there are once a step was taken."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a state; without moments they begin at 0."""
        ...

    def close(self) -> None:
        """End the workers and give their room back."""
        ...
