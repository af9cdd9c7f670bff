"""Weights that leave the trainer are the trainer's, in each of their forms."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from priorzero.llm.module import store_layers_in
from priorzero.llm.weights.export import Weights

LORA = dict(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def adapted(model, **settings):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**LORA | settings))


def moved(model, size: float):
    """Every trained weight moved by `size`, as one AdamW step moves it."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.sign(torch.randn_like(parameter)))
    return model


def logprobs(model, dtype=None) -> torch.Tensor:
    ids = torch.arange(3, 43)[None]
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        return model(ids).logits.float().log_softmax(-1)


def test_full_weights_keep_their_names_without_the_tied_head(tiny):
    model = tiny()
    weights = Weights(model)
    tensors = weights.tensors()
    assert set(tensors) == {n for n, _ in model.named_parameters()}
    assert tensors["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert {t.dtype for t in weights.tensors(torch.bfloat16).values()} == {torch.bfloat16}
    assert not weights.has_adapter and weights.adapter_tensors() is None


def test_merged_weights_answer_as_the_adapted_model(tiny):
    model = moved(adapted(tiny()), 0.02)
    other = tiny()
    assert (logprobs(model) - logprobs(other)).abs().max() > 0.01
    moved_bytes = Weights(model).copy_into(other, merge=True)
    assert torch.allclose(logprobs(model), logprobs(other), atol=1e-5)
    assert moved_bytes == 4 * sum(p.numel() for p in other.parameters())


def test_a_small_update_reaches_a_16_bit_copy_whole(tiny):
    """Merged into bfloat16 weights, most of an update at a rate of 2e-4 is rounded away."""
    base = tiny().to(torch.bfloat16).float()  # a published 16-bit checkpoint
    trainer_base, plain, merged = copy.deepcopy(base), copy.deepcopy(base), copy.deepcopy(base)
    for model in (trainer_base, plain, merged):
        store_layers_in(model, torch.bfloat16)
    trained = moved(adapted(trainer_base), 2e-4)

    weights = Weights(trained)
    weights.copy_into(plain, merge=False)
    weights.copy_into(merged, merge=True)

    expected = logprobs(trained, torch.bfloat16)
    assert torch.equal(logprobs(plain, torch.bfloat16), expected)
    assert not torch.equal(logprobs(merged, torch.bfloat16), expected)  # the test can fail
    # The next update goes into the same adapters.
    moved(trained, 1e-2)
    weights.copy_into(plain, merge=False)
    assert torch.equal(logprobs(plain, torch.bfloat16), logprobs(trained, torch.bfloat16))
    assert not any(p.requires_grad for p in plain.parameters())


def test_a_tied_head_stored_apart_follows_the_embedding(tiny):
    model, other = moved(tiny(), 0.02), tiny()
    store_layers_in(other, torch.bfloat16)
    assert other.lm_head.weight is not other.model.embed_tokens.weight
    Weights(model).copy_into(other, merge=True)
    assert torch.equal(other.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


def test_another_architecture_is_refused(tiny):
    with pytest.raises(ValueError, match="shapes"):
        Weights(tiny()).copy_into(tiny(hidden_size=16), merge=True)


def test_a_folder_is_an_ordinary_checkpoint(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    model = moved(adapted(tiny()), 0.02)
    size, tensors = Weights(model).save(tmp_path / "v1", torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "v1", dtype=torch.float32).eval()
    assert torch.allclose(logprobs(loaded), logprobs(model), atol=1e-5)
    assert tensors == len(list(tiny().parameters()))
    assert size == 4 * sum(p.numel() for p in tiny().parameters())
    assert [f.name for f in tmp_path.iterdir()] == ["v1"]


def test_an_adapter_folder_holds_the_adapter_only(tiny, tmp_path):
    from peft import PeftModel
    from safetensors.torch import load_file

    model = moved(adapted(tiny()), 0.02)
    size, modules = Weights(model).save_adapter(tmp_path / "v1", torch.bfloat16)
    tensors = load_file(tmp_path / "v1" / "adapter_model.safetensors")
    assert modules == 4 and len(tensors) == 8
    assert size == 2 * sum(t.numel() for t in tensors.values())
    assert "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight" in tensors
    assert json.loads((tmp_path / "v1" / "adapter_config.json").read_text())["r"] == 4

    loaded = PeftModel.from_pretrained(tiny(), tmp_path / "v1").eval()
    assert torch.allclose(logprobs(loaded), logprobs(model), atol=0.02)
