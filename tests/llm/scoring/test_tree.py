"""Trie and tree forward against one full forward per action."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.scoring.forward import choose_way, tree_logprobs
from priorzero.llm.scoring.head_cache import HeadCache
from priorzero.llm.scoring.items import plan_batches, prepare
from priorzero.llm.scoring.logits import action_totals, split_actions
from priorzero.llm.scoring.trie import build_trie
from priorzero.types import TokenisedRequest

WAYS = ["packed", "padded", "two_pass", "plain"]


def test_trie_shares_prefixes_and_drops_last_tokens():
    trie = build_trie([(5, 6, 1), (5, 1), (5, 6, 7, 1), (5, 6, 1)])
    assert trie.tokens == (5, 6, 7) and trie.parents == (-1, 0, 1) and trie.depths == (0, 1, 2)
    assert trie.lookups == (
        ((0, 5), (1, 6), (2, 1)),
        ((0, 5), (1, 1)),
        ((0, 5), (1, 6), (2, 7), (3, 1)),
        ((0, 5), (1, 6), (2, 1)),
    )
    assert trie.children() == [[5], [6, 1], [1, 7], [1]]
    assert [trie.path(r) for r in range(4)] == [[], [5], [5, 6], [5, 6, 7]]
    assert trie.ancestors() == [[0], [0, 1], [0, 1, 2]]
    with pytest.raises(ValueError, match="at least one token"):
        build_trie([()])


def _random_requests(rng: torch.Generator, head: tuple[int, ...]) -> list[TokenisedRequest]:
    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 97, (n,), generator=rng).tolist())

    shared = ids(2)
    return [
        TokenisedRequest(
            head, ids(11), (shared + (1,), shared + (9, 1), shared + (9, 8, 1), (1,), ids(3) + (1,))
        ),
        TokenisedRequest(head, ids(3), ((1,),)),  # one action, the empty string
        TokenisedRequest(head, ids(30), tuple(ids(1 + i % 4) + (1,) for i in range(200))),
        TokenisedRequest(head, ids(5), (shared + (1,), shared + (1,))),  # duplicates
    ]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("head_len", [0, 7])
def test_tree_equals_full_forward(head_len, way, tiny, reference):
    rng = torch.Generator().manual_seed(1)
    head = tuple(torch.randint(3, 97, (head_len,), generator=rng).tolist())
    model, requests = tiny(), _random_requests(rng, head)
    with torch.no_grad():
        flats = tree_logprobs(model, prepare(requests), heads=HeadCache(), logit_rows=7, way=way)
    for flat, request in zip(flats, requests, strict=True):
        expected = reference(model, request)
        for got, want in zip(split_actions(flat, request), expected, strict=True):
            assert got.tolist() == pytest.approx(want, abs=2e-5)
        assert action_totals(flat, request).tolist() == pytest.approx(
            [sum(w) for w in expected], abs=1e-4
        )
        means = [sum(w) / len(w) for w in expected]
        assert action_totals(flat, request, "mean").tolist() == pytest.approx(means, abs=1e-4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("start", [0, 4])
def test_a_thought_is_scored_where_it_stands(start, way, tiny):
    """Its tokens behind the actions' own, each as the public forward gives it; 0: the body begins
    with it, so that the head's last token predicts it.
    """
    rng = torch.Generator().manual_seed(2)
    model, requests = tiny(), _random_requests(rng, (4, 5, 6, 7))[:2]
    places = [range(start, start + 3), range(0)]
    if start == 0:
        requests = requests[:1]
    items = prepare(requests, places[: len(requests)])
    flats = tree_logprobs(model, items, way=way, logit_rows=3)

    ids = requests[0].prompt_ids
    logits = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = [float(logits[4 + i - 1, ids[4 + i]].detach()) for i in places[0]]
    assert flats[0][-3:].tolist() == pytest.approx(expected, abs=2e-5)
    # The actions' numbers are what they are without.
    for flat, bare in zip(flats, tree_logprobs(model, prepare(requests), way=way), strict=True):
        assert flat[: len(bare)].tolist() == pytest.approx(bare.tolist(), abs=2e-5)


def test_empty_body_is_scored_after_the_head(tiny, reference):
    request = TokenisedRequest((4, 5, 6), (), ((7, 1), (8, 9, 1)))
    model = tiny()
    with torch.no_grad():
        flat = tree_logprobs(model, prepare([request]))[0]
    assert flat.tolist() == pytest.approx(sum(reference(model, request), []), abs=2e-5)


def test_two_pass_without_inner_nodes(tiny, reference):
    """Only actions of one token: the second pass has nothing to compute."""
    request = TokenisedRequest((4, 5, 6), (7, 8), ((1,), (9,)))
    model = tiny()
    with torch.no_grad():
        flat = tree_logprobs(model, prepare([request]), way="two_pass")[0]
    assert flat.tolist() == pytest.approx(sum(reference(model, request), []), abs=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_gradient_equals_plain_forward(way, tiny):
    """Same loss through one full forward per action: all gradients agree, the head's included."""
    rng = torch.Generator().manual_seed(2)
    head = tuple(torch.randint(3, 97, (6,), generator=rng).tolist())
    model, requests = tiny(seed=3), _random_requests(rng, head)[::3]
    weights = [torch.rand(len(r.action_ids), generator=rng) for r in requests]

    flats = tree_logprobs(model, prepare(requests), way=way)
    triples = zip(flats, requests, weights, strict=True)
    loss = sum((w * action_totals(f, r).log_softmax(-1)).sum() for f, r, w in triples)
    loss.backward()
    tree = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()

    plain = 0.0
    for request, weight in zip(requests, weights, strict=True):
        totals = []
        for action in request.action_ids:
            logits = model(torch.tensor([request.prompt_ids + action])).logits.log_softmax(-1)
            start = request.num_prompt_tokens - 1
            totals.append(sum(logits[0, start + j, t] for j, t in enumerate(action)))
        plain = plain + (weight * torch.stack(totals).log_softmax(-1)).sum()
    plain.backward()
    assert loss.item() == pytest.approx(plain.item(), abs=1e-4)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(tree[name], parameter.grad, rtol=1e-4, atol=2e-5, msg=name)


def test_head_cache_notices_new_weights(tiny, reference):
    model, cache = tiny(), HeadCache()
    request = TokenisedRequest((4, 5, 6), (7, 8), ((9, 1),))

    def scored() -> list[float]:
        with torch.no_grad():
            return tree_logprobs(model, prepare([request]), heads=cache)[0].tolist()

    scored()
    scored()
    assert (cache.hits, cache.misses) == (1, 1)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(1.5)
    assert scored() == pytest.approx(reference(model, request)[0], abs=2e-5)
    assert cache.misses == 2


def test_plan_respects_limit_and_heads():
    sizes = [5, 50, 6, 7, 400, 5]
    heads = [(1,), (1,), (1,), (2,), (1,), (1,)]
    items = prepare(
        [TokenisedRequest(h, (3,) * n, ((1,),)) for h, n in zip(heads, sizes, strict=True)]
    )
    batches = plan_batches(items, max_batch_tokens=60)
    assert sorted(i for b in batches for i in b) == list(range(6))
    for batch in batches:
        assert len({heads[i] for i in batch}) == 1
        assert len(batch) == 1 or len(batch) * (1 + max(sizes[i] for i in batch)) <= 60


def test_a_cpu_packs_plain_models(tiny):
    items = prepare([TokenisedRequest((4, 5), (6, 7), ((8, 1),))])
    assert choose_way(tiny(), items) == "packed"


def test_a_request_that_waits_for_its_thought_is_not_scored(tiny):
    """A trainer or a canary would score the actions behind another text than the engine did."""
    waiting = TokenisedRequest((), (5, 6), ((7, 1),), reasoning=True)
    with pytest.raises(AssertionError, match="chain of thought"):
        prepare([waiting])
    prepare([waiting.with_thought((8,))])
