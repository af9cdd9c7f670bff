"""What reinforcement prepares of a phase, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from priorzero.llm.update.build import make_objectives
from priorzero.llm.update.objective import Answer
from priorzero.llm.update.rft import RFT
from tests.llm.decisions import (
    ACTIONS,
    REQUESTS,
    policy,
    request,
    rft_settings,
    sample,
    settings,
    trainer_of,
)

# Two actions of total log-probability log(1/4) and log(3/4), in tokens of " up" and the terminator.
QUARTER = ((math.log(0.25), 0.0, 0.0, 0.0), (math.log(0.5), math.log(1.5), 0.0, 0.0))
HALF = ((math.log(0.5), 0.0, 0.0, 0.0),) * 2
TWO = REQUESTS[0]


def scored(token_logprobs):
    """A trainer whose LLM gives these to every decision."""
    flat = torch.tensor([v for tokens in token_logprobs for v in tokens], dtype=torch.float64)
    empty = torch.empty(0, dtype=torch.float64)

    def score(samples, *, thoughts=False, initial=False):
        return [Answer(s.request, flat, empty) for s in samples]

    return score


def rft(reduction: str = "sum", kl_coef: float = 0.0, **fields) -> RFT:
    usual = dict(max_importance=2.0)
    chosen = settings(rft=rft_settings(**usual | fields), kl_coef=kl_coef)
    return make_objectives(chosen, reduction)["rft"]


def test_only_what_is_enabled_is_trained_and_sft_goes_first():
    both = settings()
    assert list(make_objectives(both, "sum")) == ["sft", "rft"]
    both.sft.enable = False
    assert list(make_objectives(both, "sum")) == ["rft"]


def test_advantages_are_normalised_over_the_phase():
    drawn = [sample(TWO, value_target=v, predicted_value=1.0) for v in (0.0, 1.0, 5.0)]
    targets, metrics = rft().prepare(drawn, scored(QUARTER))
    mean, spread = 1.0, math.sqrt((4 + 1 + 9) / 3)
    by_hand = [(a - mean) / spread for a in (-1.0, 0.0, 4.0)]
    assert [float(t.advantage) for t in targets] == pytest.approx(by_hand, abs=1e-5)
    assert metrics["advantage_raw"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("limit", "behaviour", "weight"),
    [
        (2.0, (0.5, 0.5), 0.5),  # pi = 1/4, mu = 1/2
        (2.0, (0.05, 0.95), 2.0),  # 5, truncated
        (0.0, (0.05, 0.95), 1.0),  # switched off
    ],
)
def test_the_importance_weight_is_truncated(limit, behaviour, weight):
    drawn = [sample(TWO, behaviour=behaviour)]
    targets, metrics = rft(max_importance=limit).prepare(drawn, scored(QUARTER))
    assert float(targets[0].weight) == pytest.approx(weight)
    assert float(targets[0].old) == pytest.approx(math.log(0.25))
    assert metrics["importance_mean"] == pytest.approx(weight)
    assert metrics["importance_truncated"] == (1.0 if weight == 2.0 else 0.0)


def test_the_effective_sample_size_of_the_phase():
    """Weights 1/2 and 2: (2.5)^2 / (2 * 4.25)."""
    drawn = [sample(TWO, behaviour=(0.5, 0.5)), sample(TWO, behaviour=(0.05, 0.95))]
    _, metrics = rft().prepare(drawn, scored(QUARTER))
    assert metrics["importance_ess"] == pytest.approx(6.25 / 8.5)
    assert metrics["importance_mean"] == pytest.approx(1.25)


def test_the_reference_is_the_policy_that_collected():
    drawn = [sample(TWO, collected_logprobs=HALF), sample(TWO)]
    targets, _ = rft().prepare(drawn, scored(QUARTER))
    assert targets[0].reference.tolist() == pytest.approx([math.log(0.5)] * 2)
    assert targets[1].reference is None


def test_mean_reduction_is_used_on_both_sides():
    targets, _ = rft("mean").prepare([sample(TWO)], scored(((-8.0, 0, 0, 0), (-1.0,) * 4)))
    assert float(targets[0].old) == pytest.approx(-math.log1p(math.exp(1.0)))


class TestMismatch:
    """Trainer 1/4, engine 1/2: k = 1/2 for the first action; 3/2 for the second."""

    drawn = [sample(TWO, action_index=i, collected_logprobs=HALF) for i in range(2)]

    @pytest.mark.parametrize(
        ("fields", "weights", "masked"),
        [
            (dict(), (1.0, 1.0), 0.0),
            (dict(mismatch="truncate"), (0.5, 1.5), 0.0),
            (dict(mismatch="truncate", mismatch_high=1.2), (0.5, 1.2), 0.0),
            (dict(mismatch="mask", mismatch_low=0.6), (0.0, 1.5), 0.5),
            (dict(mismatch="mask", mismatch_high=1.2), (0.5, 0.0), 0.5),
        ],
    )
    def test_weights_where_nothing_corrects_for_the_search(self, fields, weights, masked):
        targets, metrics = rft(max_importance=0.0, **fields).prepare(self.drawn, scored(QUARTER))
        assert [float(t.weight) for t in targets] == pytest.approx(weights)
        assert metrics["mismatch_masked"] == masked
        assert metrics["mismatch_mean"] == pytest.approx(sum(weights) / 2)
        gap = (math.log(2) + math.log(1.5)) / 2
        assert metrics["mismatch_gap"] == pytest.approx(gap)

    @pytest.mark.parametrize(
        ("fields", "weights"),
        [
            (dict(mismatch="truncate"), (0.5, 1.5)),
            (dict(mismatch="mask", mismatch_low=0.6), (0.0, 1.5)),
        ],
    )
    def test_pi_over_mu_is_not_counted_twice(self, fields, weights):
        """1/4 and 3/4 over 1/2: what the engine gave to an action that the search drew plays no
        part, but it can mask it.
        """
        targets, _ = rft(**fields).prepare(self.drawn, scored(QUARTER))
        assert [float(t.weight) for t in targets] == pytest.approx(weights)

    def test_without_an_engines_answer_nothing_is_corrected(self):
        off = rft(max_importance=0.0, mismatch="mask", mismatch_low=1.0)
        targets, metrics = off.prepare([sample(TWO)], scored(QUARTER))
        assert float(targets[0].weight) == 1.0 and metrics["mismatch_gap"] == 0.0


def test_the_kl_coefficient_follows_its_target():
    objective = rft(kl_coef=0.1, kl_target=0.02)
    for kl, after in ((0.02, 0.1), (0.04, 0.2), (0.029, 0.2), (0.01, 0.1), (0.0, 0.05)):
        objective.finish({"kl_reference": kl})
        assert objective.state_dict()["kl_coef"] == pytest.approx(after)
    fixed = rft(kl_coef=0.1)
    fixed.finish({"kl_reference": 9.0})
    assert fixed.state_dict()["kl_coef"] == 0.1


def test_what_is_remembered_between_phases_is_kept():
    adapting = dict(kl_target=0.1, advantage="running")
    first, second = rft(kl_coef=0.1, **adapting), rft(kl_coef=0.3, **adapting)
    drawn = [sample(TWO, value_target=v) for v in (1.0, 3.0)]
    first.prepare(drawn, scored(QUARTER))
    first.finish({"kl_reference": 1.0})
    second.load_state_dict(first.state_dict())
    both = [o.prepare([sample(TWO, value_target=2.5)], scored(QUARTER)) for o in (first, second)]
    (a,), (b,) = both[0][0], both[1][0]
    assert float(a.advantage) == float(b.advantage) != 0.0
    assert both[1][1]["kl_coef"] == 0.2

    # A weight that is fixed is the setting's, also where a run goes on with another.
    fixed = rft(kl_coef=0.0)
    fixed.load_state_dict(first.state_dict())
    assert fixed.prepare(drawn, scored(QUARTER))[1]["kl_coef"] == 0.0


def test_a_hopeless_action_has_its_true_ratio(byte_model):
    """Actions of very unlikely texts: the old policy is the new one, down to the smallest."""
    asked = request("Room 1.\nAction:", (ACTIONS[0], "say " + "supercalifragilistic " * 2))
    trainer = trainer_of(byte_model, kl_coef=0.1)
    collected = trainer.score([asked])[0].token_logprobs
    assert sum(collected[1]) < sum(collected[0]) - 100

    drawn = sample(asked, action_index=1, value_target=1.0, collected_logprobs=collected)
    metrics = trainer.update({"rft": [drawn]})

    assert metrics["rft_ratio"] == pytest.approx(1.0, abs=1e-3)
    assert metrics["rft_approx_kl"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["rft_kl_reference"] == pytest.approx(0.0, abs=1e-5)
    assert metrics["rft_mismatch_gap"] == pytest.approx(0.0, abs=1e-5)


DRAWN = [sample(r, value_target=float(1 - 2 * (i % 2))) for i, r in enumerate(REQUESTS)]


def test_several_epochs_let_the_clip_act_and_the_kl_ends_them(tiny):
    """A bound on the KL ends the phase before the step that would be taken beyond it: the policy is
    the one of a phase with as many passes.
    """
    ends = {}
    for epochs, max_kl in ((1, 0.0), (2, 0.0), (8, 0.0), (8, 0.005)):
        chosen = rft_settings(epochs=epochs, max_kl=max_kl)
        trainer = trainer_of(tiny(vocab=262), rft=chosen, learning_rate=1e-4)
        metrics = trainer.update({"rft": DRAWN})
        ends[epochs, max_kl] = metrics, policy(trainer, REQUESTS[1])
    assert [metrics["rft_epochs"] for metrics, _ in ends.values()] == [1.0, 2.0, 8.0, 2.0]
    clipped = [metrics["rft_clip_fraction"] for metrics, _ in ends.values()]
    assert clipped[0] == 0.0 < clipped[2]
    assert torch.equal(ends[8, 0.005][1], ends[2, 0.0][1])
    assert not torch.equal(ends[8, 0.005][1], ends[8, 0.0][1])


@pytest.mark.parametrize("adapters", [False, True])
def test_the_initial_policy_stays_the_reference(tiny, adapters):
    """0 before the first step, growing while the LLM learns, and the same after a resume."""
    from priorzero.settings.llm import LoraSettings

    fields = dict(
        rft=rft_settings(kl_reference="initial"),
        lora=LoraSettings(enable=adapters, rank=4),
        learning_rate=1e-2,
    )
    trainer = trainer_of(tiny(vocab=262), **fields)
    before = policy(trainer, REQUESTS[0])
    history = [trainer.update({"rft": DRAWN})["rft_kl_reference"] for _ in range(4)]
    assert history[0] == pytest.approx(0.0, abs=1e-6)
    assert 1e-4 < history[1] < history[3]

    # The KL over the valid actions, from the two policies.
    after = policy(trainer, REQUESTS[0])
    by_hand = float((after.exp() * (after - before)).sum())
    resumed = trainer_of(tiny(vocab=262), **fields)
    resumed.load_state_dict(trainer.state_dict())
    metrics = resumed.update({"rft": [sample(REQUESTS[0], value_target=1.0)]})
    assert metrics["rft_kl_reference"] == pytest.approx(by_hand, rel=1e-3)
