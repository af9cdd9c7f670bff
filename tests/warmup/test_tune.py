"""Split, targets and training, with a tiny LLM on decisions that can be learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from priorzero.evidence.walk import Walk, WalkStep, chosen_step
from priorzero.games.jericho_stories import STORIES
from priorzero.games.records import GameSpec
from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.update.trainers import builtin
from priorzero.settings.llm import LLMSettings, LoraSettings
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import PriorZeroError, TextState
from priorzero.warmup.examples import drawn, hold_out, make_examples
from priorzero.warmup.tune import Tuning, plain_request, train_settings

SPEC = GameSpec("", "jericho", "", "", "Win.", 10.0, 50, "key")
COLOURS = ("red", "blue", "green", "grey", "black", "white")


def of_game(name: str, decisions: int = 1) -> Walk:
    if ":" in name:
        spec = replace(SPEC, env_id=name, kind="textworld", title=name.partition(":")[0])
    else:
        spec = replace(SPEC, env_id=name, title=STORIES[name].title)
    return Walk(spec, tuple(lamp(COLOURS[i % 6]) for i in range(decisions)))


def lamp(colour: str) -> WalkStep:
    """What is to be learnt: red is always right, whatever is seen."""
    state = TextState(f"A {colour} lamp is here.", tuple(f"take {c}" for c in COLOURS))
    return chosen_step(state, "take red", idle=False)


# ---- split and targets ---------------------------------------------------------------------------


def test_relatives_are_never_on_both_sides():
    names = ["zork1", "zork2", "enchanter", "curses", "infidel", "inhumane", "905", "gold"]
    for seed in range(10):
        walks = [of_game(name) for name in names]
        train, held = hold_out(walks, 0.3, np.random.default_rng(seed))
        assert len(train) + len(held) == len(walks)
        sides = [{w.game.env_id for w in side} for side in (train, held)]
        for family in ({"zork1", "zork2", "enchanter"}, {"infidel", "inhumane"}):
            assert sum(bool(family & side) for side in sides) == 1
        # Five families, 0.3 of them rounded up.
        assert len(held) >= 2


def test_some_games_of_each_generator_are_held_out():
    walks = [of_game(f"{kind}:seed={s}") for kind in ("tw-simple", "tw-coin") for s in range(4)]
    _, held = hold_out(walks, 0.25, np.random.default_rng(0))
    assert sorted(w.game.title for w in held) == ["tw-coin", "tw-simple"]


def test_without_two_families_nothing_can_be_held_out():
    with pytest.raises(PriorZeroError, match="no game can be held out"):
        hold_out([of_game("zork1"), of_game("zork2")], 0.5, np.random.default_rng(0))


def test_right_commands_share_the_target(tiny_llm):
    _, tokenizer = load_llm(resolve_llm(tiny_llm))
    state = TextState("Here.", ("get lamp", "look", "take lamp"))
    step = WalkStep(state, "take lamp", (0, 1, 0), False)
    only = WalkStep(TextState("Here.", ("look",)), "look", (0,), False)
    settings = WarmupSettings(prompts=["bare", "history+list"])
    examples = make_examples([Walk(SPEC, (step, only))], settings, Tokeniser(tokenizer, 1024))
    assert len(examples) == 2  # one decision with a choice, under two prompts
    assert [e.sample().target_policy for e in examples] == [(0.5, 0.0, 0.5)] * 2
    bare, full = (tokenizer.decode(e.request.prompt_ids) for e in examples)
    assert "get lamp; look; take lamp" in full and "get lamp" not in bare
    assert drawn(examples, 1, np.random.default_rng(0))[0] in examples
    assert drawn(examples, 0, np.random.default_rng(0)) == examples


def test_joined_heads_are_the_same_prompts(tiny_llm, one_thread):
    """On a GPU: then all decisions of a step share a forward, whichever games they are of."""
    _, trainer = tuning(tiny_llm)
    _, tokenizer = load_llm(resolve_llm(tiny_llm))
    step = WalkStep(TextState("Here.", ("get lamp", "look")), "look", (1, 0), False)
    arguments = [Walk(SPEC, (step,))], WarmupSettings(), Tokeniser(tokenizer, 1024)
    (apart,) = make_examples(*arguments)
    (joined,) = make_examples(*arguments, join_heads=True)
    assert apart.request.head_ids and joined.request.head_ids == ()
    assert joined.request.prompt_ids == apart.request.prompt_ids
    one, other = trainer.score([apart.request, joined.request])
    for mine, its in zip(one.token_logprobs, other.token_logprobs, strict=True):
        assert mine == pytest.approx(its, abs=1e-5)


# ---- training ------------------------------------------------------------------------------------


def tuning(tiny_llm, clock=None, adapters: bool = False, **fields) -> tuple[Tuning, object]:
    settings = WarmupSettings(
        **dict(learning_rate=1e-2, epochs=6, evaluations=1, patience=9, max_text_loss=50.0) | fields
    )
    settings.train.batch_size = 6
    model, tokenizer = load_llm(resolve_llm(tiny_llm))
    tokeniser = Tokeniser(tokenizer, 1024)
    examples = make_examples([of_game("curses", 30)], settings, tokeniser)
    llm = LLMSettings(train=train_settings(settings, len(examples), True), dtype="float32")
    if adapters:
        llm.lora = LoraSettings(enable=True, rank=4, last_layers=1)
    trainer = builtin.make(model, tokenizer, llm, "sum")
    more = {} if clock is None else {"clock": clock}
    return Tuning(trainer, tokeniser, settings, examples, examples[:6], **more), trainer


def test_it_learns_and_keeps_the_best_weights(tiny_llm, one_thread):
    run, trainer = tuning(tiny_llm)
    done = run.run()
    assert done.after["sum"]["log_loss"] < 0.5 * done.before["sum"]["log_loss"]
    losses = [row["sum"]["log_loss"] for row in done.curve]
    assert done.after["sum"]["log_loss"] == min(losses) and done.curve[0] == done.before
    assert done.decisions == 6 * 30 and done.steps == 6 * 5 and done.ended == "all passes were made"
    # The trainer holds what was kept, not what came last.
    assert run._evaluate()["sum"]["log_loss"] == pytest.approx(min(losses), abs=1e-5)


def test_adapters_are_kept_as_well(tiny_llm, one_thread):
    run, trainer = tuning(tiny_llm, adapters=True, epochs=2)
    before = {n: p.clone() for n, p in trainer.state_dict()["model"].items()}
    done = run.run()
    now = trainer.state_dict()["model"]
    assert all(".lora_" in name for name in now)
    assert any(not torch.equal(before[n], now[n]) for n in now) == (done.after != done.before)


def test_it_ends_where_the_held_out_games_get_worse(tiny_llm, one_thread):
    run, trainer = tuning(tiny_llm, learning_rate=1.0, epochs=9, patience=2, max_text_loss=1e6)
    before = {n: p.clone() for n, p in trainer.state_dict()["model"].items()}
    done = run.run()
    assert done.ended == "2 evaluations without a better one" and len(done.curve) < 10
    if done.after == done.before:
        now = trainer.state_dict()["model"]
        assert all(torch.equal(before[n], now[n]) for n in now)


def test_it_ends_where_the_language_goes(tiny_llm, one_thread):
    run, trainer = tuning(tiny_llm, learning_rate=0.3, max_text_loss=0.01)
    done = run.run()
    assert "plain English lost" in done.ended and len(done.curve) == 2
    assert done.after == done.before
    assert run._evaluate()["text_loss"] == pytest.approx(done.before["text_loss"], abs=1e-5)


def test_it_ends_with_the_time(tiny_llm, one_thread):
    seconds = iter(range(0, 100_000, 40))
    run, _ = tuning(tiny_llm, clock=lambda: float(next(seconds)), minutes=2.0)
    done = run.run()
    assert done.ended == "the time was up (minutes=2)" and 0 < done.decisions < 30


def test_plain_english_is_judged_by_the_models_own_forward(tiny_llm, one_thread):
    run, trainer = tuning(tiny_llm)
    model, tokenizer = load_llm(resolve_llm(tiny_llm))
    request = plain_request(Tokeniser(tokenizer, 1024))
    ids = torch.tensor([request.prompt_ids + request.action_ids[0]])
    with torch.no_grad():
        logits = model(ids).logits[0].log_softmax(-1)
    given = len(request.prompt_ids)
    told = [float(logits[i - 1, ids[0, i]]) for i in range(given, ids.shape[1])]
    assert len(told) > 200
    assert run._evaluate()["text_loss"] == pytest.approx(-np.mean(told), abs=1e-4)


def test_the_rate_follows_what_trains():
    settings = WarmupSettings()
    assert train_settings(settings, 3200, True).learning_rate == 5e-5
    adapters = train_settings(settings, 3200, False)
    assert adapters.learning_rate == 2e-3
    assert (adapters.warmup_steps, adapters.decay_steps) == (15, 300)  # 3 passes of 100 steps
    adapters.validate()
    train_settings(settings, 1, False).validate()
