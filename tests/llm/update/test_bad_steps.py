"""A step whose numbers are not finite changes nothing and is written down; many end the run."""

from __future__ import annotations

import copy
import io
import logging
import math
from pathlib import Path

import pytest
import torch

from priorzero.llm.build import build_llm
from priorzero.llm.update.samples import LLMSample
from priorzero.llm.update.trainers import builtin
from priorzero.settings.llm import LLMSettings, LLMTrainSettings, LoraSettings
from priorzero.types import PriorZeroError, TokenisedRequest
from priorzero_prompts import ACTION_MARKER, prompt_builder
from tests.llm.decisions import REQUESTS, ids, request, rft_settings, sample, settings

GOOD = [sample(r) for r in REQUESTS[:4]]
# The only decision with a "z" in its prompt.
BAD = sample(request("A maze.\nAction:", ("up", "us")))
LORA = LoraSettings(enable=True, rank=4)


def trainer_in(folder: Path | None, tiny, **fields) -> builtin.BuiltinTrainer:
    """Two decisions a step; what the LLM says where it has read a "z" is no number."""
    model = tiny(vocab=262, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[ids("z")[0]] = math.nan
    chosen = settings(**dict(batch_size=2, learning_rate=1e-3) | fields)
    return builtin.make(model, None, chosen, "sum", folder)


def state(trainer) -> dict:
    """Weights, optimiser and counters, as a checkpoint holds them."""
    file = io.BytesIO()
    torch.save(copy.deepcopy(trainer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


@pytest.mark.parametrize("lora", [LoraSettings(), LORA], ids=["all weights", "adapters"])
def test_a_phase_with_a_bad_step_is_the_phase_without_it(lora, tiny, tmp_path, caplog):
    clean, other = (trainer_in(folder, tiny, lora=lora) for folder in (None, tmp_path))
    expected = clean.update({"sft": GOOD})
    with caplog.at_level(logging.WARNING):
        metrics = other.update({"sft": [*GOOD[:2], GOOD[0], BAD, *GOOD[2:]]})

    assert same(state(other), state(clean))
    assert (expected["sft_skipped_steps"], metrics["sft_skipped_steps"]) == (0.0, 1.0)
    for name in ("sft_loss", "sft_grad_norm", "sft_learning_rate"):
        assert metrics[name] == expected[name]
    assert metrics["sft_epochs"] == pytest.approx(2 / 3) and metrics["sft_samples"] == 6.0
    assert "skipped, because the LLM's loss became nan" in caplog.text
    assert str(tmp_path / "bad_steps" / "1_sft.pt") in caplog.text


def test_a_gradient_that_is_no_number(tiny, tmp_path):
    trainer = trainer_in(tmp_path, tiny, batch_size=0)
    weight = next(p for p in trainer.weights().module.parameters() if p.requires_grad)
    hook = weight.register_hook(lambda gradient: gradient * math.inf)
    before = state(trainer)
    metrics = trainer.update({"sft": GOOD})
    assert "sft_loss" not in metrics and metrics["sft_skipped_steps"] == 1.0
    after = state(trainer)
    assert after.pop("bad_steps") == 1 and before.pop("bad_steps") == 0 and same(after, before)
    (path,) = (tmp_path / "bad_steps").iterdir()
    assert torch.load(path, weights_only=True)["what"] == "gradient norm"

    hook.remove()
    assert trainer.update({"sft": GOOD})["sft_skipped_steps"] == 0.0
    assert not same(state(trainer)["model"], before["model"])


def test_what_is_written_down_can_be_computed_again(tiny, tmp_path):
    trainer = trainer_in(tmp_path, tiny)
    trainer.update({"sft": GOOD})
    trainer.update({"sft": [GOOD[1], BAD]})
    record = torch.load(tmp_path / "bad_steps" / "1_sft.pt", weights_only=True)

    assert math.isnan(record["value"]) and record["what"] == "loss"
    assert record["decisions"] == [1]  # the second one of the step
    assert (record["objective"], record["version"], record["step"]) == ("sft", 1, 2)
    assert record["targets"] == [s.target_policy for s in (GOOD[1], BAD)]
    again = [
        LLMSample(**one | {"request": TokenisedRequest(**one["request"])})
        for one in record["samples"]
    ]
    assert again == [GOOD[1], BAD]


def test_scores_before_the_phase_that_are_no_numbers(tiny, tmp_path):
    """Reinforcement compares with them, so nothing of the phase can be trained on."""
    trainer = trainer_in(tmp_path, tiny, rft=rft_settings(advantage="running"))
    before = state(trainer)
    metrics = trainer.update({"rft": [*GOOD, BAD]})
    assert {k for k in metrics if not k.endswith("seconds")} == {
        "rft_samples",
        "rft_skipped_steps",
    }
    after = state(trainer)
    assert after.pop("bad_steps") == 1 and before.pop("bad_steps") == 0 and same(after, before)
    record = torch.load(tmp_path / "bad_steps" / "1_rft.pt", weights_only=True)
    assert (record["what"], record["decisions"]) == ("log-probabilities", [4])
    assert len(record["samples"]) == 5 and record["targets"] == []
    assert trainer.update({"rft": GOOD})["rft_skipped_steps"] == 0.0


def test_reinforcements_targets_are_written_down_too(tiny, tmp_path):
    trainer = trainer_in(tmp_path, tiny, kl_coef=0.1, batch_size=0)
    weight = next(trainer.weights().module.parameters())
    weight.register_hook(lambda gradient: gradient * math.nan)
    drawn = sample(REQUESTS[0], value_target=1.0, collected_logprobs=((-1.0,) * 4,) * 2)
    trainer.update({"rft": [drawn]})
    record = torch.load(tmp_path / "bad_steps" / "1_rft.pt", weights_only=True)
    (target,) = record["targets"]
    assert target["advantage"].tolist() == [1.0] and target["old"].isfinite().all()
    assert record["samples"][0]["value_target"] == 1.0


def test_many_in_a_row_end_the_run(tiny, tmp_path):
    trainer = trainer_in(tmp_path, tiny, batch_size=1, max_bad_steps=3)
    trainer.update({"sft": [BAD, BAD, GOOD[0], BAD, BAD]})  # never three
    before = state(trainer)
    assert before["bad_steps"] == 2
    with pytest.raises(
        PriorZeroError, match=r"loss became nan in 3 training steps in a row.*learning_rate.*resume"
    ):
        trainer.update({"sft": [BAD, GOOD[0]]})
    after = state(trainer)
    assert same(after["model"], before["model"]) and trainer.version == 1

    # Two phases and a resume do not start the count anew.
    resumed = trainer_in(tmp_path, tiny, batch_size=1, max_bad_steps=3)
    resumed.load_state_dict(before)
    with pytest.raises(PriorZeroError, match="3 training steps in a row"):
        resumed.update({"sft": [BAD]})
    former = trainer_in(None, tiny)
    former.load_state_dict({k: v for k, v in before.items() if k != "bad_steps"})


def test_a_handful_of_files_at_most(tiny, tmp_path, caplog):
    trainer = trainer_in(tmp_path, tiny, batch_size=1, max_bad_steps=100)
    trainer.update({"sft": [BAD] * 7})
    names = sorted(p.name for p in (tmp_path / "bad_steps").iterdir())
    assert names == [f"{i}_sft.pt" for i in range(1, 6)]
    assert "holds 5 such steps already" in caplog.text


def test_a_folder_that_takes_no_file_is_told(tiny, tmp_path, caplog):
    (tmp_path / "bad_steps").write_text("in the way")
    trainer = trainer_in(tmp_path, tiny)
    assert trainer.update({"sft": [*GOOD, BAD]})["sft_skipped_steps"] == 1.0
    assert "could not be written" in caplog.text
    caplog.clear()
    trainer_in(None, tiny).update({"sft": [BAD]})
    assert "were not written down" in caplog.text


async def test_a_run_gives_its_trainer_the_folder(tiny_llm, tmp_path):
    chosen = LLMSettings(
        model=str(tiny_llm), engine="transformers", train=LLMTrainSettings(batch_size=0)
    )
    parts = await build_llm(
        chosen,
        device="cpu",
        reduction="sum",
        seed=0,
        marker=ACTION_MARKER,
        make_prompt=lambda tokenizer: prompt_builder(chosen.prompt, tokenizer),
        folder=tmp_path,
    )
    with torch.no_grad():
        next(parts.trainer.weights().module.parameters()).fill_(math.nan)
    parts.trainer.update({"sft": GOOD})
    await parts.engine.close()
    assert [p.name for p in (tmp_path / "bad_steps").iterdir()] == ["1_sft.pt"]
