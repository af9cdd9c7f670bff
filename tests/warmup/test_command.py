"""The warm-up from end to end with a tiny LLM, and what its folder says to who uses it later."""

from __future__ import annotations

import asyncio
import json
import logging
import shlex
from pathlib import Path

import pytest
import torch

from priorzero.games.catalogue import resolve_game
from priorzero.games.families import kinship
from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.seen import read_seen
from priorzero.prior_report import main as report
from priorzero.warmup.__main__ import main

SIZES = (
    "--epochs 1 --device cpu --commit abc --textworld-kinds tw-coin --textworld 2 --jobs 1 "
    "--set wanders=0 --set held_out=0.5 --set train.batch_size=4 --set max_text_loss=100"
)


@pytest.fixture(scope="module")
def warm(tiny_llm, tmp_path_factory) -> Path:
    """What the command wrote."""
    out = tmp_path_factory.mktemp("warm") / "llm"
    handlers = logging.getLogger().handlers[:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIORZERO_CACHE", str(tmp_path_factory.mktemp("cache")))
        assert main(shlex.split(f"--out {out} --llm {tiny_llm} --weights all {SIZES}")) == 0
        # Training went on to write over nothing.
        assert main(shlex.split(f"--out {out} --llm {tiny_llm} {SIZES}")) == 2
        patch.setenv("PRIORZERO_CACHE", str(tmp_path_factory.mktemp("cache")))
    logging.getLogger().handlers[:] = handlers
    return out


def test_the_folder_is_an_llm_and_says_what_it_saw(warm, tiny_llm):
    model, _ = load_llm(resolve_llm(str(warm)))
    base, _ = load_llm(resolve_llm(tiny_llm))
    facts = json.loads((warm / "priorzero.json").read_text())
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    kept = facts["figures"]["after"] == facts["figures"]["before"]
    assert all(torch.equal(a, b) for a, b in pairs) == kept

    assert [one["family"] for one in facts["seen"]] == ["tw-coin", "tw-coin"]
    assert {one["by"] for one in facts["seen"]} == {"warm-up"}
    assert len(facts["held_out"]) == 1 and facts["held_out"][0] in {
        one["game"] for one in facts["seen"]
    }
    assert facts["commit"] == "abc" and "--textworld 2" in facts["command"]
    assert facts["settings"]["exclude"] == ["zork1.z5", "detective.z5"]
    assert facts["base"]["name"] == Path(tiny_llm).name and facts["form"] == "all weights"
    assert facts["reduction"] == "sum" and facts["families"].keys() == {"tw-coin"}


def test_a_report_on_a_relative_says_so(warm, tmp_path, monkeypatch):
    handlers = logging.getLogger().handlers[:]
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    seen = read_seen(warm).games[0].game
    games = f"tw-coin:level=1,seed=1 {seen}"
    command = f"--llm {warm} --games {games} --out {tmp_path / 'report'} --steps 2 --episodes 0"
    command += " --variants bare --temperatures 1 --device cpu --commit abc"
    assert asyncio.run(report(shlex.split(command))) == 0
    logging.getLogger().handlers[:] = handlers
    told = json.loads((tmp_path / "report" / "report.json").read_text())["seen"]
    assert [row["game"] for row in told] == games.split()
    assert "2 RELATIVES" in told[0]["warning"] and "THIS GAME" in told[1]["warning"]
    page = (tmp_path / "report" / "README.md").read_text()
    assert "## Trained on what is judged here" in page and told[1]["warning"] in page
    assert kinship(resolve_game(seen)).game == seen


def test_adapters_are_written_apart_in_the_format_asked_for(tiny_llm, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    handlers = logging.getLogger().handlers[:]
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "adapters"
    command = f"--out {out} --llm {tiny_llm} --weights adapters --adapter {SIZES} --decisions 4"
    assert main(shlex.split(f"{command} --set lora.last_layers=1 --set adapter_dtype=float16")) == 0
    logging.getLogger().handlers[:] = handlers
    assert {t.dtype for t in load_file(out / "adapter_model.safetensors").values()} == {
        torch.float16
    }
    assert json.loads((out / "priorzero.json").read_text())["form"] == "adapter"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--textworld 0", "without games textworld must not be 0"),
        ("--set stray=2", "stray is 2.0, but it must lie in"),
        ("--set epoch=2", "did you mean epochs"),
        ("--weights all --adapter --llm embedded", "leave out --adapter"),
    ],
)
def test_what_is_impossible_is_refused_at_once(tmp_path, arguments, told, caplog, monkeypatch):
    monkeypatch.setattr("priorzero.warmup.__main__.setup_logging", lambda folder: None)
    command = f"--out {tmp_path / 'out'} --commit abc {arguments}"
    assert main(shlex.split(command)) == 2
    assert told in caplog.text and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_with_it_says_so_and_hands_it_on(warm, tmp_path, monkeypatch, caplog):
    """From the warm-up over a run on a relative to the LLM that another run takes from there."""
    from priorzero.export import trained_llm
    from priorzero_config import HybridTrainingConfig
    from priorzero_orz_entry import train_priorzero_orz

    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    config = HybridTrainingConfig(
        env_id="tw-coin:level=1,seed=1",
        debug_mode=True,
        iterations=1,
        llm_train_freq=1,
        eval_freq=0,
        overrides=dict(
            env=dict(max_steps=4, collector_env_num=1),
            policy=dict(device="cpu", embed_dim=32, num_layers=1, num_heads=2, num_simulations=2),
            llm=dict(model=str(warm), lora=dict(last_layers=1)),
        ),
    )
    folder = config.priorzero_cfg.exp_name = str(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        summary = asyncio.run(train_priorzero_orz(config))
    told = summary["llm_warning"]
    assert "2 RELATIVES" in told and f"WARNING:         {told}" in caplog.text
    assert json.loads((Path(folder) / "config.json").read_text())["llm_warning"] == told
    assert told in caplog.messages[-2:]  # the page comes after it

    taken = trained_llm(Path(folder))
    assert trained_llm(Path(folder)) == taken  # written once
    own = kinship(resolve_game("tw-coin:level=1,seed=1")).game
    assert f"THIS GAME, {own} (by {Path(folder).resolve()})" in read_seen(taken).warning(
        own, "tw-coin"
    )
    assert len(read_seen(taken).games) == 3
    resolve_llm(str(taken))
