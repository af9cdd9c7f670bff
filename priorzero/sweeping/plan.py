"""From a sweep's file to its runs, in the order in which they start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.run.provenance import ROOT
from priorzero.settings.env import run_name, split_games
from priorzero.settings.record import overlay
from priorzero.settings.sweep import SweepSettings, words
from priorzero.types import PriorZeroError

MAIN = "priorzero_orz_entry"
"""The main job's module. It is a root file, which no room imports: it is only ever started."""

# Reads every command line with the main job's own parser and builds its configuration, in seconds
# and without torch; what is wrong goes to stderr as the main job would say it.
_CHECK = f"""
import json, sys
from {MAIN} import PriorZeroError, config_from, parse_arguments
for name, arguments in json.load(sys.stdin):
    try:
        config_from(parse_arguments(arguments), debug_mode=False)
    except (PriorZeroError, SystemExit) as error:
        sys.exit(f"run {{name}}: {{error}}")
"""


@dataclass(frozen=True)
class PlannedRun:
    """One run. `arguments`: its command line, but for its folder and whether it resumes."""

    game: str
    variant: str
    seed: int
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of its folders."""
        games = run_name(split_games(self.game))
        return f"{games}_{self.variant}_seed{self.seed}"

    def command(self, folder: str, resume: bool = False) -> list[str]:
        """The main job's command line behind the interpreter's name.

        Args:
            folder: of the experiment.
            resume: go on from its checkpoint.
        """
        tail = ["--resume"] if resume else []
        return ["-m", MAIN, *self.arguments, "--exp-name", folder, *tail]


def read_sweep(path: Path) -> SweepSettings:
    """A sweep's file, TOML or (where its name ends so) JSON.

    Raises:
        PriorZeroError: it cannot be read, or asks for what is impossible.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError) as error:
        raise PriorZeroError(f"{path} cannot be read: {error}") from error
    return sweep_from(values, str(path))


def sweep_from(values: Any, source: str) -> SweepSettings:
    """The settings in a file's values.

    Args:
        values: what the file holds.
        source: its name, for messages.

    Raises:
        PriorZeroError: names every fault.
    """
    if not isinstance(values, dict):
        raise PriorZeroError(f"{source} must hold names and values, such as games = ['tw-simple']")
    try:
        settings = overlay(SweepSettings(), values)
        settings.validate()
    except (PriorZeroError, ValueError) as error:
        raise PriorZeroError(f"{source}: {error}") from error
    return settings


def planned_runs(settings: SweepSettings) -> list[PlannedRun]:
    """All runs, seed by seed: whenever a sweep is interrupted, its variants have equal seeds, but
    for the last one.

    Raises:
        PriorZeroError: two games would share a folder.
    """
    common = words(settings.arguments)
    runs = [
        PlannedRun(
            game,
            variant,
            seed,
            ("--env-id", game, "--seed", str(seed), *common, *words(line)),
        )
        for seed in settings.seeds
        for game in settings.games
        for variant, line in settings.variants.items()
    ]

    names = [run.name for run in runs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise PriorZeroError(
            f"{', '.join(twice)}: two games would write to one folder; give their files other names"
        )
    return runs


def check_commands(runs: Sequence[PlannedRun]) -> None:
    """Let the main job's own parser read every command line, before any hour is spent.

    Raises:
        PriorZeroError: the first one that it refuses, with its message.
    """
    commands = [(run.name, run.command(run.name)[2:]) for run in runs]
    done = subprocess.run(
        [sys.executable, "-c", _CHECK],
        input=json.dumps(commands),
        env=child_environment(threads=1),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise PriorZeroError(f"the main job refuses a run of this sweep:\n{done.stderr.strip()}")


def child_environment(threads: int) -> dict[str, str]:
    """Environment variables of a run.

    DEBUG_MODE is not handed on, so that a run is what its command line says; the preset debug does
    the same.

    Args:
        threads: of the run.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    ours = {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
    return {k: v for k, v in os.environ.items() if k != "DEBUG_MODE"} | ours
