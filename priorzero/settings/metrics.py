"""Settings of where a run's numbers are shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from priorzero.settings.record import Rule, Settings, one_of


@dataclass(kw_only=True)
class MetricsSettings(Settings):
    """Places beside TensorBoard and `metrics.jsonl`, which are always written."""

    wandb: str = "off"
    """Weights & Biases. offline: to files in the run's folder, for `wandb sync`; online: to the
    server; auto: as WANDB_MODE says, else online where the user is logged in, else offline."""
    wandb_project: str = "priorzero"
    """The project of W&B that the run belongs to."""
    live: bool = True
    """A live table below the log where this is a terminal; False: a bar."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "wandb", "off", "auto", "offline", "online")
        yield Rule("wandb_project", bool(self.wandb_project.strip()), "it must not be empty")
