"""Settings of the recording of decisions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, in_unit_interval, not_negative, positive


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

    page: bool = True
    """At the end of the run, write what `python -m priorzero.view` shows to `decisions.html` in its
    folder."""
    page_mib: int = 16
    """MiB of records, as on disk, above which the page is not written by itself: it is made of all
    of them at once, which take many times as much memory. 0: only where nothing is recorded."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from in_unit_interval(self, "collect_share")
        yield from positive(self, "max_mib")
        yield from not_negative(self, "page_mib")
