"""What the documents say exists: options, files, settings, environment variables, error messages,
and every metric.
"""

from __future__ import annotations

import ast
import contextlib
import fnmatch
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README, MANUAL, METRICS, ALGORITHM, DECISIONS, GAMES = (
    ROOT / name
    for name in (
        "README.md",
        "PRIORZERO_ORZ_EXECUTABLE.md",
        "docs/METRICS.md",
        "docs/ALGORITHM.md",
        "docs/DECISIONS.md",
        "docs/GAMES.md",
    )
)
ORZ, TORCHRUN = ROOT / "docs" / "ORZ.md", ROOT / "docs" / "TORCHRUN.md"
COLLECTORS = ROOT / "docs" / "COLLECTORS.md"
DOCUMENTS = [README, MANUAL, METRICS, ALGORITHM, DECISIONS, GAMES, ORZ, COLLECTORS, TORCHRUN]
SOURCES = [*ROOT.glob("*.py"), *(ROOT / "priorzero").rglob("*.py"), ROOT / "run_priorzero_orz.sh"]
LAUNCHER_OPTIONS = {"--help"}
# TensorBoard's, Ray's, pip's, torchrun's.
OTHERS_OPTIONS = {
    "--logdir",
    "--head",
    "--address",
    "--num-cpus",
    "--num-gpus",
    "--no-deps",
    "--no-build-isolation",
    "--standalone",
    "--nproc-per-node",
    "--nnodes",
    "--rdzv-endpoint",
}


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def help_of(module: str) -> str:
    """What `python -m module --help` says."""
    parse = importlib.import_module(module).parse_arguments
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        parse(["--help"])
    return out.getvalue()


def options_in(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text))


def commands() -> list[list[str]]:
    """Every command in a bash block, comments cut off, without leading assignments."""
    found = []
    for document in DOCUMENTS:
        for block in re.findall(r"```bash\n(.*?)```", text_of(document), re.S):
            for line in block.splitlines():
                words = shlex.split(line, comments=True)
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words:
                    found.append(words)
    return found


def documented_metrics() -> set[str]:
    names = re.findall(r"`((?:collect|prior|wm|llm|eval|perf)/[\w*/]+)`", text_of(METRICS))
    assert len(names) > 80
    return set(names)


def test_commands_exist_and_their_options_are_accepted():
    seen = set()
    for words in commands():
        if words[0] == "./run_priorzero_orz.sh":
            assert words[1] in re.findall(
                r"^  ([\w-]+)(?: |$)", text_of(ROOT / "run_priorzero_orz.sh"), re.M
            ), words
            writes = {
                "export": "priorzero.export",
                "export-samples": "priorzero.export_samples",
                "warmup": "priorzero.warmup.__main__",
            }
            module = writes.get(words[1], "priorzero_orz_entry")
            rest = words[2:] if words[1] in ("debug", "train", "eval", *writes) else []
        elif words[:2] == [".venv/bin/python", "-m"]:
            module, rest = words[2], words[3:]
            if importlib.util.find_spec(module).submodule_search_locations:
                module += ".__main__"  # a package that is a command too
        elif words[0] == ".venv/bin/torchrun":
            at = words.index("-m")
            module, rest = words[at + 1], words[at + 2 :]
        else:
            assert words[0] == ".venv/bin/tensorboard", words
            continue
        seen.add(words[1])
        assert importlib.util.find_spec(module), module
        if rest and "--help" not in rest:
            importlib.import_module(module).parse_arguments(
                rest
            )  # SystemExit names what it does not know
    assert {"debug", "train", "eval", "export", "test", "check"} <= seen


def test_commands_ask_for_possible_settings():
    from priorzero_orz_entry import config_from, parse_arguments

    checked = 0
    for words in commands():
        if (
            words[0] == "./run_priorzero_orz.sh"
            and words[1] in ("debug", "train", "eval")
            and "--help" not in words
        ):
            config_from(parse_arguments(words[2:]), debug_mode=words[1] == "debug")
            checked += 1
    assert checked >= 8


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_options_exist(document):
    known = options_in(help_of("priorzero_orz_entry")) | options_in(
        help_of("benchmarks.learning_check")
    )
    known |= options_in(help_of("priorzero.prior_report"))
    known |= options_in(help_of("priorzero.export"))
    known |= options_in(help_of("priorzero.export_samples"))
    known |= options_in(help_of("priorzero.export_orz"))
    known |= options_in(help_of("priorzero.compare"))
    known |= options_in(help_of("priorzero.sweep"))
    for module in (
        "priorzero.view",
        "priorzero.replan",
        "priorzero.play.__main__",
        "priorzero.warmup.__main__",
    ):
        known |= options_in(help_of(module))
    known |= LAUNCHER_OPTIONS | OTHERS_OPTIONS
    assert options_in(text_of(document)) <= known


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_settings_exist(document):
    from priorzero.settings.experiment import ExperimentSettings

    defaults = ExperimentSettings().as_dict()
    named = set(
        re.findall(
            r"`((?:env|policy|text|llm|eval|decisions|metrics|collectors)(?:\.[a-z_]+)+)`",
            text_of(document),
        )
    )
    for name in named - {"llm.pt", "metrics.jsonl", "decisions.html"}:
        place = defaults
        for part in name.split("."):
            assert part in place, f"{document.name}: {name}"
            place = place[part]


def test_every_preset_and_mode_is_in_the_manual():
    from priorzero_config import PRESETS
    from priorzero_evaluator import MODES

    for name in (*PRESETS, *MODES):
        assert f"`{name}`" in text_of(MANUAL) or f"--preset {name}`" in text_of(MANUAL), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_environment_variables_exist(document):
    code = "\n".join(text_of(p) for p in SOURCES)
    named = set(re.findall(r"\b((?:PRIORZERO|HF)_[A-Z_]+|DEBUG_MODE)\b", text_of(document))) - {
        "PRIORZERO_ORZ_EXECUTABLE"
    }
    for name in named:
        assert name in code, name


def test_every_environment_variable_of_ours_is_in_the_manual():
    code = "\n".join(text_of(p) for p in SOURCES)
    ours = {
        n
        for n in re.findall(r"\bPRIORZERO_[A-Z_]+\b", code)
        if not n.startswith("PRIORZERO_TRAINER")
    }
    assert ours and {n for n in ours if f"`{n}`" not in text_of(MANUAL)} == set()


def test_paths_exist():
    for document in DOCUMENTS:
        links = re.findall(r"\]\(([^)#:]+)\)", text_of(document))
        assert [link for link in links if not (document.parent / link).exists()] == []
    tree = text_of(README).split("## What is where")[1].split("```")[1]
    named = re.findall(r"^( *)([\w./]+(?:/|\.py|\.sh))\s", tree, re.M)
    paths = [("priorzero/" if indent else "") + name for indent, name in named]
    assert len(paths) >= 18 and [p for p in paths if not (ROOT / p).exists()] == []
    assert {p.name for p in ROOT.glob("*.py")} <= set(paths), "a root file is missing from the tree"
    packages = {f"priorzero/{p.parent.name}/" for p in (ROOT / "priorzero").glob("*/__init__.py")}
    assert packages <= set(paths), "a package is missing from the tree"


def test_messages_in_the_manual_are_those_of_the_code():
    """The fixed parts of each message, in the order shown, lie close together in one file's string
    literals.
    """
    literals = []
    for path in SOURCES:
        if path.suffix == ".py":
            nodes = (
                n
                for n in ast.walk(ast.parse(text_of(path)))
                if isinstance(n, (ast.JoinedStr, ast.Constant))
            )
            literals += [
                "".join(p.value if isinstance(p, ast.Constant) else "\0" for p in n.values)
                if isinstance(n, ast.JoinedStr)
                else str(n.value)
                for n in nodes
            ]
        else:
            literals.append(text_of(path))
    table = text_of(MANUAL).split("## Troubleshooting")[1].split("Out of memory")[0]
    messages = [
        m
        for row in table.splitlines()
        if row.startswith("| `")
        for m in re.findall(r"`([^`]+)`", row.split("|")[1])
    ]
    assert len(messages) > 15
    for message in messages:
        parts = [re.escape(part.strip(" ()")) for part in message.split("…") if part.strip(" ().:")]
        pattern = re.compile(".{0,200}".join(parts), re.S)
        assert any(pattern.search(text) for text in literals), message


def test_readme_python_runs_up_to_the_training(tmp_path):
    """The example as it stands; only the run itself is replaced."""
    code = re.findall(r"```python\n(.*?)```", text_of(README), re.S)[0]
    assert "train_priorzero_orz(config)" in code
    check = code.replace(
        "asyncio.run(train_priorzero_orz(config))", "config.validate() or config.as_dict()"
    )
    script = (
        check
        + "\nassert summary['schedule']['llm_train_freq'] == 20"
        + " and summary['schedule']['iterations'] == 500\n"
        + "assert summary['settings']['policy']['root_prior']['weighting'] == 'adaptive'\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_every_metric_of_a_run_is_explained(tiny_llm, tmp_path):
    settings = dict(
        env=dict(max_steps=4, n_evaluator_episode=1, evaluator_env_num=1),
        policy=dict(
            device="cpu",
            embed_dim=32,
            num_layers=1,
            num_heads=2,
            num_simulations=2,
            batch_size=4,
            game_segment_length=4,
            replay_ratio=0.2,
            reanalyse_ratio=0.5,
        ),
        llm=dict(sft=dict(samples=2), rft=dict(samples=2)),
        eval=dict(modes=["world_model_llm", "random"]),
    )
    assignments = [
        f"--set={g}.{n}={json.dumps(v)}" if not isinstance(v, dict) else f"--set={g}.{n}.samples=2"
        for g, group in settings.items()
        for n, v in group.items()
    ]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "priorzero_orz_entry",
            "--env-id=tw-simple",
            "--exp-name=metrics",
            f"--llm={tiny_llm}",
            "--engine=transformers",
            "--iterations=2",
            "--llm-train-freq=1",
            "--save-freq=1",
            "--rft",
            "--set=llm.lora.last_layers=1",
            "--set=policy.root_policy=puct",  # the other draws by itself, without a schedule
            "--set=policy.annealing.duration=100",
            "--set=policy.restarts.share=1.0",
            "--set=policy.root_prior.temperature=auto",
            "--set=policy.root_prior.calibration.least=1",
            *assignments,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DEBUG_MODE": "True"},
    )
    assert done.returncode == 0, done.stderr
    rows = [
        json.loads(line)
        for line in text_of(tmp_path / "data_priorzero/metrics/log/metrics.jsonl").splitlines()
    ]
    written = {
        f"{r['namespace']}/{name}" for r in rows for name in r if name not in ("namespace", "step")
    }
    assert {name.split("/")[0] for name in written} == {
        "collect",
        "prior",
        "wm",
        "llm",
        "eval",
        "perf",
    }
    patterns = documented_metrics()
    assert sorted(n for n in written if not any(fnmatch.fnmatchcase(n, p) for p in patterns)) == []
    # The other way round: a name on the page is written, or it is one of those that need what this
    # run has not.
    absent = {p for p in patterns if not any(fnmatch.fnmatchcase(n, p) for n in written)}
    rare = (
        "vllm",
        "pushes",
        "head_error",
        "reasoning",
        "engine_re",
        "engine_close",
        "failures",
        "prior/sample",
        "perf/turn",
        "perf/background",
        "perf/round",
        "perf/worker",
        "collect/staleness",
        "rft_group",
        "rft_orz",
        "plain_states",
        "oom_splits",
        "/GAME/",  # of several games, and so the next two
        "/unseen/",
        "collect/score_share",
    )
    assert sorted(p for p in absent if not any(r in p for r in rare)) == []
