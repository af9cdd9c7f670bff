"""replan and play on a real run in tiny sizes: a run's agent decides from its checkpoint as it did
in the evaluation before that was saved.
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from priorzero import replan
from priorzero.decisions.reader import read_episodes
from priorzero.play.__main__ import main as play

STEPS, SIMULATIONS = 6, 12
SIZES = dict(
    env=dict(max_steps=STEPS, collector_env_num=2, evaluator_env_num=1, n_evaluator_episode=1),
    policy=dict(
        device="cpu",
        embed_dim=32,
        num_layers=1,
        num_heads=2,
        group_size=8,
        support_scale=10,
        num_simulations=SIMULATIONS,
        context_steps=STEPS,
        game_segment_length=4,
        num_segments=2,
        batch_size=4,
        replay_ratio=1.0,
        root_prior=dict(temperature="auto", calibration=dict(least=4)),
    ),
    llm=dict(
        engine="transformers",
        dtype="float32",
        sft=dict(samples=4),
        lora=dict(enable=True, last_layers=1),
        prompt=dict(history_length=2),
    ),
    eval=dict(modes=["world_model", "world_model_llm"]),
)


@pytest.fixture(scope="module")
def run(tiny_llm, tmp_path_factory) -> Path:
    """Three iterations, trained and saved, with an evaluation right before."""
    from priorzero.settings.record import merge
    from priorzero_config import HybridTrainingConfig
    from priorzero_orz_entry import train_priorzero_orz

    config = HybridTrainingConfig(
        env_id="tw-simple",
        debug_mode=True,
        overrides=merge(SIZES, dict(llm=dict(model=tiny_llm))),
        iterations=3,
        llm_train_freq=1,
    )
    config.priorzero_cfg.exp_name = str(tmp_path_factory.mktemp("run") / "tiny")
    asyncio.run(train_priorzero_orz(config))
    return Path(config.priorzero_cfg.exp_name)


def recorded(run: Path, mode: str) -> list[dict]:
    """The evaluation before the checkpoint."""
    episodes = {e.name: e.steps for e in read_episodes(run)}
    return episodes[f"iter000003/{mode}/0"]


def again(run: Path, mode: str, step: int, tmp_path: Path, *arguments: str) -> dict:
    out = tmp_path / "out.json"
    place = ["--episode", f"iter000003/{mode}/0", "--step", str(step)]
    assert replan.main([str(run), *place, "--json", str(out), *arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.parametrize("mode", ["world_model", "world_model_llm"])
def test_a_decision_comes_out_as_it_was_recorded(run, tmp_path, mode):
    steps = recorded(run, mode)
    assert len(steps) == STEPS
    for number in (0, 1, STEPS - 1):
        told = again(run, mode, number, tmp_path)
        assert told["recorded"] == steps[number]
        new, old = told["again"], steps[number]
        for name in ("visits", "chosen"):
            assert new[name] == old[name], name
        for name in ("parent", "command", "n"):
            assert new["tree"][name] == old["tree"][name], name
        # What the LLM said was rounded when it was recorded.
        for name in ("mixture", "world_model", "improved", "value", "predicted_value"):
            np.testing.assert_allclose(new[name], old[name], atol=3e-5, err_msg=name)
        for name in ("q", "p", "reward", "value"):
            np.testing.assert_allclose(new["tree"][name], old["tree"][name], atol=3e-5)
        if "llm" in old:
            np.testing.assert_allclose(new["llm"], old["llm"], atol=3e-5)
    assert ("llm" in new) == (mode == "world_model_llm")


def test_the_llm_of_the_checkpoint_is_asked_as_it_was(run, tmp_path):
    steps = recorded(run, "world_model_llm")
    for number in (0, 3):  # without a history, and with one that is cut
        told = again(run, "world_model_llm", number, tmp_path, "--prior", "ask")
        logs = told["again"]["llm_logprobs"]
        np.testing.assert_allclose(logs, steps[number]["llm_logprobs"], atol=2e-4)
    # It has learnt: what it said before the training is something else.
    first = {e.name: e.steps for e in read_episodes(run)}["iter000000/world_model_llm/0"][0]
    assert np.abs(np.subtract(first["llm_logprobs"], steps[0]["llm_logprobs"])).max() > 2e-3


def test_another_search(run, tmp_path, capsys):
    told = again(
        run, "world_model_llm", 2, tmp_path, "--prior", "off", "--simulations", "40",
        "--set", "policy.root_policy=gumbel",
    )  # fmt: skip
    new, old = told["again"], told["recorded"]
    assert sum(new["visits"]) == 40 and len(new["tree"]["n"]) == 41 and "llm" not in new
    assert new["mixture"] == new["world_model"] == old["world_model"]
    assert new["llm_share"] == 0 and old["llm_share"] > 0

    text = capsys.readouterr().out
    assert old["text"] in text and f"simulations: recorded {SIMULATIONS}; again 40" in text
    for at, command in enumerate(old["commands"]):
        (row,) = re.findall(rf"^{re.escape(command)}  +(.*)$", text, re.M)
        assert row.startswith("▶") == (old["chosen"] == at)
        numbers = row.replace("▶", " ").split()
        expected = [100 * old[name][at] for name in ("llm", "world_model", "mixture")]
        assert [float(n) for n in numbers[:3]] == pytest.approx(expected, abs=0.051)
        assert numbers[5] == "–"
        assert float(numbers[8]) == pytest.approx(100 * new["visits"][at] / 40, abs=0.051)


def test_what_cannot_be_planned_again_is_told(run, tmp_path, capsys):
    place = ["--episode", "0", "--step", "0"]
    cut = tmp_path / "cut"
    shutil.copytree(run, cut, ignore=shutil.ignore_patterns("ckpt"))
    for arguments, words in (
        ([str(run), "--episode", "0", "--step", "99"], "decisions are 0 to 5"),
        ([str(run), "--episode", "nothing", "--step", "0"], "no recorded episode nothing"),
        ([str(tmp_path), *place], "is no run's folder"),
        ([str(cut), *place], "no checkpoint yet"),
        ([str(run), *place, "--set", "policy.embed_dim=64"], "does not fit these settings"),
        ([str(run), *place, "--simulations", "0"], "policy.num_simulations is 0"),
        ([str(run), *place, "--json", str(tmp_path / "no" / "file")], "could not be written"),
    ):
        assert replan.main(arguments) == 2
        assert words in capsys.readouterr().err


# ---- play ----------------------------------------------------------------------------------------


@pytest.fixture
def typed(run, monkeypatch, capsys):
    """Plays the run's game with these lines; returns what was said."""

    def play_lines(*lines: str, options=()) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        assert play([str(run), *options]) == 0
        return capsys.readouterr().out

    return play_lines


def commands(text: str) -> list[str]:
    return re.findall(r"^> (.*)$", text, re.M)


@pytest.mark.parametrize(
    ("mode", "options"), [("world_model", ["--no-llm"]), ("world_model_llm", [])]
)
def test_the_agent_plays_as_in_its_evaluation(run, typed, mode, options):
    steps = recorded(run, mode)
    text = typed("", "/go 100", options=options)
    assert commands(text) == [s["commands"][s["chosen"]] for s in steps]
    assert f"The end after {STEPS} commands, score {steps[-1]['score_after']:g} of" in text
    assert all(step["text"] in text for step in steps)


def test_own_commands_and_numbers(run, typed):
    first = recorded(run, "world_model_llm")[0]
    text = typed("/prompt", "/line", "/all", "99", "1", "xyzzy", "look")
    assert commands(text)[1:] == ["xyzzy", "look"]
    assert commands(text)[0] == first["commands"][int(np.argmax(first["improved"]))]
    assert first["prompt"] in text and f"there are commands 1 to {len(first['commands'])}" in text
    assert "not a verb" in text
    # The lines are at an end before the game is.
    assert text.rstrip().splitlines()[-1].startswith("Left after 3 commands")

    shares = {c: 100 * p for c, p in zip(first["commands"], first["llm"], strict=True)}
    for command, share in shares.items():
        row = re.search(rf"\d {re.escape(command)} +([\d.]+) ", text)
        assert float(row[1]) == pytest.approx(share, abs=0.051)
    chosen = first["commands"][first["chosen"]]
    root = first["tree"]
    at = next(n for n, c in enumerate(root["command"]) if c == chosen and root["parent"][n] == 0)
    assert f"{chosen}: {root['n'][at]} visits, imagined reward {root['reward'][at]:.2f}" in text


def test_the_seed_is_checked(run, capsys):
    assert play([str(run), "--seed", "-1"]) == 2
    assert "--seed is -1" in capsys.readouterr().err
