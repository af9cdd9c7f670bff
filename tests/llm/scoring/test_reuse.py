"""What is kept between forwards: outputs of frozen layers, and the beginnings of prompts that grow."""

from __future__ import annotations

import asyncio

import pytest
import torch

from priorzero.llm.engines.transformers_engine import TransformersEngine
from priorzero.llm.scoring.forward import choose_way, computing, prepare, tree_logprobs
from priorzero.llm.scoring.prefix_cache import PrefixCache
from priorzero.llm.scoring.requests import ScoreRequest, TextTokeniser, TokenisedRequest
from priorzero.llm.scoring.trunk import TrunkCache, frozen_layers
from priorzero.llm.update.trainers.builtin import (
    LLMTrainer,
    LLMTrainerSettings,
    LoraSettings,
    SFTSample,
)
from priorzero.types import PriorZeroError

REQUESTS = [
    ScoreRequest(
        "You play.",
        f" Room {i}, a door{' and a box' * i}.",
        ("open door", "open box", "go", "go on"),
        " ",
    )
    for i in range(4)
]


def _trainer(byte_text, deep, mib: int, dtype: str = "float32") -> LLMTrainer:
    lora = LoraSettings(rank=4, last_layers=2)
    trainer = LLMTrainer(
        deep(),
        byte_text.tokenizer,
        LLMTrainerSettings(learning_rate=0.05, compute_dtype=dtype, lora=lora, trunk_cache_mib=mib),
    )
    torch.manual_seed(5)
    with torch.no_grad():  # a fresh adapter's second factor is zero; this one should not be
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return trainer


@pytest.fixture
def deep(tiny):
    return lambda: tiny(seed=2, vocab=262, num_hidden_layers=5)


def _totals(scores) -> list[float]:
    return [total for state in scores for total in state.totals()]


def test_frozen_layers_are_those_below_the_first_that_trains(byte_text, deep):
    assert frozen_layers(_trainer(byte_text, deep, 1).model) == 3
    assert frozen_layers(deep()) == 0  # all weights train
    model = deep().requires_grad_(False)
    assert frozen_layers(model) == 0  # nothing trains, so nothing ever has to be computed again
    model.model.layers[4].mlp.up_proj.weight.requires_grad_(True)
    assert frozen_layers(model) == 4
    model.model.embed_tokens.weight.requires_grad_(True)
    assert frozen_layers(model) == 0


def test_trunk_changes_neither_scores_nor_updates(byte_text, deep):
    """Same numbers as a trainer without it, over updates; a state met again is a hit; full forwards
    agree.
    """
    with_trunk, without = _trainer(byte_text, deep, 8), _trainer(byte_text, deep, 0)
    assert with_trunk.trunk.depth == 3 and without.trunk is None
    samples = [SFTSample(r, (0.7, 0.1, 0.1, 0.1)) for r in REQUESTS]
    before = _totals(with_trunk.score(REQUESTS))
    for _ in range(3):
        got, want = with_trunk.sft_update(samples), without.sft_update(samples)
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert got["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-3)
        assert _totals(with_trunk.score(REQUESTS)) == pytest.approx(
            _totals(without.score(REQUESTS)), abs=1e-3
        )
    assert (
        max(abs(a - b) for a, b in zip(before, _totals(with_trunk.score(REQUESTS)), strict=True))
        > 1
    )
    assert with_trunk.trunk.misses == 4 and with_trunk.trunk.hits == 4 * 7


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trunk_gradients_equal_those_of_the_whole_model(dtype, byte_text, deep):
    """bfloat16 is what a run computes in: frozen layers stored in it, the rest under autocast."""
    trainer = _trainer(byte_text, deep, 8, dtype)
    items = prepare(trainer.text.tokenise_all(REQUESTS))
    gradients = []
    # First from an empty cache, whose check runs the layers that train without gradients; then from
    # the full one.
    for trunk in (trainer.trunk, trainer.trunk, None):
        trainer.optimizer.zero_grad(set_to_none=True)
        with computing(trainer.device, trainer.compute_dtype):
            flats = tree_logprobs(trainer.model, items, trunk=trunk)
        torch.cat(flats).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.parameters]))
    assert gradients[2].norm() > 1 and trainer.trunk.hits == 4
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)
    # The head is attended to from the row here and from its own pass there: bfloat16 rounds the two
    # apart.
    off = (gradients[0] - gradients[2]).norm() / gradients[2].norm()
    assert off < {"float32": 1e-4, "bfloat16": 0.05}[dtype]


def test_engine_with_a_copy_of_its_own_shares_the_trainers_trunk(byte_text, deep, reference):
    """After an update the engine computes the upper layers only, and equals a full forward of the
    pushed weights.
    """
    trainer = _trainer(byte_text, deep, 8)
    own = deep()
    engine = TransformersEngine(own, trainer.text, lock=trainer.lock, trunk=trainer.trunk)

    async def run() -> None:
        trainer.sft_update([SFTSample(r, (1.0, 0.0, 0.0, 0.0)) for r in REQUESTS])
        await engine.push_weights(trainer.model, trainer.version)
        misses = trainer.trunk.misses
        scores = await engine.score(REQUESTS)
        assert trainer.trunk.misses == misses
        for request, score in zip(REQUESTS, scores, strict=True):
            expected = reference(own, trainer.text.tokenise(request))
            assert score.totals() == pytest.approx([sum(a) for a in expected], abs=1e-3)
        await engine.close()

    asyncio.run(run())


def test_trunk_is_bounded_and_forgets_the_oldest(byte_text, deep):
    trainer = _trainer(byte_text, deep, 1)
    trunk = trainer.trunk
    one = prepare(trainer.text.tokenise_all(REQUESTS[:1]))[0].num_tokens * 32 * 4
    trunk.max_bytes = 3 * one  # later states are longer
    want = _totals(_trainer(byte_text, deep, 0).score(REQUESTS))
    assert _totals(trainer.score(REQUESTS)) == pytest.approx(want, abs=1e-4)
    assert 0 < trunk.bytes <= 3 * one
    trainer.score(REQUESTS[-1:])
    assert trunk.hits == 1
    trainer.score(REQUESTS[:1])
    assert trunk.misses == 5
    with pytest.raises(ValueError, match="at least one layer"):
        TrunkCache(0, 1)
    with pytest.raises(PriorZeroError, match="trunk cache is for None"):
        TransformersEngine(deep(), trainer.text, compute_dtype=torch.bfloat16, trunk=trunk)


def test_trunk_refuses_a_model_whose_layers_cannot_run_apart(byte_text, deep):
    """Some models scale what enters the first layer; run in two parts they would scale twice."""
    trainer = _trainer(byte_text, deep, 8)
    decoder = trainer.model.get_base_model().get_decoder()
    forward = decoder.forward

    def scaling(*args, input_ids=None, inputs_embeds=None, **kwargs):
        embeds = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        return forward(*args, inputs_embeds=2 * embeds, **kwargs)

    decoder.forward = scaling
    with pytest.raises(PriorZeroError, match="trunk_cache_mib=0"):
        trainer.score(REQUESTS)


def _growing(steps: int) -> list[ScoreRequest]:
    story = [f" You are in room {i}. You go on." for i in range(steps)]
    return [
        ScoreRequest("Head.", "".join(story[: n + 1]) + " Now:", ("go", "open box", "look"), " ")
        for n in range(steps)
    ]


@pytest.mark.parametrize("way", ["packed", "two_passes"])
def test_growing_prompts_are_computed_from_where_they_differ(
    way, byte_text, byte_model, reference, monkeypatch
):
    import priorzero.llm.scoring.forward as forward

    monkeypatch.setattr(forward, "choose_way", lambda *_: way)
    engine = TransformersEngine(byte_model, byte_text, prefix_cache_mib=16)

    async def run() -> None:
        for step, request in enumerate(_growing(5)):
            tokens = byte_text.tokenise(request)
            before = engine.counters["tokens"]
            # Beside it a state with nothing in common, so that batches are mixed.
            other = ScoreRequest("Head.", f"{step} elsewhere", ("wait",), " ")
            scores = await engine.score([request, other])
            for asked, score in zip((request, other), scores, strict=True):
                expected = reference(byte_model, byte_text.tokenise(asked))
                assert score.totals() == pytest.approx([sum(a) for a in expected], abs=1e-4)
            computed = engine.counters["tokens"] - before
            if step:
                assert computed <= 100, "the earlier steps were computed again"
        assert tokens.num_prompt_tokens > 150
        assert engine.stats()["prefix_tokens"] > 250

    asyncio.run(run())


@pytest.mark.parametrize(("drop", "most_computed"), [(1, 1.0), (8, 0.55)])
def test_histories_that_lose_several_steps_together_are_reused(
    drop, most_computed, byte_model, byte_text
):
    """A full window that moves every step leaves nothing to reuse but the head; one that moves in
    blocks most of the prompt.
    """
    from priorzero.play.slot import HistoryWindow, Seat
    from priorzero_prompts import PromptSettings, build_prompt

    seat = Seat("Win.", HistoryWindow(10, drop))
    seat.start({"text": "You wake up.", "valid_actions": ("go", "look"), "score": 0.0})
    settings = PromptSettings(
        history_length=10, history_drop=drop, include_valid_actions=False, max_prompt_tokens=2000
    )
    byte_text.max_tokens, byte_text.tokenizer.bos_token = 4096, ""
    reusing, fresh = (
        TransformersEngine(byte_model, byte_text, prefix_cache_mib=mib) for mib in (64, 0)
    )

    class Counted(type(byte_text.tokenizer)):
        def __call__(self, text, add_special_tokens=False, verbose=True):
            return super().__call__(text, add_special_tokens)

    async def run() -> None:
        for step in range(30):
            seat.advance(
                f"go {step}",
                0.0,
                {"text": f"Room {step}.", "valid_actions": ("go", "look"), "score": 0.0},
            )
            if step < 10:
                continue  # until the window is full
            parts = build_prompt(seat.state, settings, Counted())
            request = ScoreRequest(parts.head, parts.body, seat.state.valid_actions, " ")
            got, want = (await reusing.score([request]))[0], (await fresh.score([request]))[0]
            assert got.totals() == pytest.approx(want.totals(), abs=1e-4)

    asyncio.run(run())
    share = reusing.counters["tokens"] / fresh.counters["tokens"]
    assert share <= most_computed and (drop > 1 or share > 0.9)


def test_kept_prompts_are_dropped_with_the_weights_and_when_memory_is_short(
    byte_text, byte_model, reference
):
    engine = TransformersEngine(byte_model, byte_text, prefix_cache_mib=16)
    first, second = _growing(2)

    async def run() -> None:
        await engine.score([first])
        assert engine.stats()["prefix_mib"] > 0
        with torch.no_grad():
            byte_model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
        score = (await engine.score([second]))[0]
        expected = reference(byte_model, byte_text.tokenise(second))
        assert score.totals() == pytest.approx([sum(a) for a in expected], abs=1e-4)
        assert engine.stats()["prefix_tokens"] == 0
        engine.prefixes.max_bytes = int(engine.prefixes.bytes * 1.5)
        await engine.score(_growing(4))
        assert (
            len(engine.prefixes._prompts) < 4 and engine.prefixes.bytes <= engine.prefixes.max_bytes
        )

    asyncio.run(run())


def test_recut_leaves_the_last_token_and_wants_enough_in_common(byte_model):
    cache = PrefixCache(1 << 20)
    prompt = tuple(range(3, 103))
    kv = [(torch.zeros(1, 2, 100, 8), torch.zeros(1, 2, 100, 8))] * 2
    cache.refresh(byte_model, None)
    cache.keep(TokenisedRequest(prompt[:10], prompt[10:], ((1,),)), kv)
    same, same_kv = cache.recut(TokenisedRequest(prompt[:10], prompt[10:], ((1,),)))
    assert same.head_ids == prompt[:99] and same.body_ids == prompt[99:]
    assert same_kv[1][0].shape == (1, 2, 99, 8)
    far = TokenisedRequest(prompt[:10], prompt[10:30] + (200,) * 50, ((1,),))
    assert cache.recut(far) is None  # 30 tokens in common, 20 beyond the head


def test_a_cpu_packs_plain_models(byte_model):
    assert choose_way(byte_model, [], torch.device("cpu")) == "packed"


def test_together_and_one_by_one_tokenise_alike(byte_text):
    assert byte_text.tokenise_all(REQUESTS) == [byte_text.tokenise(r) for r in REQUESTS]
    assert isinstance(byte_text, TextTokeniser) and byte_text.tokenise_all([]) == []
