"""What scoring leaves out or computes otherwise for speed gives the model's own numbers."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.scoring import packed
from priorzero.llm.scoring.adapters import plain_adapters
from priorzero.llm.scoring.forward import computing, tree_logprobs
from priorzero.llm.scoring.items import prepare
from priorzero.llm.scoring.prefixes import PrefixCache
from priorzero.settings.llm import LoraSettings
from tests.llm.decisions import REQUESTS, request, trainer_of

CPU = torch.device("cpu")
LORA = LoraSettings(enable=True, rank=4, last_layers=2)


def _trainer(tiny, mib: int = 0, dtype: str = "float32"):
    model = tiny(seed=2, vocab=262, num_hidden_layers=4)
    torch.manual_seed(5)
    trainer = trainer_of(model, lora=LORA, dtype=dtype, trunk_cache_mib=mib)
    with torch.no_grad():  # a fresh adapter's second factor is zero; this one should not be
        for name, weight in trainer.weights().module.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    return trainer


def _gradients(model, items, dtype) -> torch.Tensor:
    model.zero_grad(set_to_none=True)
    with computing(CPU, dtype):
        flats = tree_logprobs(model, items, way="packed")
    (torch.cat(flats) * torch.linspace(-1, 1, sum(map(len, flats)))).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def test_adapters_in_two_products_are_pefts(tiny):
    """Numbers and gradients, also where adapters are switched off; PEFT's own way is back after."""
    model = _trainer(tiny).weights().module
    layer = model.get_base_model().model.layers[-1].mlp.up_proj
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    results = []
    for ours in (True, False):
        model.zero_grad(set_to_none=True)
        if ours:
            with plain_adapters(model):
                out = layer(x)
                assert "forward" in vars(layer)
        else:
            out = layer(x)
        assert not ours or "forward" not in vars(layer)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in layer.parameters() if p.requires_grad)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)

    with model.disable_adapter(), plain_adapters(model):
        torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    assert (results[0][0] - layer.base_layer(x)).abs().max() > 0.01


def test_adapters_of_another_number_format_are_pefts_to_compute(tiny):
    """A 16-bit layer with float32 adapters: only autocast brings them together."""
    model = _trainer(tiny, dtype="bfloat16").weights().module
    layer = model.get_base_model().model.layers[-1].mlp.up_proj
    x = torch.randn(3, 5, layer.in_features, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = layer(x.bfloat16())
        with plain_adapters(model):
            assert torch.equal(layer(x.bfloat16()), expected)
        assert not torch.equal(expected, layer.base_layer(x.bfloat16()))

        with computing(CPU, torch.bfloat16), plain_adapters(model):
            assert "forward" in vars(layer)
            torch.testing.assert_close(layer(x), expected, rtol=0.02, atol=0.02)


def test_attention_that_is_written_out_trains_as_in_float32(tiny, monkeypatch):
    """bfloat16 has a way of its own; float32's gradients are the reference for it and for torch's
    kernel.
    """
    trainer, items = _trainer(tiny, dtype="bfloat16"), prepare(REQUESTS)
    half = _gradients(trainer.weights().module, items, torch.bfloat16)
    exact = _gradients(_trainer(tiny).weights().module, items, None)
    monkeypatch.setattr(packed, "_WRITTEN_OUT", 0)
    kernel = _gradients(trainer.weights().module, items, torch.bfloat16)

    assert not torch.equal(half, kernel)
    for gradient in (half, kernel):
        assert (gradient - exact).norm() / exact.norm() < 0.05


def test_prompts_that_begin_alike_are_read_from_where_they_part(tiny):
    """One after another and together, with other actions behind the same prompt too; the trunk
    computes only what is new, and the scores are those without it.
    """
    room = " Kitchen. A long description of the same room."
    asked = [
        request(f"{room} You see {thing}.", ("open door", "go", "go on"))
        for thing in ("a box", "a box and a key", "nothing", "an egg")
    ]
    asked.append(request(f"{room} You see a box.", ("open box", "look")))  # all of it is known
    trainer, plain = _trainer(tiny, mib=8), _trainer(tiny)

    scores = [trainer.score([asked[0]])[0], *trainer.score(asked[1:])]
    for got, want in zip(scores, plain.score(asked), strict=True):
        assert got.totals() == pytest.approx(want.totals(), abs=1e-4)

    known = len(f"{room} You see ")  # a token per byte
    spared = [known + len("a box"), known, known + 1, known + len("a box.")]
    tokens = sum(item.num_tokens for item in prepare(asked))
    assert trainer.stats()["trunk_tokens_spared"] == pytest.approx(sum(spared) / tokens)
    assert trainer.trunk.misses == len(asked)


def test_known_beginnings_are_bounded_and_their_heads_their_own():
    def numbers(length: int) -> tuple:
        kv = [(torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2))]  # 16 bytes a token
        return torch.zeros(length, 4), kv

    cache, body = PrefixCache(max_bytes=16 * 50), tuple(range(20))
    cache.keep((1,), body, *numbers(20))
    assert cache.find((2,), body, 20) is None
    assert cache.find((1,), body[:10], 10) is None  # too short to be worth it
    found = cache.find((1,), (*body[:18], 99), 19)
    assert found.length == 18 and found.hidden.shape == (18, 4)
    assert [x.shape for x in found.kv[0]] == [(1, 1, 18, 2)] * 2
    assert cache.find((1,), body, 17).length == 17

    other = tuple(range(100, 120))
    cache.keep((1,), other, *numbers(20))
    cache.find((1,), body, 20)  # used last
    cache.keep((1,), tuple(range(200, 220)), *numbers(20))
    assert cache.bytes == 16 * 40
    assert cache.find((1,), other, 20) is None and cache.find((1,), body, 20) is not None
