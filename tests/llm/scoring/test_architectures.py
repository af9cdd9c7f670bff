"""Every architecture gets its own numbers: whatever it does before, in and behind its layers."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.scoring.forward import choose_way, tree_logprobs
from priorzero.llm.scoring.head_cache import HeadCache
from priorzero.llm.scoring.items import prepare
from priorzero.llm.scoring.logits import split_actions
from priorzero.types import TokenisedRequest

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    initializer_range=0.12,
    pad_token_id=0,
    eos_token_id=1,
    bos_token_id=2,
)
# What makes the logits of each its own.
SHARED = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": None},
    "Phi3": {},
    "Olmo2": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "sliding_window": 256, "query_pre_attn_scalar": 8},
    "Gemma3": {"sliding_window": 256, "query_pre_attn_scalar": 8},
    "Nemotron": {},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": 256},
}
MAMBA = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2)
LINEAR = dict(
    linear_num_key_heads=2,
    linear_num_value_heads=2,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=16,
)
PLAIN = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
    "FalconH1": MAMBA | {"mamba_d_ssm": 64},
    "GraniteMoeHybrid": MAMBA
    | {"layer_types": ["mamba", "attention"], "logits_scaling": 4.0, "num_local_experts": 0}
    | {"shared_intermediate_size": 48},
}


def build(name: str, **settings):
    """A tiny random model, whose logits differ enough from token to token."""
    import transformers

    kind = "Gemma3Text" if name == "Gemma3" else name
    config = getattr(transformers, f"{kind}Config")(**SIZES | settings)
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval().float()


def requests() -> list[TokenisedRequest]:
    rng = torch.Generator().manual_seed(1)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 97, (count,), generator=rng).tolist())

    head, shared = ids(6), ids(2)
    actions = (shared + (1,), shared + (9, 1), shared + (9, 8, 1), (1,), ids(3) + (1,))
    return [
        TokenisedRequest(head, ids(11), actions),
        TokenisedRequest(head, ids(23), actions[1:]),
    ]


def check(model, reference, limit: float = 1e-4) -> None:
    asked = requests()
    with torch.no_grad():
        flats = tree_logprobs(model, prepare(asked), heads=HeadCache())
    for flat, request in zip(flats, asked, strict=True):
        expected = reference(model, request)
        for got, want in zip(split_actions(flat, request), expected, strict=True):
            assert got.tolist() == pytest.approx(want, abs=limit)


@pytest.mark.parametrize("name", SHARED)
def test_shared_prompts_give_the_models_own_numbers(name, reference):
    model = build(name, **SHARED[name])
    assert choose_way(model, prepare(requests())) in ("packed", "padded")
    check(model, reference)


@pytest.mark.parametrize("name", PLAIN)
def test_what_our_ways_cannot_do_takes_a_forward_per_action(name, reference, caplog):
    model = build(name, **PLAIN[name])
    check(model, reference)
    check(model, reference)
    assert choose_way(model, prepare(requests())) == "plain"
    said = [r.getMessage() for r in caplog.records if "full forward per action" in r.getMessage()]
    assert len(said) == 1 and type(model).__name__ in said[0]


@pytest.mark.parametrize("types", [["sliding_attention"] * 2, None])
def test_a_window_shorter_than_the_prompt_takes_a_forward_per_action(types, reference, caplog):
    model = build("Mistral", sliding_window=8)
    model.config.layer_types = types
    check(model, reference)
    assert "sliding window of 8" in caplog.text


def test_gradients_go_through_the_models_own_head():
    model = build("Granite", **SHARED["Granite"])
    asked = requests()
    gradients = []
    for way in ("packed", "plain"):
        model.zero_grad()
        flats = tree_logprobs(model, prepare(asked), way=way)
        torch.cat(flats).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-3, atol=2e-5, msg=name)
    assert gradients[1]["model.layers.0.self_attn.q_proj.weight"].norm() > 0


def test_a_way_whose_numbers_are_wrong_is_not_taken(reference, caplog):
    """A model that looks plain, but reads its tokens from behind as soon as it gets a mask."""
    model = build("Llama")
    decoder = model.get_decoder()
    forward = decoder.forward

    def odd(*args, position_ids=None, **kwargs):
        return forward(*args, position_ids=None, **kwargs)

    decoder.forward = odd
    check(model, reference)
    assert "off the model's own" in caplog.text
