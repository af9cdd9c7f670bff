"""Decisions in ORZ's packs: who is rated with what, who is in which pack, and that ORZ's loss of
them has the gradient of the built-in trainer's.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from priorzero.llm.update.objectives import token
from priorzero.llm.update.orz.packs import RatedDecision, plan_packs, rate
from priorzero.llm.update.rft import RFT, RFTTarget
from priorzero.settings.llm import LLMTrainSettings
from tests.llm.decisions import REQUESTS, answer, ids, rft_settings, sample, says, thinking


def decision(length: int, rated: int = 2, advantage: float = 1.0) -> RatedDecision:
    return RatedDecision(
        tuple(range(3, 3 + length)),
        torch.full((rated,), advantage, dtype=torch.float64),
        torch.full((rated,), math.nan, dtype=torch.float64),
    )


def test_an_action_is_rated_by_its_shares_of_weight_and_advantage():
    played = sample(REQUESTS[0], action_index=1)
    action = REQUESTS[0].action_ids[1]
    assert len(action) == 4  # space, u, s, terminator
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    reference = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64)
    target = RFTTarget(
        1, torch.full((4,), -3.0, dtype=torch.float64), torch.zeros(4).double(), weights, reference
    )

    rated = rate(played, target, token.make("sum", 0.0))

    assert rated.ids == REQUESTS[0].prompt_ids + action
    assert rated.advantages.tolist() == [-0.75, -0.375, -1.5, -0.75]
    assert rated.reference.tolist() == [-1.0, -2.0, -3.0, -4.0]


def test_a_thought_is_rated_where_it_stands_and_its_marker_is_not():
    thought = thinking(REQUESTS[0], "hm", action_index=0)
    marker = ids("\nAction:")
    action = thought.request.action_ids[0]
    numbers = torch.arange(1.0, len(action) + 3, dtype=torch.float64)  # the action's come first
    target = RFTTarget(
        0, numbers, torch.zeros_like(numbers), torch.ones_like(numbers), numbers.clone()
    )

    rated = rate(thought, target, token.make("sum", 0.5))

    share, of_thought = 1 / len(action), 0.5 / 2
    last = len(action)
    expected = [of_thought * (last + 1), of_thought * (last + 2)]
    expected += [0.0] * len(marker) + [share * (i + 1) for i in range(last)]
    assert rated.advantages.tolist() == pytest.approx(expected)
    assert rated.ids[-len(expected) :] == (*ids("hm"), *marker, *action)
    unknown = rated.reference.isnan().tolist()
    assert unknown == [False] * 2 + [True] * len(marker) + [False] * last

    without = rate(
        thought,
        RFTTarget(0, *(n[:last] for n in (numbers, numbers, numbers)), None),
        token.make("sum", 0.0),
    )
    assert len(without.advantages) == last and without.reference.isnan().all()


@pytest.mark.parametrize("seed", range(20))
def test_every_decision_is_trained_once_in_the_step_it_belongs_to(seed):
    draw = random.Random(seed)
    decisions = [decision(draw.randint(4, 30)) for _ in range(draw.randint(1, 17))]
    size, workers = draw.choice([0, 1, 3, 5, 8]), draw.choice([1, 2, 3])
    limit = draw.choice([0, 12, 40, 1000])

    plan = plan_packs(decisions, step_size=size, workers=workers, max_tokens=limit)

    steps = -(-len(decisions) // (size or len(decisions)))
    assert plan.steps == steps
    assert len(plan.packs) == workers
    assert len({len(own) for own in plan.packs}) == 1, "a worker waits for the others at each step"
    per_step = len(plan.packs[0]) // steps
    assert per_step * steps == len(plan.packs[0])

    for step in range(steps):
        wanted = decisions[step * size : (step + 1) * size] if size else decisions
        packs = [p for own in plan.packs for p in own[step * per_step : (step + 1) * per_step]]
        trained = [id(d) for p in packs if p.factor for d in p.decisions]
        assert sorted(trained) == sorted(map(id, wanted))
        for pack in packs:
            assert pack.factor in (0.0, pytest.approx(len(packs) / len(wanted)))
            tokens = sum(len(d.ids) for d in pack.decisions)
            assert len(pack.decisions) == 1 or tokens <= limit


def test_a_pack_in_orzs_form():
    """Two decisions by hand; 3 packs of a step with 2 decisions: the factor is 3 / 2, the pack has
    3 rated tokens.
    """
    from priorzero.llm.update.orz.packs import Pack

    first, second = decision(4, 2, 1.0), decision(3, 1, -2.0)
    tensors = Pack((first, second), 3 / 2).tensors()

    assert tensors.sequences.tolist() == [[3, 4, 5, 6, 3, 4, 5]]
    assert tensors.attention_mask.tolist() == [[1, 1, 1, 1, 2, 2, 2]]
    assert (tensors.num_actions, tensors.packed_seq_lens) == ([2, 1], [4, 3])
    assert tensors.advantages.tolist() == [[4.5, 4.5, -9.0]]
    assert tensors.reference.isnan().tolist() == [[True] * 3]


@pytest.mark.parametrize(("workers", "limit", "cot"), [(1, 0, 0.0), (2, 60, 0.0), (2, 100, 0.5)])
def test_orzs_loss_of_the_packs_is_the_built_in_trainers(tiny, workers, limit, cot):
    """Gradient by gradient, with old policy, importance weights and clipping: ORZ's loss written
    down here as its paper and code have it, against `RFT.loss`.
    """
    model = tiny(vocab=262)
    other = tiny(seed=1, vocab=262)  # what the policy was before the phase
    with torch.no_grad():
        for p, q in zip(other.parameters(), model.parameters(), strict=True):
            p.copy_(q + 0.02 * torch.randn_like(q))
    thoughts = [thinking(r, "hm!", action_index=i % 2) for i, r in enumerate(REQUESTS[:2])]
    plain = [sample(r, action_index=i % 2) for i, r in enumerate(REQUESTS[2:5])]
    samples = thoughts + plain
    samples = [
        type(s)(**{**s.__dict__, "value_target": v, "behaviour": (0.9, 0.1, 0.0, 0.0)[: len(b)]})
        for s, v, b in zip(samples, (3, -2, 1, -4, 2), [s.behaviour for s in samples], strict=True)
    ]
    rft = RFT(
        rft_settings(objective="token", max_importance=1.5, cot_weight=cot),
        LLMTrainSettings(kl_coef=0.0),
        "sum",
        token.make("sum", cot),
    )
    targets, _ = (
        rft.prepare(
            samples,
            lambda found, *, thoughts=False, initial=False: [answer(other, s) for s in found],
        )
        if cot
        else rft.prepare(
            samples,
            lambda found, *, thoughts=False, initial=False: [
                answer(other, s, thoughts=False) for s in found
            ],
        )
    )

    losses = []
    for s, target in zip(samples, targets, strict=True):
        actions, thought = says(model, s)
        from priorzero.llm.update.objective import Answer

        kept = thought if cot else thought[:0]
        losses.append(rft.loss(Answer(s.request, torch.cat(actions), kept), target)[0])
    ours = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))

    plan = plan_packs(
        [rate(s, t, token.make("sum", cot)) for s, t in zip(samples, targets, strict=True)],
        step_size=0,
        workers=workers,
        max_tokens=limit,
    )
    losses, clipped = [], 0
    for own in plan.packs:
        for pack in own:
            new = torch.cat([_last(model, d) for d in pack.decisions])
            with torch.no_grad():
                old = torch.cat([_last(other, d) for d in pack.decisions])
            ratio, advantage = (new - old).exp(), pack.tensors().advantages[0]
            bounded = ratio.clamp(0.8, 1.2) * advantage
            losses.append(-torch.minimum(ratio * advantage, bounded).mean())
            clipped += int((bounded < ratio * advantage).sum())
    theirs = torch.autograd.grad(torch.stack(losses).mean(), list(model.parameters()))

    assert clipped, "the clip must have been at work"
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _last(model, of: RatedDecision) -> torch.Tensor:
    """Log-probabilities of the rated tokens, by a forward over this decision alone."""
    row = torch.tensor([of.ids])
    logits = model(row).logits[0].log_softmax(-1)
    rated = len(of.advantages)
    return logits[-rated - 1 : -1].gather(1, row[0, -rated:, None])[:, 0]
