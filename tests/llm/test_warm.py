"""The adapters of a warm-up, merged into the LLM they were made for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from priorzero.llm.model import embedded_checkpoint, load_llm, resolve_llm
from priorzero.llm.seen import FACTS, read_seen
from priorzero.llm.warm import ADAPTERS, warm_checkpoint
from priorzero.llm.weights.export import Weights
from priorzero.llm.weights.identity import ModelIdentity
from priorzero.types import PriorZeroError


@pytest.fixture
def adapters(tiny_llm, tmp_path):
    """A folder with adapters that change the model, and the adapted model itself."""
    model, _ = load_llm(resolve_llm(tiny_llm), dtype=torch.bfloat16)
    identity = ModelIdentity.of(model)
    wrapped = get_peft_model(
        model.float(), LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if ".lora_B" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape)
    folder = tmp_path / "adapters"
    Weights(wrapped).save_adapter(folder)
    seen = [{"game": "g", "family": "f", "by": "warm-up"}]
    (folder / FACTS).write_text(json.dumps({"base": identity.as_dict(), "seen": seen}))
    return folder, wrapped


def test_the_merged_folder_answers_as_the_adapted_model(tiny_llm, adapters, tmp_path):
    folder, wrapped = adapters
    cache = tmp_path / "cache"
    cache.mkdir()
    merged = warm_checkpoint(Path(tiny_llm), cache, folder)
    model, tokenizer = load_llm(resolve_llm(str(merged)))
    ids = torch.tensor([tokenizer("You are in a small room. Action: go north")["input_ids"]])
    with torch.no_grad():
        expected, plain = wrapped(ids).logits, None
        with wrapped.disable_adapter():
            plain = wrapped(ids).logits
        found = model(ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert read_seen(merged).families == ("f",)

    # Once only, and nothing half-made is left.
    before = (merged / "config.json").stat().st_mtime_ns
    assert warm_checkpoint(Path(tiny_llm), cache, folder) == merged
    assert (merged / "config.json").stat().st_mtime_ns == before
    assert [p.name for p in cache.iterdir()] == [merged.name]


def test_adapters_of_another_llm_are_refused(tiny_llm, adapters, tmp_path):
    folder, _ = adapters
    facts = json.loads((folder / FACTS).read_text())
    facts["base"]["weights"] = "0" * 16
    (folder / FACTS).write_text(json.dumps(facts))
    with pytest.raises(PriorZeroError, match="made for another"):
        warm_checkpoint(Path(tiny_llm), tmp_path, folder)
    assert not list(tmp_path.glob("*warm*"))


@pytest.mark.slow
def test_the_adapters_of_this_repository_belong_to_the_embedded_llm(tmp_path):
    try:
        base = embedded_checkpoint()
    except PriorZeroError as error:
        pytest.skip(str(error))
    merged = warm_checkpoint(base, tmp_path)
    assert set(read_seen(merged).families) <= {"tw-simple", "tw-coin", "tw-cooking"}
    assert sum(p.stat().st_size for p in ADAPTERS.iterdir()) < 20 * 2**20
    # PEFT writes the folder of the machine that trained.
    config = json.loads((ADAPTERS / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name


def test_a_folder_of_adapters_is_an_llm(tiny_llm, adapters, tmp_path, monkeypatch):
    folder, wrapped = adapters
    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("priorzero.llm.model.embedded_checkpoint", lambda: Path(tiny_llm))
    (tmp_path / "cache" / "models").mkdir(parents=True)

    resolved = resolve_llm(str(folder))
    assert resolved.name == folder.name and resolved.source == "local"
    model, _ = load_llm(resolved)
    merged = Weights(wrapped).tensors()
    assert all(torch.equal(t, merged[n]) for n, t in Weights(model).tensors().items())


def test_adapters_that_do_not_say_for_which_llm_are_refused(tiny_llm, adapters, tmp_path):
    folder, _ = adapters
    (folder / FACTS).unlink()
    with pytest.raises(PriorZeroError, match="does not say which LLM"):
        warm_checkpoint(Path(tiny_llm), tmp_path, folder)


def test_adapters_in_half_the_size_are_nearly_the_same(tiny_llm, adapters, tmp_path):
    folder, wrapped = adapters
    (folder / "adapter_model.safetensors").unlink()
    Weights(wrapped).save_adapter(tmp_path / "half", torch.float16)
    shutil.move(tmp_path / "half" / "adapter_model.safetensors", folder)
    model, _ = load_llm(resolve_llm(str(warm_checkpoint(Path(tiny_llm), tmp_path, folder))))
    merged = Weights(wrapped).tensors()
    for name, tensor in Weights(model).tensors().items():
        assert torch.allclose(tensor, merged[name], atol=1e-3), name
