"""Each objective's loss and gradient against a slow reference, written from the equations of
docs/ALGORITHM.md in plain torch; and what training with it does.
"""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from priorzero import plugins
from priorzero.llm.scoring.forward import tree_logprobs
from priorzero.llm.scoring.items import prepare
from priorzero.llm.update.build import OBJECTIVES, make_objectives
from priorzero.llm.update.objective import Answer
from priorzero.settings.llm import PromptSettings, ReasoningSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import (
    REQUESTS,
    answer,
    ids,
    policy,
    request,
    rft_settings,
    sample,
    says,
    settings,
    thinking,
    trainer_of,
)

NAMES = plugins.names(OBJECTIVES)
KINDS = [(name, surrogate) for name in NAMES for surrogate in ("clipped", "reinforce")]


def test_all_objectives_are_here():
    assert NAMES == ("action", "sequence", "token")


# ---- the slow reference --------------------------------------------------------------------------


def log_policy(actions: list[torch.Tensor]) -> torch.Tensor:
    totals = torch.stack([tokens.sum() for tokens in actions])
    return totals - totals.exp().sum().log()


def rated(name: str, said, action: int, cot: float, by_token: bool):
    """[(value, the engine's part of it, share, of the thought)] of a decision.

    `by_token`: the sequence's ratio with the gradient of one token after the other, as GSPO-token.
    """
    actions, thought = said
    thoughts = [(value, value, cot / len(thought), True) for value in thought] if cot else []
    if name == "action":
        return [(log_policy(actions)[action], 0.0, 1.0, False), *thoughts]
    tokens = actions[action]
    if name == "token":
        return [(value, 0.0, 1 / len(tokens), False) for value in tokens] + thoughts
    length = len(tokens) + cot * len(thought)
    drawn = cot * sum(thought) / length if cot else 0.0
    value = sum(tokens) / length + drawn
    if not by_token:
        return [(value, drawn, 1.0, False)]
    return [
        (value.detach() + token - token.detach(), drawn, weight / length, of_thought)
        for of_thought, weight, group in ((False, 1.0, tokens), (True, cot, thought))
        for token in group
    ]


def slow_loss(
    name: str, drawn, advantage: float, s, train, new, old, first, ended: float = 0.0
) -> torch.Tensor:
    """Loss of one decision; `new`, `old`, `first`: what the LLM says now, before the phase, before
    all training; `ended`: the share of thoughts that the LLM ended.
    """
    action, cot, beta = drawn.action_index, s.cot_weight, train.kl_coef
    engine = (
        [torch.tensor(t) for t in drawn.collected_logprobs],
        [torch.tensor(t) for t in drawn.thought_logprobs],
    )
    reference = first if s.kl_reference == "initial" else engine

    weight = 1.0
    if s.max_importance:
        pi = math.exp(log_policy(old[0])[action])
        weight = min(s.max_importance, pi / drawn.behaviour[action])

    loss = torch.zeros(())
    apart = s.format_reward > 0
    units = [rated(name, said, action, cot, apart) for said in (new, old, engine, reference)]
    for (x, _, share, of_thought), (x_old, d_old, *_), (x_eng, d_eng, *_), (x_ref, *_) in zip(
        *units, strict=True
    ):
        k_whole = math.exp(x_old - x_eng)
        k = math.exp(d_old - d_eng) if s.max_importance else k_whole
        if s.mismatch == "off":
            k = 1.0
        elif s.mismatch == "truncate":
            k = min(k, s.mismatch_high)
        elif not s.mismatch_low <= k_whole <= s.mismatch_high:
            k = 0.0

        a = advantage - beta * float(x_old - x_ref) if s.kl_estimator == "k1" else advantage
        if of_thought:
            a = a + s.format_reward * ((1.0 if drawn.thought_ended else 0.0) - ended)
        ratio = torch.exp(x - x_old)
        high = train.clip_epsilon if s.clip_epsilon_high is None else s.clip_epsilon_high
        if s.surrogate == "reinforce":
            gain = a * x
        elif a >= 0:
            gain = ratio * a if ratio < 1 + high else torch.tensor((1 + high) * a)
        else:
            gain = (
                ratio * a
                if ratio > 1 - train.clip_epsilon
                else torch.tensor((1 - train.clip_epsilon) * a)
            )
            if s.dual_clip and ratio > s.dual_clip:
                gain = torch.tensor(s.dual_clip * a)
        loss = loss - share * weight * k * gain
        if s.kl_estimator == "k2":
            loss = loss + beta * share * weight * k * (x_ref - x) ** 2 / 2
        if s.kl_estimator == "k3":
            loss = loss + beta * share * weight * k * (torch.exp(x_ref - x) - 1 - (x_ref - x))

    pi = log_policy(new[0])
    if s.kl_estimator == "exact":
        loss = loss + beta * (pi.exp() * (pi - log_policy(reference[0]).float())).sum()
    return loss + train.entropy_coef * (pi.exp() * pi).sum()


def near(model, by: float, seed: int):
    """A copy whose weights are a little off."""
    torch.manual_seed(seed)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight += by * torch.randn_like(weight)
    return other


THOUGHTS = ("Up it is.", "No", "The door, then")
BARE = [
    thinking(
        REQUESTS[i],
        THOUGHTS[i],
        action_index=i,
        behaviour=mu,
        value_target=value,
        thought_ended=i != 1,
    )
    for i, mu, value in (
        (0, (0.3, 0.7), 1.0),
        (1, (0.5, 0.05, 0.45), -2.0),
        (2, (0.25,) * 4, 0.5),
    )
]


def decisions(engine) -> list:
    """The samples with what that model gave to them when they were collected."""
    done = []
    for one in BARE:
        with torch.no_grad():
            actions, thought = says(engine, one)
        done.append(
            dataclasses.replace(
                one,
                collected_logprobs=tuple(tuple(t.tolist()) for t in actions),
                thought_logprobs=tuple(thought.tolist()),
            )
        )
    return done


CASES = {
    "plain": (dict(), dict(kl_coef=0.0)),
    "kl and entropy": (dict(), dict(kl_coef=0.3, entropy_coef=0.2)),
    "importance": (dict(max_importance=2.0), dict(kl_coef=0.0)),
    "clips": (
        dict(clip_epsilon_high=0.02, dual_clip=1.05),
        dict(kl_coef=0.0, clip_epsilon=0.01),
    ),
    "truncated": (dict(mismatch="truncate", mismatch_high=1.0), dict(kl_coef=0.0)),
    "truncated thought": (
        dict(mismatch="truncate", mismatch_high=1.01, max_importance=2.0),
        dict(kl_coef=0.0),
    ),
    "masked": (dict(mismatch="mask", mismatch_low=0.8, mismatch_high=1.1), dict(kl_coef=0.0)),
    "k1": (dict(kl_estimator="k1"), dict(kl_coef=0.5)),
    "k2": (dict(kl_estimator="k2", kl_reference="initial"), dict(kl_coef=0.5)),
    "k3": (dict(kl_estimator="k3", max_importance=2.0), dict(kl_coef=0.5)),
    "exact to initial": (dict(kl_reference="initial"), dict(kl_coef=0.5)),
    "reinforce": (dict(surrogate="reinforce"), dict(kl_coef=0.0)),
    "reinforce with all corrections": (
        dict(
            surrogate="reinforce",
            max_importance=2.0,
            mismatch="truncate",
            mismatch_high=1.01,
            kl_estimator="k3",
        ),
        dict(kl_coef=0.3, entropy_coef=0.1),
    ),
    "format": (dict(format_reward=0.8), dict(kl_coef=0.0)),
    "format with clips": (
        dict(format_reward=2.0, clip_epsilon_high=0.02, kl_estimator="k1"),
        dict(kl_coef=0.5, clip_epsilon=0.01),
    ),
    "format with reinforce": (
        dict(format_reward=0.8, surrogate="reinforce", kl_estimator="k2"),
        dict(kl_coef=0.3),
    ),
}
WITH_THOUGHTS = [(case, cot) for case in CASES for cot in (0.0, 0.7) if cot or "format" not in case]


@pytest.mark.parametrize(("case", "cot"), WITH_THOUGHTS)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradient_are_those_of_the_equations(name, case, cot, byte_model):
    model = byte_model
    old, engine, first = (near(model, by, i) for i, by in enumerate((0.005, 0.01, 0.02)))
    drawn = decisions(engine)
    fields, train = CASES[case]
    chosen = rft_settings(objective=name, cot_weight=cot, advantage="raw", **fields)
    objective = make_objectives(settings(rft=chosen, **train), "sum")["rft"]

    def score(samples, *, thoughts=False, initial=False):
        return [answer(first if initial else old, one, thoughts) for one in samples]

    # Ours: one forward of all decisions, as the trainer runs it.
    prepared, _ = objective.prepare(drawn, score)
    items = prepare([d.request for d in drawn], [d.written if cot else range(0) for d in drawn])
    losses = []
    for item, flat, target in zip(items, tree_logprobs(model, items), prepared, strict=True):
        count = len(flat) - len(item.written)
        said = Answer(item.request, flat[:count], flat[count:])
        losses.append(objective.loss(said, target)[0])
    weights = list(model.parameters())
    ours = torch.autograd.grad(sum(losses), weights)

    # The equations.
    train_settings = settings(**train).train
    expected = []
    for one in drawn:
        with torch.no_grad():
            before, begin = says(old, one), says(first, one)
        expected.append(
            slow_loss(
                name,
                one,
                one.advantage,
                chosen,
                train_settings,
                says(model, one),
                before,
                begin,
                ended=2 / 3,
            )
        )
    theirs = torch.autograd.grad(sum(expected), weights)

    assert [v.item() for v in losses] == pytest.approx([v.item() for v in expected], abs=2e-4)
    largest = max(float(g.abs().max()) for g in theirs)
    assert largest > 1e-3
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) < 2e-3 * largest


def test_the_cases_reach_what_they_are_for(byte_model):
    """Clips cut, masks mask, limits truncate: otherwise the comparison above would show nothing."""
    old, engine = near(byte_model, 0.005, 0), near(byte_model, 0.01, 1)
    drawn = decisions(engine)

    def phase(name, case):
        fields, train = CASES[case]
        chosen = rft_settings(objective=name, cot_weight=0.7, advantage="raw", **fields)
        objective = make_objectives(settings(rft=chosen, **train), "sum")["rft"]
        score = lambda samples, *, thoughts=False, initial=False: [  # noqa: E731
            answer(old, one, thoughts) for one in samples
        ]
        prepared, metrics = objective.prepare(drawn, score)
        said = [answer(byte_model, one) for one in drawn]
        clipped = [
            float(objective.loss(a, t)[1]["clip_fraction"])
            for a, t in zip(said, prepared, strict=True)
        ]
        return metrics | {"clipped": sum(clipped)}

    assert 0 < phase("token", "masked")["mismatch_masked"] < 1
    assert 0 < phase("token", "truncated")["mismatch_ess"] < 1
    assert 0 < phase("action", "importance")["importance_truncated"] < 1
    assert all(phase(name, "clips")["clipped"] > 0 for name in NAMES)


def test_a_phase_of_the_trainer_is_that_of_the_equations(tiny):
    """Two passes of one step each: loss and gradient norm, the second with ratios other than 1."""
    for name, surrogate in KINDS:
        model = tiny(vocab=262)
        drawn = decisions(near(model, 0.01, 1))
        chosen = rft_settings(
            objective=name, surrogate=surrogate, cot_weight=0.5, epochs=2, max_importance=2.0
        )
        fields = dict(rft=chosen, kl_coef=0.1, learning_rate=1e-3)

        slow, train = copy.deepcopy(model), settings(**fields).train
        with torch.no_grad():
            before = [says(slow, one) for one in drawn]
        raw = torch.tensor([one.advantage for one in drawn])
        scaled = (raw - raw.mean()) / raw.std(correction=0)
        optimizer = torch.optim.AdamW(slow.parameters(), 1e-3, betas=(0.9, 0.95), weight_decay=0)
        losses, norms = [], []
        for _ in range(2):
            optimizer.zero_grad()
            loss = sum(
                slow_loss(name, one, float(a), chosen, train, says(slow, one), old, None)
                for one, a, old in zip(drawn, scaled, before, strict=True)
            ) / len(drawn)
            loss.backward()
            losses.append(loss.item())
            norms.append(float(torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0)))
            optimizer.step()

        metrics = trainer_of(model, **fields).update({"rft": drawn})
        assert metrics["rft_loss"] == pytest.approx(sum(losses) / 2, abs=2e-4)
        assert metrics["rft_grad_norm"] == pytest.approx(sum(norms) / 2, rel=2e-3)


# ---- what an objective does ----------------------------------------------------------------------


def totals(trainer, asked) -> list[float]:
    return trainer.score([asked])[0].totals()


@pytest.mark.parametrize(("name", "surrogate"), KINDS)
def test_good_actions_get_likelier_and_bad_ones_less(name, surrogate, byte_model):
    """Over the valid actions, and in the probability of their texts."""
    chosen = rft_settings(objective=name, surrogate=surrogate, advantage="raw")
    trainer = trainer_of(byte_model, rft=chosen, learning_rate=1e-3)
    good = sample(REQUESTS[2], value_target=1.0)
    bad = sample(request("Cellar.\nAction:", ("us", "in", "open")), action_index=1, value_target=-1)
    before = [(policy(trainer, s.request), totals(trainer, s.request)) for s in (good, bad)]
    for _ in range(3):
        trainer.update({"rft": [good, bad]})
    after = [(policy(trainer, s.request), totals(trainer, s.request)) for s in (good, bad)]

    assert after[0][0][0] > before[0][0][0] and after[1][0][1] < before[1][0][1]
    if name != "action":  # whose policy is over the valid actions only
        assert after[0][1][0] > before[0][1][0] and after[1][1][1] < before[1][1][1]


@pytest.mark.parametrize(("name", "surrogate"), KINDS)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_thoughts_move_with_their_weight_and_not_without(name, surrogate, advantage, tiny):
    """Without, training is to the last bit what it is where the thought is part of the prompt."""
    fields = dict(value_target=advantage, action_index=1)
    thoughtful = thinking(REQUESTS[0], "Up it is.", **fields)
    given = sample(thoughtful.request, **fields)
    ends = {}
    for cot in (0.0, 2.0):
        for drawn in (thoughtful, given):
            model = tiny(vocab=262)
            chosen = rft_settings(
                objective=name, surrogate=surrogate, cot_weight=cot, advantage="raw"
            )
            trainer = trainer_of(model, rft=chosen, learning_rate=1e-4)
            before = says(model, thoughtful)[1].sum().item()
            trainer.update({"rft": [drawn]})
            change = says(model, thoughtful)[1].sum().item() - before
            ends[cot, drawn is given] = change, [p.detach().clone() for p in model.parameters()]

    same = zip(ends[0.0, False][1], ends[0.0, True][1], strict=True)
    assert all(torch.equal(a, b) for a, b in same)
    assert ends[2.0, False][0] * advantage > 0
    assert (ends[2.0, False][0] - ends[0.0, False][0]) * advantage > 0.01


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_a_thought_without_weight(name, byte_model):
    drawn = thinking(REQUESTS[0], "Up it is.", value_target=1.0)
    for cot in (0.0, 0.5):
        chosen = rft_settings(objective=name, cot_weight=cot, advantage="raw")
        objective = make_objectives(settings(rft=chosen), "sum")["rft"]
        said = answer(byte_model, drawn)
        (target,), _ = objective.prepare([drawn], lambda *_, said=said, **__: [said])
        thought = said.thought.clone().requires_grad_()
        actions = said.actions.clone().requires_grad_()
        loss, _ = objective.loss(Answer(drawn.request, actions, thought), target)
        gradient = torch.autograd.grad(loss, thought, allow_unused=True)[0]
        assert (gradient is None or not gradient.any()) == (cot == 0.0)
        if cot:
            assert (gradient < 0).all(), "likelier thoughts lower the loss of a good decision"


@pytest.mark.parametrize(("name", "surrogate"), KINDS)
def test_the_format_reward_is_for_the_thoughts_tokens_alone(name, surrogate, byte_model):
    """As good as expected, three thoughts, of which two were ended: +1/3 and -2/3 of the reward."""
    drawn = [
        thinking(REQUESTS[i], THOUGHTS[i], thought_ended=ended)
        for i, ended in enumerate((True, False, True))
    ]
    chosen = rft_settings(
        objective=name, surrogate=surrogate, cot_weight=1.0, advantage="raw", format_reward=0.6
    )
    objective = make_objectives(settings(rft=chosen), "sum")["rft"]
    said = [answer(byte_model, one) for one in drawn]
    targets, metrics = objective.prepare(drawn, lambda *_, **__: said)
    assert metrics["reasoning_ended"] == pytest.approx(2 / 3)

    for one, target, given in zip(said, targets, (0.2, -0.4, 0.2), strict=True):
        thought, actions = (x.clone().requires_grad_() for x in (one.thought, one.actions))
        loss, _ = objective.loss(Answer(one.request, actions, thought), target)
        of_thought, of_actions = torch.autograd.grad(loss, (thought, actions))
        assert not of_actions.any()
        share = 1 / len(thought)  # of each token in a thought's weight
        if name == "sequence":
            share = 1 / (len(thought) + len(one.tokens(0)))
        assert of_thought.tolist() == pytest.approx([-given * share] * len(thought), rel=1e-5)


def test_the_format_reward_is_silent_where_all_thoughts_are_alike(byte_model):
    """All ended, none, or no thought at all: nothing is added, and without thoughts no rate."""
    chosen = rft_settings(cot_weight=1.0, advantage="raw", format_reward=5.0)
    for ended in (True, False):
        drawn = [thinking(REQUESTS[0], "Up it is.", thought_ended=ended, value_target=1.0)] * 2
        drawn.append(sample(REQUESTS[1], value_target=1.0))
        objective = make_objectives(settings(rft=chosen), "sum")["rft"]
        said = [answer(byte_model, one) for one in drawn]
        targets, metrics = objective.prepare(drawn, lambda *_, said=said, **__: said)
        assert metrics["reasoning_ended"] == float(ended)
        assert all((target.advantage == 1.0).all() for target in targets)
        _, metrics = objective.prepare(drawn[2:], lambda *_, said=said, **__: said[2:])
        assert "reasoning_ended" not in metrics


@pytest.mark.parametrize(
    ("rft", "more", "message"),
    [
        (dict(format_reward=1.0), dict(prompt=PromptSettings()), "without prompt.use_cot"),
        (dict(format_reward=1.0), {}, "rft.cot_weight is 0"),
        (dict(format_reward=-1.0, cot_weight=1.0), {}, "must not be negative"),
        (dict(surrogate="vanilla"), {}, "clipped or reinforce"),
        (dict(surrogate="reinforce", dual_clip=3.0), {}, "no ratio that could be clipped"),
        (dict(surrogate="reinforce", clip_epsilon_high=0.3), {}, "no ratio that could be clipped"),
        (
            dict(cot_weight=1.0),
            dict(reasoning=ReasoningSettings(temperature=0.7)),
            "the policy at temperature 1",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(rft, more, message):
    with pytest.raises(PriorZeroError, match=message):
        settings(rft=rft_settings(**rft), **more)


def test_units_by_hand():
    """Action 1 has the tokens -2, -1, -1, -0.5 (" us" and the terminator), a thought -1, -3."""
    asked = REQUESTS[0].with_thought(ids("ab") + ids("\nAction:"))
    flat = torch.tensor([-1.0, -1.0, -1.0, -0.5, -2.0, -1.0, -1.0, -0.5])
    said = Answer(asked, flat, torch.tensor([-1.0, -3.0]))

    def units(name, cot):
        return plugins.load(OBJECTIVES, name).make("sum", cot).units(said, 1)

    log_pi = -math.log1p(math.exp(1.0))  # totals -3.5 and -4.5
    assert units("action", 0.0).value.tolist() == pytest.approx([log_pi])
    assert units("action", 0.5).value.tolist() == pytest.approx([log_pi, -1.0, -3.0])
    assert units("action", 0.5).share.tolist() == pytest.approx([1.0, 0.25, 0.25])
    assert units("action", 0.5).drawn.tolist() == pytest.approx([0.0, -1.0, -3.0])
    assert units("token", 0.0).value.tolist() == pytest.approx([-2.0, -1.0, -1.0, -0.5])
    assert units("token", 0.5).share.tolist() == pytest.approx([0.25] * 4 + [0.25] * 2)
    assert units("sequence", 0.0).value.tolist() == pytest.approx([-4.5 / 4])
    assert units("sequence", 0.0).thought.tolist() == [False]
    assert units("sequence", 1.0).value.tolist() == pytest.approx([-8.5 / 6] * 2)
    assert units("sequence", 1.0).share.tolist() == pytest.approx([4 / 6, 2 / 6])
    assert units("sequence", 0.5).drawn.tolist() == pytest.approx([-2.0 / 5] * 2)
    assert units("sequence", 0.5).thought.tolist() == [False, True]
    assert units("token", 0.5).thought.tolist() == [False] * 4 + [True] * 2
    assert units("action", 0.5).thought.tolist() == [False] + [True] * 2
