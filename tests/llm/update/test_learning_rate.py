"""The learning rate by its closed form, against transformers' schedules and in the trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
)

from priorzero.llm.update.learning_rate import learning_rate
from priorzero.settings.llm import LLMTrainSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import SAMPLES, trainer_of

RATE = 3e-4


def theirs(make, steps: int) -> list[float]:
    """What the scheduler gives for the steps 1, 2, ..."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    return rates


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("lowest", [0.0, 0.1])
def test_cosine_is_that_of_transformers(warmup, lowest):
    settings = LLMTrainSettings(
        learning_rate=RATE,
        schedule="cosine",
        warmup_steps=warmup,
        decay_steps=40,
        min_learning_rate_share=lowest,
    )

    def make(optimizer):
        if not lowest:
            return get_cosine_schedule_with_warmup(optimizer, warmup, 40)
        return get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, warmup, 40, min_lr_rate=lowest
        )

    ours = [learning_rate(settings, step) for step in range(1, 41)]
    assert ours == pytest.approx(theirs(make, 40), rel=1e-9, abs=1e-12)
    # Theirs would rise again; a run goes on at the floor.
    assert learning_rate(settings, 400) == pytest.approx(lowest * RATE, abs=1e-12)


def test_constant_is_that_of_transformers():
    settings = LLMTrainSettings(learning_rate=RATE, warmup_steps=5)
    ours = [learning_rate(settings, step) for step in range(1, 12)]
    make = lambda optimizer: get_constant_schedule_with_warmup(optimizer, 5)  # noqa: E731
    assert ours == pytest.approx(theirs(make, 11))


def test_the_trainer_steps_with_it_and_a_resumed_one_goes_on(tiny):
    """Two steps a phase; the same rates and weights in one piece and in two."""
    fields = dict(
        learning_rate=RATE,
        schedule="cosine",
        warmup_steps=2,
        decay_steps=6,
        min_learning_rate_share=0.25,
        batch_size=3,
    )
    whole = trainer_of(tiny(vocab=262), **fields)
    settings = LLMTrainSettings(**fields)
    rates = [whole.update({"sft": SAMPLES})["sft_learning_rate"] for _ in range(4)]
    assert rates == [learning_rate(settings, step) for step in (2, 4, 6, 8)]
    assert rates[0] == RATE and rates[2] == rates[3] == pytest.approx(RATE / 4)
    assert whole.state_dict()["optimizer"]["param_groups"][0]["lr"] == rates[-1]

    first, second = trainer_of(tiny(vocab=262), **fields), trainer_of(tiny(vocab=262), **fields)
    for _ in range(2):
        first.update({"sft": SAMPLES})
    second.load_state_dict(first.state_dict())
    assert [second.update({"sft": SAMPLES})["sft_learning_rate"] for _ in range(2)] == rates[2:]
    ends = [trainer.state_dict()["model"] for trainer in (whole, second)]
    assert all(torch.equal(ends[1][name], weight) for name, weight in ends[0].items())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(schedule="linear"), "constant or cosine"),
        (dict(schedule="cosine"), "more than warmup_steps"),
        (dict(schedule="cosine", decay_steps=5, warmup_steps=5), "more than warmup_steps"),
        (dict(decay_steps=5), "only schedule cosine decays"),
        (dict(min_learning_rate_share=1.5), r"lie in \[0, 1\]"),
    ],
)
def test_impossible_schedules_are_refused(fields, message):
    with pytest.raises(PriorZeroError, match=message):
        LLMTrainSettings(**fields)
