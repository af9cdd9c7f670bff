"""Evaluator: on a scripted game whose every answer is known, and on a real TextWorld game."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from priorzero.games.group import GameEnvGroup
from priorzero.types import PriorZeroError
from priorzero_evaluator import PriorZeroEvaluator
from tests.playing import FakePrior, ScriptedEnv, logprobs, make_watched, told_actions

MODES = ["world_model", "world_model_llm", "llm", "random"]
SIZES = dict(num_simulations=4, action_vocabulary=dict(capacity=64, overflow=4))


@pytest.fixture
def parts(compiled_cfg, encoder, one_thread):
    """(evaluator, envs, prior, policy) on scripted environments."""
    groups = []

    def make(envs, prior: FakePrior | None | str = "fake", transcripts=None, **settings):
        cfg = compiled_cfg(**SIZES | settings)
        policy = make_watched(cfg, encoder)
        group = GameEnvGroup(envs, seed=0)
        groups.append(group)
        prior = FakePrior() if prior == "fake" else prior
        evaluator = PriorZeroEvaluator(
            cfg.policy.settings,
            policy,
            group,
            encoder,
            prior,
            history_length=2,
            seed=0,
            temperature=0.0,
            transcripts=transcripts,
        )
        return SimpleNamespace(evaluator=evaluator, envs=envs, prior=prior, policy=policy)

    yield make
    for group in groups:
        group.close()


@pytest.mark.parametrize("mode", MODES)
async def test_evaluation_plays_whole_episodes_and_writes_them_down(parts, tmp_path, mode):
    envs = [ScriptedEnv(0, length=3), ScriptedEnv(1, length=5, end="truncated")]
    made = parts(envs, transcripts=tmp_path / "out")
    result = await made.evaluator.evaluate(mode, 3, 0, "it7")

    assert sorted(result.lengths) == [3, 3, 5] and sorted(result.returns) == [6, 6, 15]
    assert result.max_score == 40
    values = result.metrics()
    assert values[f"{mode}/return_mean"] == 9
    assert values[f"{mode}/return_std"] == pytest.approx(np.std([6, 6, 15]))
    assert values[f"{mode}/return_best"] == 15 and values[f"{mode}/terminated"] == 2
    assert values[f"{mode}/score_share"] == pytest.approx(9 / 40)
    assert (len(made.prior.calls) > 0) == (mode in ("world_model_llm", "llm"))

    files = sorted((tmp_path / "out").glob("*.txt"))
    assert len(files) == 3 and all(f.name.startswith(f"it7_{mode}_") for f in files)
    text = next(f for f in files if "return15" in f.name).read_text(encoding="utf-8")
    for t, action in enumerate(envs[1].played[0]):
        assert f"env 1 episode 1 step {t}\n\n> {action}\n" in text
    assert "[reward 5]" in text and "[truncated, score 15.0]" in text


async def test_the_llm_alone_plays_its_favourite(parts):
    envs = [ScriptedEnv(1, length=5)]
    await parts(envs).evaluator.evaluate("llm", 1, 0)
    for t, action in enumerate(envs[0].played[0]):
        state = f"env 1 episode 1 step {t}"
        best = max(sum(logprobs(state, a)) for a in told_actions(1, t))
        assert sum(logprobs(state, action)) == best


async def test_a_failing_llm_cannot_play_alone(parts):
    made = parts([ScriptedEnv(0, length=3)], FakePrior(answers=False))
    with pytest.raises(PriorZeroError, match="the LLM engine failed while the LLM alone"):
        await made.evaluator.evaluate("llm", 1, 0)
    # With a search beside it, the search plays on.
    result = await made.evaluator.evaluate("world_model_llm", 1, 0)
    assert result.lengths == (3,)


async def test_a_full_vocabulary_does_not_narrow_the_llms_choice(parts):
    """The LLM alone, and random play, need no ids."""
    crowd = dict(action_vocabulary=dict(capacity=3, overflow=1))
    made = parts([ScriptedEnv(1, length=6)], **crowd)
    await made.evaluator.evaluate("llm", 1, 0)
    told = {actions for _, actions in made.prior.told}
    assert told == {told_actions(1, t) for t in range(6)}


async def test_random_evaluation_is_spread_over_the_valid_actions(parts):
    made = parts([ScriptedEnv(1, length=2)])
    await made.evaluator.evaluate("random", 60, 0)
    first = [played[0] for played in made.envs[0].played]
    assert set(first) == set(told_actions(1, 0))
    assert min(first.count(a) for a in set(first)) > 8


async def test_a_new_episode_starts_with_an_empty_context(parts, encoder):
    """The root looks back on min(time step + 1, C = 3) observations of its own episode."""
    made = parts([ScriptedEnv(0, length=5)])
    await made.evaluator.evaluate("world_model", 3, 0)
    lengths = [len(root.observations) for (roots, *_), _ in made.policy.calls for root in roots]
    assert lengths == [1, 2, 3, 3, 3] * 3


async def test_every_evaluation_plays_the_same_seeds(parts):
    made = parts([ScriptedEnv(0, length=9)])
    for _ in range(2):
        await made.evaluator.evaluate("world_model", 2, 0)
        assert made.envs[0].episode_seed == 2


@pytest.mark.parametrize("mode", MODES)
async def test_an_evaluation_leaves_the_policy_as_it_was(parts, mode):
    """It meets actions that training does not know yet; ids and texts of theirs are gone after."""
    made = parts([ScriptedEnv(2, length=6)])
    made.policy.register_actions(["wait"])
    before = made.policy.learn_mode.state_dict()
    before = {k: _copy(v) if "model" in k else v for k, v in before.items()}

    await made.evaluator.evaluate(mode, 2, 0)
    after = made.policy.learn_mode.state_dict()
    assert after["vocabulary"] == before["vocabulary"] and after["rng"] == before["rng"]
    for network in ("model", "target_model"):
        assert all(torch.equal(v, after[network][k]) for k, v in before[network].items())

    again = await made.evaluator.evaluate("world_model", 2, 0)
    assert len(again.returns) == 2


def _copy(state):
    return {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


async def test_textworld(compiled_cfg, encoder, one_thread, tmp_path, monkeypatch):
    from priorzero.games.env import TextGameEnv

    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    cfg = compiled_cfg(**SIZES | dict(action_vocabulary=dict(capacity=128, overflow=4)))
    group = GameEnvGroup(
        [TextGameEnv(dict(env_id="tw-simple", max_steps=10)) for _ in range(2)], seed=0
    )
    try:
        evaluator = PriorZeroEvaluator(
            cfg.policy.settings,
            make_watched(cfg, encoder),
            group,
            encoder,
            None,
            history_length=2,
            seed=0,
            temperature=0.0,
            transcripts=tmp_path / "out",
        )
        played = [await evaluator.evaluate(mode, 2, 0) for mode in ("world_model", "random")]
    finally:
        group.close()
    assert all(len(e.returns) == 2 and max(e.lengths) <= 10 for e in played)
    assert len(list((tmp_path / "out").glob("*.txt"))) == 4
