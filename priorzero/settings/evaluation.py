"""Settings of the evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.record import Rule, Settings, not_negative

MODES = ("world_model", "world_model_llm", "llm", "random")
LLM_MODES = ("world_model_llm", "llm")


@dataclass(kw_only=True)
class EvalSettings(Settings):
    """Which players are compared, and how they choose."""

    modes: list[str] = field(default_factory=lambda: ["world_model", "world_model_llm", "llm"])
    """world_model: search without the LLM; world_model_llm: search with its prior; llm: its
    favourite action, no search; random: a uniformly drawn valid action."""
    temperature: float = 0.0
    """0: the most visited action. Above: drawn from visit counts ** (1 / temperature), which leaves
    the loops a greedy player never leaves in a deterministic game, and gives episodes a spread."""
    transcripts: bool = True
    """Write every evaluation episode as readable text."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "temperature")
        yield Rule(
            "modes",
            bool(self.modes) and set(self.modes) <= set(MODES),
            f"they must be among {', '.join(MODES)}, at least one",
        )


def judging_mode(modes: list[str]) -> str:
    """Whose mean return tells which checkpoint is best: the mode with both, else the first."""
    return "world_model_llm" if "world_model_llm" in modes else modes[0]
