"""Settings of a sweep: games x seeds x variants of the main job, and what the machine may give."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.record import Rule, Settings, not_negative, positive

OWN_OPTIONS = ("--env-id", "--seed", "--exp-name", "--resume", "--checkpoint", "--eval-only")
_OWN_SETTINGS = ("env.env_id", "seed", "exp_name")


@dataclass(kw_only=True)
class SweepLimits(Settings):
    """How long runs may take. The number of iterations is among their arguments."""

    minutes: float = 0.0
    """Of one run, over all its parts where it was interrupted. Then it saves and counts as done.
    0: no limit."""
    total_minutes: float = 0.0
    """Of the sweep, from its start. Then runs save, and the next start of the sweep goes on with
    them. 0: no limit."""
    grace_seconds: float = 90.0
    """How long a run may take to save when it is asked to end; then it is killed."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "minutes", "total_minutes")
        yield from positive(self, "grace_seconds")


@dataclass(kw_only=True)
class SweepResources(Settings):
    """What the runs may take of the machine."""

    jobs: int = 0
    """Runs at a time. 0: as many as there are cores for."""
    threads: int = 1
    """Threads of a run (OMP_NUM_THREADS)."""
    memory_gb: float = 0.0
    """GiB that a run comes to hold: no further one starts while less is free. 0: memory is not
    looked at."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "jobs", "memory_gb")
        yield from positive(self, "threads")


@dataclass(kw_only=True)
class SweepSettings(Settings):
    """The file that `python -m priorzero.sweep` reads."""

    games: list[str] = field(default_factory=lambda: ["auto"])
    """As --env-id of the main job; one with commas in it is a run of several games."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """As --seed."""
    arguments: str | list[str] = ""
    """Options of the main job for all runs alike, as on its command line."""
    variants: dict = field(default_factory=lambda: {"default": ""})
    """Name -> options of the main job for the runs of this variant, behind `arguments`."""
    keep: list[str] = field(default_factory=lambda: ["eval/*", "perf/seconds_iteration"])
    """Patterns of the metrics that are kept of a run. These two are those that runs are compared
    by; docs/METRICS.md names all."""
    checkpoints: bool = True
    """False: the checkpoints of a run that is done are removed."""
    limits: SweepLimits = field(default_factory=SweepLimits)
    """How long."""
    resources: SweepResources = field(default_factory=SweepResources)
    """How much of the machine."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        for name in ("games", "seeds"):
            values = getattr(self, name)
            text = "it must name at least one, and none twice"
            yield Rule(name, 0 < len(set(values)) == len(values), text)

        lines = all(
            isinstance(line, str)
            or (isinstance(line, list) and all(isinstance(word, str) for word in line))
            for line in self.variants.values()
        )
        text = "each variant's options must be a text or a list of texts, and one variant be there"
        yield Rule("variants", bool(self.variants) and lines, text)
        yield Rule(
            "variants",
            all(_is_file_name(name) for name in self.variants),
            "names may have letters, digits, - and _ (they become names of folders)",
        )
        if not lines:
            return
        for name, line in (("arguments", self.arguments), *self._variant_lines()):
            own = [word for word in words(line) if _is_own(word)]
            yield Rule(
                name, not own, f"{', '.join(own)} is what the sweep itself decides; leave it out"
            )

    def _variant_lines(self) -> Iterator[tuple[str, str | list[str]]]:
        for line in self.variants.values():
            yield "variants", line


def words(line: str | list[str]) -> list[str]:
    """A command line's words; a text is split as a shell does it.

    Raises:
        ValueError: a quotation mark is not closed.
    """
    return shlex.split(line) if isinstance(line, str) else list(line)


def _is_own(word: str) -> bool:
    """Whether an option, or an assignment of --set, is the sweep's to give."""
    assigned = word.removeprefix("--set=").partition("=")[0]
    return word.partition("=")[0] in OWN_OPTIONS or assigned in _OWN_SETTINGS


def _is_file_name(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in "-_" for c in name)
