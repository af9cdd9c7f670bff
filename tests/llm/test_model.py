"""Which LLM is found, and how it is loaded."""

from __future__ import annotations

import pytest
import torch

from priorzero.llm.model import load_llm, resolve_llm
from priorzero.llm.module import pick_dtype, store_layers_in, sync_head
from priorzero.types import PriorZeroError


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No hub, and nothing in its cache."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def checkpoint(model, folder):
    model.save_pretrained(folder)
    return folder


def test_a_folder_is_taken_as_it_is(tiny, tmp_path):
    folder = checkpoint(tiny(), tmp_path / "mine")
    resolved = resolve_llm(str(folder))
    assert (resolved.path, resolved.name, resolved.source) == (str(folder), "mine", "local")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "neither a folder nor a hub name"),
        ("./owner/model", "neither a folder nor a hub name"),
        ("owner/model", "not in the local hub cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_what_cannot_be_had_is_an_error_that_tells_what_can(offline, name, message):
    with pytest.raises(PriorZeroError, match=f"{message}.*'embedded'"):
        resolve_llm(name)


def test_a_folder_without_a_model_is_an_error(tmp_path):
    with pytest.raises(PriorZeroError, match=r"no config\.json"):
        resolve_llm(str(tmp_path))


def test_auto_is_the_embedded_model_without_a_hub(offline, smollm):
    resolved = resolve_llm("auto")
    assert resolved.source == "embedded" and resolved.path == smollm[2].path
    assert "HF_HUB_OFFLINE" in resolved.reason


def test_a_damaged_checkpoint_is_an_error(tiny, smollm, tmp_path):
    folder = checkpoint(tiny(), tmp_path / "mine")
    smollm[1].save_pretrained(folder)
    assert load_llm(resolve_llm(str(folder)))[0].config.hidden_size == 32
    (folder / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(PriorZeroError, match="cannot be loaded from"):
        load_llm(resolve_llm(str(folder)))


def test_number_formats():
    assert pick_dtype("float32", "cuda") == torch.float32
    assert pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(AssertionError, match="'int8' is unknown"):
        pick_dtype("int8", "cpu")


def test_layers_in_bfloat16_compute_what_autocast_computes(tiny):
    """To the bit, with a tied head stored apart."""
    ids, plain, stored = torch.arange(3, 40)[None], tiny(), tiny()
    store_layers_in(stored, torch.bfloat16)
    assert stored.lm_head.weight is not stored.model.embed_tokens.weight
    assert stored.model.norm.weight.dtype == torch.float32

    def logits(model):
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            return model(ids).logits

    assert torch.equal(logits(plain), logits(stored))
    with torch.no_grad():
        plain.model.embed_tokens.weight.mul_(2)
        stored.model.embed_tokens.weight.mul_(2)
    sync_head(stored)
    assert torch.equal(logits(plain), logits(stored))
