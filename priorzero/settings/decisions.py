"""Settings of the recording of decisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, in_unit_interval, positive


@dataclass(kw_only=True)
class DecisionSettings(Settings):
    """Which decisions are written to `decisions/` in the run's folder (docs/DECISIONS.md)."""

    evaluation: bool = True
    """Record every evaluation episode."""
    collect_share: float = 0.02
    """Share of the training episodes that are recorded, evenly spread over them."""
    trees: bool = True
    """With the tree of every search."""
    prompts: bool = True
    """With the LLM's prompts and chains of thought as text."""
    max_mib: int = 1024
    """MiB on disk after which nothing further is recorded."""

    page: bool = False
    """At the end of the run, write what `python -m priorzero.view` shows to `decisions.html` in its
    folder. It is made of all records at once, in memory."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from in_unit_interval(self, "collect_share")
        yield from positive(self, "max_mib")
