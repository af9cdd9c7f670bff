"""The outputs of frozen layers, kept between forwards, change neither scores nor updates."""

from __future__ import annotations

import asyncio

import pytest
import torch

from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.scoring.forward import computing, tree_logprobs
from priorzero.llm.scoring.items import prepare
from priorzero.llm.scoring.trunk import frozen_layers
from priorzero.settings.llm import LoraSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import request, sample, trainer_of

REQUESTS = [
    request(f" Room {i}, a door{' and a box' * i}.", ("open door", "open box", "go", "go on"))
    for i in range(4)
]
LAST = LoraSettings(enable=True, rank=4, last_layers=2)


def _trainer(deep, mib: int, dtype: str = "float32"):
    fields = dict(lora=LAST, dtype=dtype, trunk_cache_mib=mib, learning_rate=0.05)
    trainer = trainer_of(deep(), **fields)
    torch.manual_seed(5)
    with torch.no_grad():  # a fresh adapter's second factor is zero; this one should not be
        for name, weight in trainer.weights().module.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return trainer


@pytest.fixture
def deep(tiny):
    return lambda: tiny(seed=2, vocab=262, num_hidden_layers=5)


def _totals(scores) -> list[float]:
    return [total for state in scores for total in state.totals()]


def test_frozen_layers_are_those_below_the_first_that_trains(deep):
    assert frozen_layers(_trainer(deep, 1).weights().module) == 3
    assert frozen_layers(deep()) == 0  # all weights train
    model = deep().requires_grad_(False)
    assert frozen_layers(model) == 0  # nothing trains, so nothing ever has to be computed again
    model.model.layers[4].mlp.up_proj.weight.requires_grad_(True)
    assert frozen_layers(model) == 4
    model.model.embed_tokens.weight.requires_grad_(True)
    assert frozen_layers(model) == 0


def test_trunk_changes_neither_scores_nor_updates(deep):
    """Same numbers as a trainer without it, over updates; a state met again is a hit; full forwards
    agree.
    """
    with_trunk, without = _trainer(deep, 8), _trainer(deep, 0)
    assert with_trunk.trunk.depth == 3 and without.trunk is None
    samples = [sample(r, target_policy=(0.7, 0.1, 0.1, 0.1)) for r in REQUESTS]
    before = _totals(with_trunk.score(REQUESTS))
    for _ in range(3):
        got, want = with_trunk.update({"sft": samples}), without.update({"sft": samples})
        assert got["sft_loss"] == pytest.approx(want["sft_loss"], abs=1e-5)
        assert got["sft_grad_norm"] == pytest.approx(want["sft_grad_norm"], rel=1e-3)
        assert _totals(with_trunk.score(REQUESTS)) == pytest.approx(
            _totals(without.score(REQUESTS)), abs=1e-3
        )
    assert (
        max(abs(a - b) for a, b in zip(before, _totals(with_trunk.score(REQUESTS)), strict=True))
        > 1
    )
    assert with_trunk.trunk.misses == 4 and with_trunk.trunk.hits == 4 * 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trunk_gradients_equal_those_of_the_whole_model(dtype, deep):
    """bfloat16 is what a run computes in: frozen layers stored in it, the rest under autocast."""
    trainer = _trainer(deep, 8, dtype)
    items, model = prepare(REQUESTS), trainer.weights().module
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = []
    # First from an empty cache, whose check runs the layers that train without gradients; then from
    # the full one.
    for trunk in (trainer.trunk, trainer.trunk, None):
        model.zero_grad(set_to_none=True)
        with computing(trainer.device, trainer.trunk.dtype):
            flats = tree_logprobs(model, items, trunk=trunk)
        torch.cat(flats).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trained]))
    assert gradients[2].norm() > 1 and trainer.trunk.hits == 4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    # The head is attended to from the row here and from its own pass there: bfloat16 rounds the two
    # apart.
    off = (gradients[0] - gradients[2]).norm() / gradients[2].norm()
    assert off < {"float32": 1e-4, "bfloat16": 0.05}[dtype]


def test_engine_with_a_copy_of_its_own_shares_the_trainers_trunk(deep, tokeniser, reference):
    """After an update the engine computes the upper layers only, and equals a full forward of the
    pushed weights.
    """
    trainer = _trainer(deep, 8)
    own = deep()
    engine = TransformersEngine(own, tokeniser, lock=trainer.lock, trunk=trainer.trunk)

    async def run() -> None:
        trainer.update({"sft": [sample(r, target_policy=(1.0, 0.0, 0.0, 0.0)) for r in REQUESTS]})
        await engine.push_weights(trainer.weights(), trainer.version)
        misses = trainer.trunk.misses
        scores = await engine.score(REQUESTS)
        assert trainer.trunk.misses == misses
        for asked, score in zip(REQUESTS, scores, strict=True):
            expected = reference(own, asked)
            assert score.totals() == pytest.approx([sum(a) for a in expected], abs=1e-3)
        await engine.close()

    asyncio.run(run())


def test_trunk_is_bounded_and_forgets_the_oldest(deep):
    trainer = _trainer(deep, 1)
    trunk = trainer.trunk
    one = prepare(REQUESTS[:1])[0].num_tokens * 32 * 4
    trunk.max_bytes = 4 * one  # a quarter is for beginnings; later states are longer
    want = _totals(_trainer(deep, 0).score(REQUESTS))
    assert _totals(trainer.score(REQUESTS)) == pytest.approx(want, abs=1e-4)
    assert 0 < trunk.bytes <= 3 * one
    trainer.score(REQUESTS[-1:])
    assert trunk.hits == 1
    trainer.score(REQUESTS[:1])
    assert trunk.misses == 5


def test_trunk_refuses_a_model_whose_layers_cannot_run_apart(deep):
    """Some models scale what enters the first layer; run in two parts they would scale twice."""
    trainer = _trainer(deep, 8)
    decoder = trainer.weights().module.get_base_model().get_decoder()
    forward = decoder.forward

    def scaling(*args, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(*args, inputs_embeds=2 * embeds, **kwargs)

    decoder.forward = scaling
    with pytest.raises(PriorZeroError, match="trunk_cache_mib=0"):
        trainer.score(REQUESTS)
