"""What the LLM is asked about a walk, against full forwards of the same model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from priorzero.evidence.scores import Asker, Scored
from priorzero.evidence.variants import VARIANTS
from priorzero.evidence.walk import Walk, WalkStep
from priorzero.games.records import GameSpec
from priorzero.llm.engines.thoughts import Reasoner
from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.model import ResolvedModel, load_llm
from priorzero.llm.prompts import ACTION_MARKER, build_prompt
from priorzero.llm.scoring.requests import Tokeniser, model_max_tokens
from priorzero.settings.llm import PromptSettings
from priorzero.types import HistoryItem, TextState

GOAL = "Find the lamp."
PAST = (HistoryItem("A hut.", "go north", 1.0),)
STEPS = (
    WalkStep(TextState("A road.", ("go east", "take lamp"), PAST, GOAL), "get lamp", (1, 0), False),
    WalkStep(TextState("A pit.", ("go up", "wait"), PAST, GOAL), "wait", (1, 0), True),
    WalkStep(TextState("A gate.", ("enter", "go east"), PAST, GOAL), "enter", (0, 1), False),
)
WALK = Walk(GameSpec("g", "k", "g.z5", "G", GOAL, 1.0, 9, "g", ("x",)), STEPS)


@pytest.fixture(scope="module")
def engine(tiny_llm):
    torch.set_num_threads(1)
    model, tokenizer = load_llm(ResolvedModel(tiny_llm, "tiny", "local", "a test"))
    tokeniser = Tokeniser(tokenizer, model_max_tokens(model.config))
    return TransformersEngine(model, tokeniser, reasoner=Reasoner(6, 1.0, ACTION_MARKER, 0))


def by_full_forwards(engine, state: TextState, settings: PromptSettings, action: str) -> list:
    """Log-probabilities of a command's tokens and its terminator, one forward for it alone."""
    tokeniser = engine.tokeniser
    prompt = build_prompt(state, settings, tokeniser.tokenizer)
    before = tokeniser.ids(prompt.head) + tokeniser.ids(prompt.body)
    after = (*tokeniser.ids(" " + action), tokeniser.terminator_id)
    with torch.no_grad():
        logits = engine.model(torch.tensor([before + after])).logits[0].float().log_softmax(-1)
    return [float(logits[len(before) - 1 + i, token]) for i, token in enumerate(after)]


@pytest.mark.parametrize("variant", [v for v, c in VARIANTS.items() if not c["use_cot"]])
async def test_judged_steps_are_scored_with_and_without_their_state(engine, variant):
    prompt = PromptSettings(history_length=3, max_prompt_tokens=700)
    scored = await Asker(engine, variant, prompt).walk(WALK)
    assert [one.outcomes for one in scored] == [(1, 0), (0, 1)]  # the idle step is left out

    used = PromptSettings(
        history_length=3 if "history" in variant else 0,
        include_valid_actions="list" in variant,
        max_prompt_tokens=700,
    )
    nothing = TextState("", (), (), GOAL)
    for step, one in zip((STEPS[0], STEPS[2]), scored, strict=True):
        for i, action in enumerate(step.state.valid_actions):
            expected = by_full_forwards(engine, step.state, used, action)
            assert one.tokens[i] == pytest.approx(expected, abs=1e-3)
            alone = sum(by_full_forwards(engine, nothing, used, action))
            assert one.unconditional[i] == pytest.approx(alone, abs=1e-3)


async def test_thoughts_stand_before_the_command_only(engine):
    prompt = PromptSettings(max_prompt_tokens=700)
    before = engine.counters["reasoning"]
    scored = await Asker(engine, "thought", prompt).walk(WALK)
    assert len(scored) == 2 and engine.counters["reasoning"] == before + 2


async def test_commands_known_without_a_state_are_not_asked_again(engine):
    asker = Asker(engine, "bare", PromptSettings())
    first = await asker.unconditional(GOAL, ["go east", "wait"])
    asked = engine.counters["states"]
    again = await asker.unconditional(GOAL, ["wait", "go east"])
    assert again == first and engine.counters["states"] == asked
    other = await asker.unconditional("Find the egg.", ["wait"])
    assert other["wait"] != first["wait"] and engine.counters["states"] == asked + 1


def test_mass_outside_is_what_the_listed_commands_leave():
    tokens = ((np.log(0.5), np.log(0.5)), (np.log(0.1),))
    assert Scored((0, 1), tokens, np.zeros(2)).mass_outside == pytest.approx(1 - 0.25 - 0.1)
    # Rounding must not make it negative.
    assert Scored((0,), ((1e-9,),), np.zeros(1)).mass_outside == 0.0
