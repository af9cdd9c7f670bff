"""Settings of the sentence encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, not_negative


@dataclass(kw_only=True)
class TextSettings(Settings):
    """How texts become vectors."""

    encoder: str = "auto"
    """Frozen sentence encoder: auto (embedded all-MiniLM-L6-v2), a hub name such as
    BAAI/bge-base-en-v1.5, a folder."""
    cache_mib: int = 256
    """MiB of embeddings kept in memory."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "cache_mib")
