"""An exported folder answers as the run's trainer did; whatever fails leaves nothing behind."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from priorzero.export import main, trained_llm
from priorzero.llm.build import build_llm
from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.update.trainers import builtin
from priorzero.run.checkpoint import CheckpointStore
from priorzero.settings.llm import LLMSettings, LLMTrainSettings, LoraSettings
from priorzero.types import PriorZeroError
from priorzero_orz_entry import config_from, parse_arguments
from priorzero_prompts import ACTION_MARKER, prompt_builder
from tests.llm.conftest import reference_logprobs
from tests.llm.decisions import sample

LORA = LoraSettings(enable=True, rank=4, alpha=12.0, last_layers=1)
PROMPTS = [("You play. ", "A small room.\nAction:"), ("You play. ", "A lamp is here.\nAction:")]
ACTIONS = [("go north", "look"), ("take lamp", "look", "open door")]


def requests_of(tokenizer) -> list:
    return Tokeniser(tokenizer, 512).requests(PROMPTS, ACTIONS)


def settings_of(base: str, lora: LoraSettings | None = None, rate: float = 1e-2) -> LLMSettings:
    return LLMSettings(
        model=base,
        engine="transformers",
        dtype="float32",
        train=LLMTrainSettings(learning_rate=rate, batch_size=0),
        lora=lora or LoraSettings(),
    )


def save(run: Path, trainer, iteration: int, best: bool = False) -> Path:
    meta = {"iteration": iteration, "game": "tw-simple", "llm_version": trainer.version}
    return CheckpointStore(run / "ckpt").save(iteration, {}, trainer.state_dict(), meta, best)


def make_run(run: Path, settings: LLMSettings, updates: int = 2):
    """A run's folder with a checkpoint after some updates; its trainer, and the requests."""
    run.mkdir(parents=True)
    written = {"settings": {"llm": settings.as_dict()}}
    (run / "config.json").write_text(json.dumps(written))
    model, tokenizer = load_llm(resolve_llm(settings.model))
    requests = requests_of(tokenizer)
    trainer = builtin.make(model, tokenizer, settings, "sum")
    before = [s.totals() for s in trainer.score(requests, torch.float32)]
    for _ in range(updates):
        trainer.update({"sft": [sample(r) for r in requests]})
    after = [s.totals() for s in trainer.score(requests, torch.float32)]
    moved = max(
        abs(a - b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)
    )
    assert moved > 0.02  # or an untrained folder would pass
    save(run, trainer, 7, best=True)
    return trainer, requests


def answers(model, requests) -> list[float]:
    """Through the model's public interface, in order."""
    return [t for r in requests for action in reference_logprobs(model, r) for t in action]


def trained(trainer, requests) -> list[float]:
    scores = trainer.score(requests, torch.float32)
    return [t for s in scores for action in s.token_logprobs for t in action]


def listing(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch, one_thread):
    """The command's own handlers would outlive the test's terminal."""
    monkeypatch.setattr("priorzero.export.setup_logging", lambda folder: None)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, tiny_llm):
    """A run that trained adapters: its folder, its trainer, requests."""
    folder = tmp_path_factory.mktemp("adapted") / "run"
    return folder, *make_run(folder, settings_of(tiny_llm, LORA))


@pytest.fixture
def run(tmp_path, adapted) -> Path:
    """A copy of that folder."""
    return shutil.copytree(adapted[0], tmp_path / "run")


def refused(caplog, *arguments: object) -> str:
    """The one error of a command that must fail."""
    caplog.clear()
    assert main([str(a) for a in arguments]) == 2
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and errors[0].startswith("Error: ")
    return errors[0]


@pytest.mark.parametrize("lora", [None, LORA], ids=["all weights", "adapters"])
async def test_a_new_run_takes_the_folder_back_and_answers_the_same(tmp_path, tiny_llm, lora):
    trainer, requests = make_run(tmp_path / "run", settings_of(tiny_llm, lora))
    out = tmp_path / "some" / "where"
    assert main([str(tmp_path / "run"), str(out)]) == 0
    assert listing(out.parent) == {"where"}

    # Any loader.
    model, tokenizer = load_llm(resolve_llm(str(out)))
    assert answers(model, requests) == pytest.approx(trained(trainer, requests), abs=2e-5)
    assert requests_of(tokenizer) == requests
    source = load_llm(resolve_llm(tiny_llm))[1]
    assert tokenizer.chat_template == source.chat_template

    # `--llm FOLDER`.
    settings = settings_of(str(out))
    parts = await build_llm(
        settings,
        device="cpu",
        reduction="sum",
        seed=0,
        marker=ACTION_MARKER,
        make_prompt=lambda t: prompt_builder(settings.prompt, t),
    )
    found = [s.totals() for s in await parts.engine.score(requests)]
    await parts.engine.close()
    want = [s.totals() for s in trainer.score(requests)]
    for got, expected in zip(found, want, strict=True):
        assert got == pytest.approx(expected, abs=1e-4)


def test_the_folder_says_where_it_comes_from(run, tmp_path, tiny_llm):
    assert main([str(run), str(tmp_path / "out")]) == 0
    facts = json.loads((tmp_path / "out" / "priorzero.json").read_text())
    base = facts.pop("base")
    assert base["name"] == tiny_llm and len(base["weights"]) == 16
    assert facts == {
        "run": str(run),
        "checkpoint": "iter_00000007",
        "iteration": 7,
        "llm_version": 2,
        "game": "tw-simple",
        "form": "merged",
        "seen": [{"game": "tw-simple", "family": "tw-simple", "by": str(run)}],
    }
    assert {"config.json", "generation_config.json", "model.safetensors"} < listing(
        tmp_path / "out"
    )
    modes = {p.stat().st_mode for p in (tmp_path / "out").iterdir()}
    assert len(modes) == 1  # whoever may read one file may read all


def test_adapters_apart_are_what_peft_loads(run, adapted, tmp_path):
    from peft import AutoPeftModelForCausalLM

    _, trainer, requests = adapted
    out = tmp_path / "out"
    out.mkdir()  # empty: taken
    assert main([str(run), str(out), "--adapter"]) == 0
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} < listing(out)
    assert "config.json" not in listing(out) and "model.safetensors" not in listing(out)
    model = AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert answers(model, requests) == pytest.approx(trained(trainer, requests), abs=2e-5)


def test_each_checkpoint_by_its_name(run, tmp_path, tiny_llm):
    """Seven is the best; nine the latest, trained further."""
    settings = settings_of(tiny_llm, LORA)
    model, tokenizer = load_llm(resolve_llm(tiny_llm))
    requests = requests_of(tokenizer)
    trainer = builtin.make(model, tokenizer, settings, "sum")
    trainer.load_state_dict(CheckpointStore(run / "ckpt").load()[1])
    expected = {"best": trained(trainer, requests)}
    trainer.update({"sft": [sample(r) for r in requests]})
    save(run, trainer, 9)
    expected["latest"] = trained(trainer, requests)
    assert max(abs(a - b) for a, b in zip(*expected.values(), strict=True)) > 1e-3
    expected["iter_00000007"] = expected["best"]

    for which, numbers in expected.items():
        out = tmp_path / which
        assert main([str(run), str(out), "--checkpoint", which]) == 0
        got = answers(load_llm(resolve_llm(str(out)))[0], requests)
        assert got == pytest.approx(numbers, abs=2e-5)


def test_without_an_llm(run, tmp_path, caplog):
    config = json.loads((run / "config.json").read_text())
    config["settings"]["llm"]["enable"] = False
    (run / "config.json").write_text(json.dumps(config))
    assert "has no LLM" in refused(caplog, run, tmp_path / "out")
    assert listing(tmp_path) == {"run"}


def test_no_run_and_a_damaged_config(run, tmp_path, caplog):
    assert "is no run's folder" in refused(caplog, tmp_path / "nothing", tmp_path / "out")
    (run / "config.json").write_text('{"settings": ')
    assert "config.json is damaged" in refused(caplog, run, tmp_path / "out")
    (run / "config.json").write_text('{"settings": []}')
    assert "config.json is damaged" in refused(caplog, run, tmp_path / "out")
    assert listing(tmp_path) == {"run"}


@pytest.mark.parametrize("damage", ["cut", "one byte", "gone", "code"])
def test_a_damaged_checkpoint(run, tmp_path, caplog, damage):
    path = run / "ckpt" / "iter_00000007" / "llm.pt"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "one byte":  # in the middle of some weight
        state = torch.load(path, weights_only=True)
        weight = next(iter(state["model"].values())).numpy().tobytes()
        at = whole.index(weight) + len(weight) // 2
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    elif damage == "gone":
        path.unlink()
    else:
        torch.save({"model": Code()}, path)
    message = refused(caplog, run, tmp_path / "out")
    assert "iter_00000007 is damaged" in message and "checkpoints here: none" in message
    assert listing(tmp_path) == {"run"}


class Code:
    """Would be called by an unrestricted loader."""

    def __reduce__(self):
        return (print, ("called",))


@pytest.mark.parametrize("name", ["previous", "iter_00000001", "../ckpt/iter_00000007", ".."])
def test_a_missing_checkpoint(run, tmp_path, caplog, name):
    message = refused(caplog, run, tmp_path / "out", "--checkpoint", name)
    assert "no checkpoint" in message and "here: iter_00000007" in message
    assert listing(tmp_path) == {"run"}


def test_what_is_there_is_not_written_over(run, tmp_path, caplog):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("kept")
    assert "exists already" in refused(caplog, run, out)
    assert "exists already" in refused(caplog, run, out / "mine")
    assert listing(out) == {"mine"} and (out / "mine").read_text() == "kept"


def test_adapters_need_the_very_model_they_were_trained_on(run, tmp_path, caplog, tiny_llm):
    model, tokenizer = load_llm(resolve_llm(tiny_llm))
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    message = refused(caplog, run, tmp_path / "out", "--base", tmp_path / "other")
    assert "was trained from" in message and "is another model" in message
    assert listing(tmp_path) == {"run", "other"}


def test_a_base_that_has_moved_is_named(tmp_path, tiny_llm, caplog):
    """All weights are trained here; the settings name the folder that is gone too."""
    model, tokenizer = load_llm(resolve_llm(tiny_llm))
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "base")
    make_run(tmp_path / "run", settings_of(str(tmp_path / "base")))
    (tmp_path / "base").rename(tmp_path / "moved")
    message = refused(caplog, tmp_path / "run", tmp_path / "out")
    assert "Name the folder or hub name of that model with --base" in message
    arguments = [str(tmp_path / "run"), str(tmp_path / "out")]
    assert main([*arguments, "--base", str(tmp_path / "moved")]) == 0


def test_adapter_of_a_run_without_adapters(tmp_path, tiny_llm, caplog):
    make_run(tmp_path / "run", settings_of(tiny_llm))
    assert "leave out --adapter" in refused(caplog, tmp_path / "run", tmp_path / "o", "--adapter")
    assert listing(tmp_path) == {"run"}


def test_adapters_of_other_settings(run, tmp_path, caplog):
    config = json.loads((run / "config.json").read_text())
    config["settings"]["llm"]["lora"] = dataclasses.asdict(LORA) | {"rank": 8}
    (run / "config.json").write_text(json.dumps(config))
    assert "llm.lora settings" in refused(caplog, run, tmp_path / "out")
    assert listing(tmp_path) == {"run"}


@pytest.mark.parametrize("form", [[], ["--adapter"]], ids=["merged", "adapter"])
def test_a_disk_that_takes_no_more_leaves_nothing(run, tmp_path, caplog, monkeypatch, form):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    assert "no space left" in refused(caplog, run, tmp_path / "out", *form)
    assert listing(tmp_path) == {"run"}


@pytest.mark.slow
def test_the_real_llm(tmp_path):
    """SmolLM2 with adapters as in the debug run, kept in bfloat16 below where that is fast."""
    resolve_llm("embedded")
    settings = settings_of("embedded", LoraSettings(enable=True, last_layers=2), rate=1e-3)
    trainer, requests = make_run(tmp_path / "run", dataclasses.replace(settings, dtype="bfloat16"))
    assert main([str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    model = load_llm(resolve_llm(str(tmp_path / "out")))[0]
    assert answers(model, requests) == pytest.approx(trained(trainer, requests), abs=1e-3)


def test_another_run_takes_the_llm_by_the_runs_folder(run, adapted, monkeypatch, tmp_path):
    """--llm-from: what the trainer answers, written once per checkpoint."""
    _, trainer, requests = adapted
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    # The base model lies in the cache of the test session, the folder in this one.
    folder = trained_llm(run)
    model, _ = load_llm(resolve_llm(str(folder)))
    assert answers(model, requests) == pytest.approx(trained(trainer, requests), abs=2e-5)
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert trained_llm(run) == folder == trained_llm(run, "iter_00000007")
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    save(run, trainer, 9)
    assert trained_llm(run) != folder

    with pytest.raises(PriorZeroError, match="no run's folder"):
        trained_llm(tmp_path)
    with pytest.raises(PriorZeroError, match="no checkpoint 'iter_1'"):
        trained_llm(run, "iter_1")


def test_an_llm_is_named_once():
    for other in (["--llm", "embedded"], ["--no-llm"]):
        arguments = parse_arguments(["--llm-from", "run", *other])
        with pytest.raises(PriorZeroError, match="--llm-from names the LLM"):
            config_from(arguments, debug_mode=True)
