"""Training moves the policy where it should, and engines and checkpoints follow."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from priorzero.llm.engines.base import LLMEngineError
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.model import export_weights
from priorzero.llm.scoring.requests import ScoreRequest
from priorzero.llm.update.trainers.builtin import (
    LLMTrainer,
    LLMTrainerSettings,
    LoraSettings,
    RFTSample,
    SFTSample,
)
from priorzero.llm.weights.canary import push_and_verify
from priorzero.types import PriorZeroError

FAST = LLMTrainerSettings(learning_rate=3e-3, compute_dtype="float32")
ACTIONS = (
    "up",
    "us",
    "in",
    "open",
)  # one token per letter: longer ones would start hopelessly behind
REQUESTS = [
    ScoreRequest("You play. ", f"Room {i}.\nAction:", ACTIONS[: 2 + i % 3], " ") for i in range(6)
]
SAMPLES = [SFTSample(r, (0.7, 0.3) + (0.0,) * (len(r.actions) - 2)) for r in REQUESTS]


@pytest.fixture
def trainer(byte_model, byte_text):
    return LLMTrainer(byte_model, byte_text.tokenizer, FAST)


@pytest.mark.parametrize("objective", ["actions", "tokens"])
def test_sft_loss_falls(byte_model, byte_text, objective):
    trainer = LLMTrainer(
        byte_model, byte_text.tokenizer, dataclasses.replace(FAST, objective=objective)
    )
    history = [trainer.sft_update(SAMPLES) for _ in range(30)]
    assert history[-1]["kl"] < 0.2 * history[0]["kl"]
    assert 0 <= history[-1]["loss"] < history[0]["loss"]
    for row in history[::29]:
        assert row["loss"] == pytest.approx(row["cross_entropy"] - row["target_entropy"], abs=1e-5)
        if objective == "actions":
            assert row["loss"] == pytest.approx(row["kl"], abs=1e-6)
    assert history[0]["target_entropy"] == pytest.approx(
        -(0.7 * math.log(0.7) + 0.3 * math.log(0.3)), rel=1e-5
    )
    assert history[-1]["accuracy"] == 1.0 and trainer.version == 30
    policy = torch.tensor(trainer.score(REQUESTS[2:3])[0].totals()).softmax(-1)
    assert policy[:2].tolist() == pytest.approx([0.7, 0.3], abs=0.15)


def test_micro_batches_give_the_gradient_of_the_whole_batch(tiny, byte_text):
    """One optimiser step, cut into micro-batches of one state or not cut at all, ends in the same
    weights.
    """
    ends = []
    for limit in (1, 100_000):
        settings = dataclasses.replace(FAST, max_batch_tokens=limit)
        trainer = LLMTrainer(tiny(vocab=262), byte_text.tokenizer, settings)
        metrics = trainer.sft_update(SAMPLES)
        ends.append((metrics["loss"], metrics["grad_norm"]))
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_states_without_actions_teach_nothing(trainer):
    empty = SFTSample(ScoreRequest("", "The end.", ()), ())
    before = export_weights(trainer.model)["model.norm.weight"].clone()
    metrics = trainer.sft_update([empty])
    assert metrics["skipped"] == 1 and metrics["samples"] == 0 and trainer.version == 0
    assert torch.equal(before, export_weights(trainer.model)["model.norm.weight"])
    assert trainer.sft_update([empty, SAMPLES[0]])["samples"] == 1


def test_bad_samples_and_settings_are_refused(trainer):
    with pytest.raises(PriorZeroError, match="entries"):
        trainer.sft_update([SFTSample(REQUESTS[0], (1.0,))])
    with pytest.raises(PriorZeroError, match="distribution"):
        trainer.sft_update([SFTSample(REQUESTS[0], (1.0, 1.0))])
    with pytest.raises(PriorZeroError, match="action 9"):
        trainer.rft_update([RFTSample(REQUESTS[0], 9, 1.0, -1.0)])
    with pytest.raises(PriorZeroError, match="not finite"):
        trainer.rft_update([RFTSample(REQUESTS[0], 0, math.nan, -1.0)])
    with pytest.raises(PriorZeroError, match="objective"):
        LLMTrainerSettings(objective="dpo")


def test_rft_moves_towards_good_and_away_from_bad_actions(trainer):
    def log_policy() -> list[torch.Tensor]:
        return [torch.tensor(s.totals()).log_softmax(-1) for s in trainer.score(REQUESTS[:2])]

    before = log_policy()
    good = RFTSample(REQUESTS[0], 0, 1.0, float(before[0][0]))
    bad = RFTSample(REQUESTS[1], 1, -1.0, float(before[1][1]))
    samples = [good, bad]
    metrics = trainer.rft_update(samples)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-4) and metrics["clip_fraction"] == 0.0
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    after = log_policy()
    assert after[0][0] > before[0][0] and after[1][1] < before[1][1]
    assert trainer.rft_update(samples)["ratio"] != pytest.approx(1.0, abs=1e-3)


async def test_shared_engine_answers_with_the_trained_weights(trainer, reference):
    engine = TransformersEngine(trainer.model, trainer.text, lock=trainer.lock)
    stale = (await engine.score(REQUESTS[:1]))[0]
    trainer.sft_update(SAMPLES)
    report = await push_and_verify(engine, trainer, REQUESTS[0])
    assert report["canary_diff"] < 1e-4 and report["bytes"] == 0
    fresh = (await engine.score(REQUESTS[:1]))[0]
    expected = reference(trainer.model, trainer.text.tokenise(REQUESTS[0]))
    assert list(fresh.token_logprobs[0]) == pytest.approx(expected[0], abs=1e-4)
    assert fresh.totals() != pytest.approx(stale.totals(), abs=1e-3)


async def test_canary_catches_stale_weights(trainer, tiny):
    class Stale(TransformersEngine):
        async def push_weights(self, model, version):
            self.weights_version = version
            return {"seconds": 0.0, "bytes": 0.0}

    engine = Stale(tiny(vocab=262), trainer.text)
    trainer.sft_update(SAMPLES)
    with pytest.raises(LLMEngineError, match="stale or damaged"):
        await push_and_verify(engine, trainer, REQUESTS[0])


async def test_lora_trains_adapters_only_and_exports_merged_weights(tiny, byte_text, reference):
    base = tiny(vocab=262)
    settings = dataclasses.replace(FAST, lora=LoraSettings(rank=4), learning_rate=2e-2)
    trainer = LLMTrainer(base, byte_text.tokenizer, settings)
    history = [trainer.sft_update(SAMPLES) for _ in range(10)]
    assert history[-1]["kl"] < 0.5 * history[0]["kl"]
    assert all("lora_" in name for name in trainer.state_dict()["model"])
    plain = tiny(vocab=262)  # an engine on a copy of its own, without adapters
    engine = TransformersEngine(plain, byte_text)
    report = await push_and_verify(engine, trainer, REQUESTS[0])
    assert report["canary_diff"] < 1e-3
    assert "lm_head.weight" not in export_weights(trainer.model)
    assert not any("lora" in name or "base_layer" in name for name in export_weights(trainer.model))


def test_checkpoint_continues_exactly(tiny, byte_text):
    torch.manual_seed(0)
    first = LLMTrainer(tiny(vocab=262), byte_text.tokenizer, FAST)
    first.sft_update(SAMPLES)
    saved = copy.deepcopy(
        first.state_dict()
    )  # a checkpoint file holds copies; the live tensors go on
    saved["optimizer"] = torch.load(
        _dumped(saved["optimizer"]), weights_only=True
    )  # as a checkpoint file would
    first.sft_update(SAMPLES)
    second = LLMTrainer(tiny(seed=9, vocab=262), byte_text.tokenizer, FAST)
    second.load_state_dict(saved)
    assert second.version == 1
    second.sft_update(SAMPLES)
    for a, b in zip(first.parameters, second.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-7)
    with_lora = LLMTrainer(
        tiny(vocab=262), byte_text.tokenizer, dataclasses.replace(FAST, lora=LoraSettings())
    )
    with pytest.raises(PriorZeroError, match="other weights"):
        with_lora.load_state_dict(saved)


def _dumped(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


def test_frozen_layers_in_bfloat16_train_as_float32_ones_do(tiny, byte_text, monkeypatch):
    """Adapters on layers kept in bfloat16 see the very numbers autocast gives float32 layers."""
    import priorzero.llm.update.trainers.builtin as module

    settings = dataclasses.replace(
        FAST, compute_dtype="bfloat16", lora=LoraSettings(rank=4), learning_rate=2e-2
    )
    kept = LLMTrainer(tiny(vocab=262), byte_text.tokenizer, settings)
    monkeypatch.setattr(module, "store_layers_in", lambda model, dtype: None)
    whole = LLMTrainer(tiny(vocab=262), byte_text.tokenizer, settings)
    frozen = [
        m.weight
        for m in kept.model.modules()
        if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad
    ]
    assert frozen and {w.dtype for w in frozen} == {torch.bfloat16}
    assert {p.dtype for p in kept.parameters} == {torch.float32}
    with torch.no_grad():
        for a, b in zip(kept.parameters, whole.parameters, strict=True):
            b.copy_(a)
    for _ in range(3):
        a, b = kept.sft_update(SAMPLES), whole.sft_update(SAMPLES)
        assert a["loss"] == b["loss"] and a["grad_norm"] == b["grad_norm"]
    before = [w.clone() for w in frozen]
    exact = kept.score(REQUESTS[:1], torch.float32)[0].totals()
    assert exact != kept.score(REQUESTS[:1])[0].totals()
    assert all(
        w.dtype == torch.bfloat16 and torch.equal(w, old)
        for w, old in zip(
            [
                m.weight
                for m in kept.model.modules()
                if isinstance(m, torch.nn.Linear) and not m.weight.requires_grad
            ],
            before,
            strict=True,
        )
    )


def test_adapters_on_the_last_layers_leave_the_others_alone(tiny, byte_text):
    settings = dataclasses.replace(
        FAST, lora=LoraSettings(rank=4, last_layers=1), learning_rate=2e-2
    )
    trainer = LLMTrainer(tiny(vocab=262), byte_text.tokenizer, settings)
    wrong = dataclasses.replace(FAST, lora=LoraSettings(target_modules=("nosuch",)))
    with pytest.raises(PriorZeroError, match="nosuch"):
        LLMTrainer(tiny(vocab=262), byte_text.tokenizer, wrong)
    names = list(trainer.state_dict()["model"])
    assert (
        names
        and all(".layers.1." in name for name in names)
        and len({n.split(".lora_")[0] for n in names}) == 7
    )
    history = [trainer.sft_update(SAMPLES) for _ in range(10)]
    assert history[-1]["kl"] < 0.7 * history[0]["kl"]


async def test_engine_with_a_head_of_its_own_follows_the_embedding(tiny, byte_text):
    """`store_layers_in` unties the output head, and pushed weights hold none where it is tied."""
    from priorzero.llm.model import store_layers_in

    trainer = LLMTrainer(
        tiny(vocab=262), byte_text.tokenizer, dataclasses.replace(FAST, compute_dtype="bfloat16")
    )
    copy_ = tiny(vocab=262)
    store_layers_in(copy_, torch.bfloat16)
    assert copy_.lm_head.weight is not copy_.model.embed_tokens.weight
    engine = TransformersEngine(copy_, trainer.text, compute_dtype=torch.bfloat16)
    for _ in range(5):
        trainer.sft_update(SAMPLES)
    await engine.push_weights(trainer.model, trainer.version)
    assert torch.equal(copy_.lm_head.weight, trainer.model.lm_head.weight.to(torch.bfloat16))
    same = (await engine.score(REQUESTS[:1]))[0].totals()
    assert same == pytest.approx(trainer.score(REQUESTS[:1])[0].totals(), abs=1e-6)
