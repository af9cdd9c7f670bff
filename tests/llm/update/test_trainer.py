"""Training moves the policy where it should, and engines and checkpoints follow."""

from __future__ import annotations

import copy
import dataclasses
import io
import math

import pytest
import torch

from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.weights import adapters
from priorzero.llm.weights.canary import StaleWeightsError
from priorzero.llm.weights.publish import publish
from priorzero.settings.llm import LoraSettings, SFTSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import (
    REQUESTS,
    SAMPLES,
    policy,
    rft_settings,
    sample,
    thinking,
    trainer_of,
)

ADAPTERS = LoraSettings(enable=True, rank=4, alpha=16)


@pytest.fixture
def trainer(byte_model):
    return trainer_of(byte_model)


def trained_parameters(trainer) -> dict[str, torch.Tensor]:
    return trainer.state_dict()["model"]


@pytest.mark.parametrize("objective", ["actions", "tokens"])
def test_sft_loss_falls(byte_model, objective):
    trainer = trainer_of(byte_model, objective=objective)
    history = [trainer.update({"sft": SAMPLES}) for _ in range(30)]
    assert history[-1]["sft_kl"] < 0.2 * history[0]["sft_kl"]
    assert 0 <= history[-1]["sft_loss"] < history[0]["sft_loss"]
    for row in history[::29]:
        removable = row["sft_cross_entropy"] - row["sft_target_entropy"]
        assert row["sft_loss"] == pytest.approx(removable, abs=1e-5)
        if objective == "actions":
            assert row["sft_loss"] == pytest.approx(row["sft_kl"], abs=1e-6)
    spread = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert history[0]["sft_target_entropy"] == pytest.approx(spread, rel=1e-5)
    assert history[-1]["sft_accuracy"] == 1.0 and trainer.version == 30
    assert policy(trainer, REQUESTS[2]).exp()[:2].tolist() == pytest.approx([0.7, 0.3], abs=0.15)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_sft_brings_the_policy_at_its_temperature_to_the_target(byte_model, temperature):
    """Then softmax(l) is the target to the power of the temperature, and not the target."""
    trainer = trainer_of(byte_model, sft=SFTSettings(temperature=temperature))
    history = [trainer.update({"sft": SAMPLES}) for _ in range(60)]
    assert history[-1]["sft_kl"] < 0.02 < history[0]["sft_kl"]

    log_policy = policy(trainer, REQUESTS[0])  # of its two actions
    odds = float(log_policy[0] - log_policy[1])
    assert odds == pytest.approx(temperature * math.log(0.7 / 0.3), rel=0.25)


REWARDED = [
    thinking(r, "x" * (1 + 40 * i), value_target=float(i - 2), collected_logprobs=None)
    for i, r in enumerate(REQUESTS)
]


@pytest.mark.parametrize(
    ("name", "drawn"), [("sft", SAMPLES), ("rft", REWARDED)], ids=["sft", "rft"]
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, drawn, tiny):
    """One optimiser step, cut into micro-batches of one state, of some, or not cut at all, has the
    same gradient; a state above the limit is computed by itself. AdamW's first moment after one
    step is a tenth of the gradient.
    """
    ends = []
    for limit in (1, 150, 100_000):
        trainer = trainer_of(
            tiny(vocab=262),
            max_batch_tokens=limit,
            max_grad_norm=1e9,
            kl_coef=0.1,
            rft=rft_settings(cot_weight=0.5, kl_reference="initial"),
        )
        metrics = trainer.update({name: drawn})
        moments = trainer.state_dict()["optimizer"]["state"].values()
        ends.append(
            (metrics[f"{name}_loss"], 10 * torch.cat([m["exp_avg"].flatten() for m in moments]))
        )
    for loss, gradient in ends[:2]:
        assert loss == pytest.approx(ends[2][0], rel=1e-4)
        torch.testing.assert_close(gradient, ends[2][1], rtol=1e-3, atol=1e-5)
    assert float(ends[2][1].abs().max()) > 1e-2


def test_one_decision_above_the_limit_is_computed_by_itself(byte_model):
    """It cannot be cut, and is trained on all the same."""
    assert len(REWARDED[5].request.prompt_ids) > 150
    trainer = trainer_of(byte_model, max_batch_tokens=150)
    before = policy(trainer, REWARDED[5].request)
    trainer.update({"sft": [REWARDED[5]]})
    assert not torch.equal(policy(trainer, REWARDED[5].request), before)


def test_an_update_without_decisions_changes_nothing(trainer):
    before = {k: v.clone() for k, v in trainer.weights().tensors().items()}
    assert trainer.update({"sft": []}) == {} and trainer.version == 0
    after = trainer.weights().tensors()
    assert all(torch.equal(after[k], v) for k, v in before.items())


@pytest.mark.parametrize(
    "fields",
    [
        dict(target_policy=(1.0,)),
        dict(target_policy=(1.0, 1.0)),
        dict(action_index=9),
        dict(thought_tokens=99),
        dict(thought_logprobs=(-1.0,)),  # of no thought
        dict(request=dataclasses.replace(REQUESTS[0], reasoning=True)),
    ],
)
def test_impossible_samples_are_our_faults(fields):
    with pytest.raises(AssertionError):
        sample(REQUESTS[0], **fields)


def test_rft_moves_towards_good_and_away_from_bad_actions(trainer):
    good = sample(REQUESTS[0], value_target=1.0)
    bad = sample(REQUESTS[1], action_index=1, value_target=-1.0)
    before = [policy(trainer, r) for r in REQUESTS[:2]]

    metrics = trainer.update({"rft": [good, bad]})

    # One step: the policy is the old one.
    assert metrics["rft_ratio"] == pytest.approx(1.0, abs=1e-4)
    assert metrics["rft_clip_fraction"] == 0.0 and metrics["rft_advantage_raw"] == 0.0
    assert metrics["rft_approx_kl"] == pytest.approx(0.0, abs=1e-6)
    after = [policy(trainer, r) for r in REQUESTS[:2]]
    assert after[0][0] > before[0][0] and after[1][1] < before[1][1]


def test_both_objectives_in_one_update(byte_model):
    """The second one starts from the weights the first one left."""
    trainer = trainer_of(byte_model)
    metrics = trainer.update({"sft": SAMPLES, "rft": SAMPLES})
    assert metrics["sft_samples"] == metrics["rft_samples"] == len(SAMPLES)
    assert trainer.version == 1
    assert metrics["rft_ratio"] == pytest.approx(1.0, abs=1e-4)


async def test_shared_engine_answers_with_the_trained_weights(trainer, tokeniser, reference):
    engine = TransformersEngine(
        trainer.weights().module, tokeniser, max_batch_tokens=4096, lock=trainer.lock
    )
    stale = (await engine.score(REQUESTS[:1]))[0]
    trainer.update({"sft": SAMPLES})
    report = await publish(engine, trainer, REQUESTS[0])
    assert report["canary_diff"] < 1e-4 and report["bytes"] == 0
    fresh = (await engine.score(REQUESTS[:1]))[0]
    expected = reference(trainer.weights().module, REQUESTS[0])
    assert list(fresh.token_logprobs[0]) == pytest.approx(expected[0], abs=1e-4)
    assert fresh.totals() != pytest.approx(stale.totals(), abs=1e-3)


async def test_canary_catches_stale_weights(trainer, tiny, tokeniser):
    class Stale(TransformersEngine):
        async def push_weights(self, weights, version):
            self.weights_version = version
            return {"seconds": 0.0, "bytes": 0.0}

    engine = Stale(tiny(vocab=262), tokeniser, max_batch_tokens=4096)
    trainer.update({"sft": SAMPLES})
    with pytest.raises(StaleWeightsError, match="stale or damaged"):
        await publish(engine, trainer, REQUESTS[0])


async def test_lora_trains_adapters_only_and_an_engine_follows(tiny, tokeniser):
    trainer = trainer_of(tiny(vocab=262), lora=ADAPTERS, learning_rate=2e-2)
    history = [trainer.update({"sft": SAMPLES}) for _ in range(10)]
    assert history[-1]["sft_kl"] < 0.5 * history[0]["sft_kl"]
    assert all("lora_" in name for name in trained_parameters(trainer))
    engine = TransformersEngine(tiny(vocab=262), tokeniser, max_batch_tokens=4096)
    report = await publish(engine, trainer, REQUESTS[0])
    assert report["canary_diff"] < 1e-3


def test_checkpoint_continues_exactly(tiny):
    first = trainer_of(tiny(vocab=262))
    first.update({"sft": SAMPLES})
    saved = through_a_file(first.state_dict())
    first.update({"sft": SAMPLES})

    second = trainer_of(tiny(seed=9, vocab=262))
    second.load_state_dict(saved)
    second.update({"sft": SAMPLES})
    for name, value in trained_parameters(first).items():
        torch.testing.assert_close(value, trained_parameters(second)[name], rtol=0, atol=1e-7)


def test_a_resumed_run_takes_its_own_weight_decay(tiny):
    """AdamW's decay is beside the gradient: it takes lr · weight_decay of each weight."""
    first = trainer_of(tiny(vocab=262))
    first.update({"sft": SAMPLES})
    saved = through_a_file(first.state_dict())

    ends = []
    for decay in (0.0, 0.5):
        trainer = trainer_of(tiny(vocab=262), weight_decay=decay)
        trainer.load_state_dict(copy.deepcopy(saved))
        trainer.update({"sft": SAMPLES})
        ends.append(trained_parameters(trainer))
    for name, value in saved["model"].items():
        decayed = ends[0][name] - 3e-3 * 0.5 * value
        torch.testing.assert_close(ends[1][name], decayed, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("model", "lora", "message"),
    [
        (dict(seed=9), ADAPTERS, r"trained from llama \(.*this run's is llama \("),
        (dict(num_hidden_layers=3), ADAPTERS, r"trained from .*this run's is"),
        (dict(), dataclasses.replace(ADAPTERS, rank=8), r"other weights.*llm\.lora"),
        (dict(), LoraSettings(), r"other weights.*llm\.lora"),
    ],
)
def test_adapters_of_another_model_are_refused_and_nothing_is_lost(tiny, model, lora, message):
    first = trainer_of(tiny(vocab=262), lora=ADAPTERS)
    first.update({"sft": SAMPLES})
    saved = through_a_file(first.state_dict())

    second = trainer_of(tiny(**dict(vocab=262) | model), lora=lora)
    before = through_a_file(second.state_dict())
    with pytest.raises(PriorZeroError, match=message):
        second.load_state_dict(saved)
    after = second.state_dict()
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())
    assert second.version == 0


def test_adapters_fit_their_model_in_another_number_format(tiny):
    published = tiny(vocab=262).to(torch.bfloat16)
    first = trainer_of(copy.deepcopy(published).float(), lora=ADAPTERS)
    first.update({"sft": SAMPLES})
    second = trainer_of(published, lora=ADAPTERS, dtype="bfloat16")
    second.load_state_dict(through_a_file(first.state_dict()))
    trained = first.state_dict()["model"]
    assert all(torch.equal(second.state_dict()["model"][k], v) for k, v in trained.items())


def test_full_weights_of_another_shape_are_refused(tiny):
    saved = through_a_file(trainer_of(tiny(vocab=262)).state_dict())
    with pytest.raises(PriorZeroError, match="this run's is"):
        trainer_of(tiny(vocab=262, intermediate_size=40)).load_state_dict(saved)


def through_a_file(state: dict) -> dict:
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(state), buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def frozen_layers(trainer) -> list[torch.Tensor]:
    modules = trainer.weights().module.modules()
    linear = [m.weight for m in modules if isinstance(m, torch.nn.Linear)]
    return [w for w in linear if not w.requires_grad]


def test_frozen_layers_in_bfloat16_train_as_float32_ones_do(tiny, monkeypatch):
    """Adapters on layers kept in bfloat16 see the very numbers autocast gives float32 layers."""
    fields = dict(dtype="bfloat16", lora=ADAPTERS, learning_rate=2e-2)
    kept = trainer_of(tiny(vocab=262), **fields)
    monkeypatch.setattr(adapters, "store_layers_in", lambda model, dtype: None)
    whole = trainer_of(tiny(vocab=262), **fields)
    assert {w.dtype for w in frozen_layers(kept)} == {torch.bfloat16}
    assert {p.dtype for p in trained_parameters(kept).values()} == {torch.float32}

    with torch.no_grad():
        for name, value in trained_parameters(kept).items():
            trained_parameters(whole)[name].copy_(value)
    for _ in range(3):
        a, b = kept.update({"sft": SAMPLES}), whole.update({"sft": SAMPLES})
        assert a["sft_loss"] == b["sft_loss"] and a["sft_grad_norm"] == b["sft_grad_norm"]

    before = [w.clone() for w in frozen_layers(kept)]
    exact = kept.score(REQUESTS[:1], torch.float32)[0].totals()
    assert exact != kept.score(REQUESTS[:1])[0].totals()
    for now, old in zip(frozen_layers(kept), before, strict=True):
        assert now.dtype == torch.bfloat16 and torch.equal(now, old)


def test_adapters_on_the_last_layers_leave_the_others_alone(tiny):
    lora = dataclasses.replace(ADAPTERS, last_layers=1)
    trainer = trainer_of(tiny(vocab=262), lora=lora, learning_rate=2e-2)
    names = list(trained_parameters(trainer))
    assert names and all(".layers.1." in name for name in names)
    assert len({n.split(".lora_")[0] for n in names}) == 7
    history = [trainer.update({"sft": SAMPLES}) for _ in range(10)]
    assert history[-1]["sft_kl"] < 0.7 * history[0]["sft_kl"]


def test_adapters_on_modules_that_do_not_exist_are_refused(tiny):
    wrong = dataclasses.replace(ADAPTERS, target_modules="nosuch")
    with pytest.raises(PriorZeroError, match="nosuch"):
        trainer_of(tiny(vocab=262), lora=wrong)
