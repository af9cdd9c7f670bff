"""Gradient checkpointing: the same gradients from less memory, in every way of computing states."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from priorzero.llm.scoring.forward import computing, tree_logprobs
from priorzero.llm.scoring.items import prepare
from priorzero.llm.scoring.layers import checkpointable_layers
from priorzero.llm.update.trainers import builtin
from priorzero.llm.weights.adapters import with_adapters
from priorzero.settings.llm import LoraSettings
from priorzero.types import PriorZeroError
from tests.llm.decisions import REQUESTS, SAMPLES, settings, thinking, trainer_of
from tests.llm.scoring.test_architectures import SHARED, build, requests

THOUGHTFUL = thinking(REQUESTS[0], "Up it is.")
ITEMS = prepare(
    [r for r in REQUESTS[1:4]] + [THOUGHTFUL.request],
    [range(0)] * 3 + [THOUGHTFUL.written],
)
CPU = torch.device("cpu")


def gradients(model, items, dtype=None, **how) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Log-probabilities, and gradients of a sum in which every one of them counts differently."""
    trained = [p for p in model.parameters() if p.requires_grad]
    with computing(CPU, dtype):
        flat = torch.cat(tree_logprobs(model, items, **how))
    # Outside of the contexts of the forward, as the trainer runs it.
    return flat.detach(), list(
        torch.autograd.grad((flat * torch.linspace(1, 2, len(flat))).sum(), trained)
    )


def assert_equal_gradients(model, items, dtype=None, tolerance=1e-5, **how) -> None:
    """With and without are the same."""
    flat, theirs = gradients(model, items, dtype, **how)
    again, ours = gradients(model, items, dtype, checkpointing=True, **how)
    assert again.tolist() == pytest.approx(flat.tolist(), abs=10 * tolerance)
    largest = max(float(g.abs().max()) for g in theirs)
    assert largest > 0
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).abs().max()) <= tolerance * largest
    assert not any("forward" in layer.__dict__ for layer in checkpointable_layers(model))


@pytest.mark.parametrize("way", ["packed", "padded", "plain"])
@pytest.mark.parametrize("adapters", [False, True])
def test_gradients_are_those_without(way, adapters, byte_model):
    model = byte_model
    if adapters:
        model = with_adapters(model, LoraSettings(enable=True, rank=4), None)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # 0 before training, which would leave no gradient to compare
                    weight.normal_(std=0.02)
    assert_equal_gradients(model, ITEMS, way=way)


def test_gradients_in_bfloat16(byte_model):
    """Autocast is in force again when a layer is computed again."""
    assert_equal_gradients(byte_model, ITEMS, torch.bfloat16, 1e-3)


@pytest.mark.parametrize("name", SHARED)
def test_every_architecture(name):
    model = build(name, **SHARED[name])
    assert_equal_gradients(model, prepare(requests()))


def live_peak(work) -> int:
    """Largest number of bytes that tensors held at once while `work` ran."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


@pytest.mark.parametrize("way", ["packed", "padded", "plain"])
def test_memory_falls(way, tiny):
    """Twelve layers: what a layer keeps, twelve times over, against once and its inputs."""
    model = tiny(vocab=262, num_hidden_layers=12, intermediate_size=256)
    long = dataclasses.replace(REQUESTS[1], body_ids=REQUESTS[1].body_ids * 10)
    items = prepare([long] * 2)
    gradients(model, items, way=way)  # the check of the way, once

    def peak(**how) -> int:
        return live_peak(lambda: gradients(model, items, way=way, **how))

    without, kept = peak(), peak(checkpointing=True)
    assert kept < 0.4 * without, (kept, without)


def saved_bytes(work) -> int:
    """What the forward leaves for the backward, each storage counted once."""
    seen: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        work()
    return sum(storage.nbytes() for storage in seen.values())


def test_logits_are_not_kept(tiny):
    """With a large vocabulary they would be most of what is."""
    model = tiny(vocab=20_000, num_hidden_layers=1)
    items = prepare(REQUESTS[:2])
    kept = {
        on: saved_bytes(lambda on=on: tree_logprobs(model, items, way="packed", checkpointing=on))
        for on in (False, True)
    }
    rows = sum(item.trie.num_rows for item in items)
    assert kept[False] - kept[True] > rows * 20_000 * 4


def test_the_trainer_trains_the_same(tiny):
    """Through the setting, with frozen layers kept in the trunk, and with all weights."""
    for lora in (LoraSettings(), LoraSettings(enable=True, rank=4, last_layers=1)):
        ends = []
        for on in (False, True):
            trainer = trainer_of(
                tiny(vocab=262), lora=lora, gradient_checkpointing=on, kl_coef=0.1, batch_size=4
            )
            metrics = trainer.update({"sft": SAMPLES, "rft": SAMPLES})
            ends.append((metrics["sft_grad_norm"], metrics["rft_grad_norm"]))
            held = saved_bytes(lambda t=trainer: t.update({"sft": SAMPLES}))
            ends[-1] += (held,)
        assert ends[0][:2] == pytest.approx(ends[1][:2], rel=1e-4)
        assert ends[1][2] < 0.7 * ends[0][2]


def test_a_model_whose_layers_are_unknown_is_refused(byte_model, monkeypatch):
    monkeypatch.setattr(builtin, "checkpointable_layers", lambda model: [])
    with pytest.raises(PriorZeroError, match=r"LlamaForCausalLM.*gradient_checkpointing"):
        builtin.make(byte_model, None, settings(gradient_checkpointing=True), "sum")
    builtin.make(byte_model, None, settings(), "sum")  # who does not ask for it needs none
