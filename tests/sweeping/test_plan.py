"""From a sweep's file to command lines and their order; what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from priorzero.settings.sweep import SweepResources, SweepSettings
from priorzero.sweeping import budget
from priorzero.sweeping.plan import (
    check_commands,
    child_environment,
    planned_runs,
    read_sweep,
    sweep_from,
)
from priorzero.types import PriorZeroError

FILE = """
games = ["tw-simple", "games/zork1.z5"]
seeds = [3, 5]
arguments = "--iterations 2 --set 'eval.modes=[\\"world_model\\"]'"
[variants]
gumbel = ["--set", "policy.root_policy=gumbel", "--no-llm"]
puct = "--no-llm"
[limits]
minutes = 2
"""


def write(tmp_path: Path, text: str, name: str = "sweep.toml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


# ---- order and command lines ---------------------------------------------------------------------


def test_runs_go_seed_by_seed(tmp_path):
    runs = planned_runs(read_sweep(write(tmp_path, FILE)))
    assert [run.name for run in runs] == [
        f"{game}_{variant}_seed{seed}"
        for seed in (3, 5)
        for game in ("tw-simple", "zork1")
        for variant in ("gumbel", "puct")
    ]


def test_a_command_line_is_read_by_the_main_job_as_the_file_means_it(tmp_path):
    import priorzero_orz_entry

    runs = planned_runs(read_sweep(write(tmp_path, FILE)))
    command = runs[2].command("/somewhere/else", resume=True)
    assert command[:2] == ["-m", "priorzero_orz_entry"]
    parsed = priorzero_orz_entry.parse_arguments(command[2:])
    config = priorzero_orz_entry.config_from(parsed, debug_mode=False)
    settings = config.priorzero_cfg
    assert (settings.env.env_id, settings.seed) == ("games/zork1.z5", 3)
    assert settings.policy.root_policy == "gumbel" and settings.eval.modes == ["world_model"]
    assert config.iterations == 2 and config.resume and settings.exp_name == "/somewhere/else"
    assert "--resume" not in runs[2].command("/somewhere/else")


def test_json_is_read_too(tmp_path):
    values = {"games": ["tw-coin"], "seeds": [1], "variants": {"a": ["--no-llm"]}}
    settings = read_sweep(write(tmp_path, json.dumps(values), "sweep.json"))
    (run,) = planned_runs(settings)
    assert run.arguments == ("--env-id", "tw-coin", "--seed", "1", "--no-llm")
    assert settings.keep == SweepSettings().keep and settings.limits.minutes == 0


def test_debug_mode_of_the_environment_does_not_reach_a_run(monkeypatch):
    monkeypatch.setenv("DEBUG_MODE", "True")
    monkeypatch.setenv("PRIORZERO_GAMES", "/stories")
    environment = child_environment(threads=3)
    assert "DEBUG_MODE" not in environment
    assert environment["OMP_NUM_THREADS"] == "3" and environment["PRIORZERO_GAMES"] == "/stories"


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("games = [", "cannot be read"),
        ("game = ['tw-simple']", "did you mean games"),
        ("seeds = []", "at least one"),
        ("seeds = [1, 1]", "none twice"),
        ("seeds = ['1']", "'seeds' is"),
        ("[limits]\nminutes = -1", "limits.minutes is -1"),
        ("[resources]\nthreads = 0", "resources.threads is 0"),
        ("arguments = '--seed 4'", "--seed is what the sweep itself decides"),
        ("arguments = '--exp-name=mine'", "--exp-name=mine is what the sweep"),
        ("[variants]\na = '--set env.env_id=tw-coin'", "env.env_id=tw-coin is what the sweep"),
        ("[variants]\na = '--set=seed=4'", "--set=seed=4 is what the sweep"),
        ("[variants]\na = 3", "a text or a list of texts"),
        ("[variants]\n'a/b' = ''", "letters, digits"),
        ('[variants]\na = "--set \'x"', "No closing quotation"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    with pytest.raises(PriorZeroError, match=message) as error:
        read_sweep(write(tmp_path, text))
    assert "sweep.toml" in str(error.value)


def test_games_that_would_share_a_folder_are_refused():
    settings = sweep_from({"games": ["a/zork1.z5", "b/zork1.z5"]}, "file")
    with pytest.raises(PriorZeroError, match="zork1_default_seed0, zork1_default_seed1"):
        planned_runs(settings)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--no-llm --set policy.num_simulation=3", "did you mean num_simulations"),
        ("--no-llm --iteration-s 3", "unrecognized arguments"),
    ],
)
def test_the_main_job_reads_every_command_line_first(line, message):
    good = {"games": ["tw-simple"], "seeds": [0], "variants": {"good": "--no-llm"}}
    check_commands(planned_runs(sweep_from(good, "file")))
    runs = planned_runs(sweep_from(good | {"variants": {"good": "--no-llm", "bad": line}}, "file"))
    with pytest.raises(PriorZeroError, match=f"(?s){message}.*|bad_seed0"):
        check_commands(runs)


# ---- budget --------------------------------------------------------------------------------------


def test_jobs_by_cores():
    assert budget.jobs_at_a_time(SweepResources(), cores=7) == 7
    assert budget.jobs_at_a_time(SweepResources(threads=2), cores=7) == 3
    assert budget.jobs_at_a_time(SweepResources(threads=9), cores=7) == 1
    assert budget.jobs_at_a_time(SweepResources(jobs=5, threads=2), cores=2) == 5
    with pytest.raises(PriorZeroError, match="no run would ever start"):
        budget.jobs_at_a_time(SweepResources(memory_gb=1e6), cores=2)


def test_memory_that_running_ones_are_still_to_take_is_not_given_away():
    enough = budget.has_memory_for_one_more
    assert enough(4, held=[], free=4) and not enough(4, held=[], free=3.9)
    # The first holds 1 of its 4, so 3 of the 7 free ones are spoken for.
    assert enough(4, held=[1], free=7) and not enough(4, held=[1], free=6.9)
    assert enough(4, held=[5, 4], free=4)  # what exceeds its share is no debt of others
    assert enough(0, held=[0, 0], free=0)


def test_memory_of_a_process_and_its_children_is_seen():
    import os
    import subprocess
    import sys

    # 200 MiB in a child of the child.
    hold = "import sys; x = bytearray(200 * 2**20); print(1, flush=True); sys.stdin.read()"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:
        process.stdout.readline()
        held = budget.held_memory_gb(process.pid)
        process.stdin.close()
    assert 200 / 1024 < held < 400 / 1024
    assert 0 < budget.free_memory_gb() < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


# ---- the manual ----------------------------------------------------------------------------------


def test_the_manual_has_a_sweep_that_can_be_run(tmp_path):
    manual = (Path(__file__).resolve().parents[2] / "PRIORZERO_ORZ_EXECUTABLE.md").read_text()
    text = manual.split("## Sweeps")[1].split("```toml\n")[1].split("```")[0]
    runs = planned_runs(read_sweep(write(tmp_path, text)))
    assert len(runs) == 2 * 3 * 3
    check_commands(runs)


def test_a_run_of_several_games_is_one_entry_with_commas():
    games = ["tw-simple,tw-coin:level=3,seed=2", "tw-simple"]
    runs = planned_runs(sweep_from({"games": games, "seeds": [0]}, "file"))
    assert [run.name for run in runs] == [
        "tw-simple-and-tw-coin-level-3-seed-2_default_seed0",
        "tw-simple_default_seed0",
    ]
    check_commands(runs)
