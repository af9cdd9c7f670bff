"""The update: what it leaves alone, number formats, and what is fetched when."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from priorzero.data.segment import Segment, StepRecord
from priorzero.quiet import quiet_base
from priorzero.types import PriorZeroError, TextState
from priorzero.world_model.categorical import Support
from priorzero.world_model.trainer import PendingOutput, WorldModelTrainer, trains_in_bfloat16
from tests.ranks import launch, without_dropout

with quiet_base():
    from lzero.policy import (
        DiscreteSupport,
        InverseScalarTransform,
        phi_transform,
        scalar_transform,
    )

USED = np.arange(12) < 8


@pytest.fixture
def made(make_policy, make_buffer, randomise):
    """(trainer, network, a batch) of random play; arguments are policy settings."""

    def make(**changes):
        policy = make_policy(**dict(learning_rate=1e-3) | changes)
        network = randomise(policy.network, seed=1)
        trainer = WorldModelTrainer(network, policy.settings, policy.settings.device)
        buffer, rng = make_buffer(policy), np.random.default_rng(0)
        for episode in range(4):
            segment = Segment(0, episode, 12)
            for t in range(12):
                step = StepRecord(
                    state=TextState("", ("a", "b")),
                    observation=rng.normal(size=6).astype(np.float32),
                    valid_actions=("a", "b"),
                    valid_ids=rng.permutation(8)[:2],
                    action_index=0,
                    visit_counts=np.ones(2),
                    behaviour=np.full(2, 0.5),
                    target_policy=np.array([0.8, 0.2]),
                    root_value=0.0,
                    predicted_value=0.0,
                    reward=float(rng.integers(2)),
                    done_kind="terminated" if t == 11 else "running",
                    timestep=t,
                )
                segment.record(step, rng.normal(size=6).astype(np.float32))
            buffer.push_game_segments([segment])
        return trainer, network, buffer.sample(8)

    return make


# ---- transforms ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [10, 50])
def test_transforms_are_lightzeros_to_the_last_bit(scale):
    support, theirs = Support(scale, "cpu"), DiscreteSupport(-scale, scale, delta=1)
    generator = torch.Generator().manual_seed(0)
    scalars = torch.randn(40, 5, generator=generator) * torch.tensor([0.0, 1.0, 30.0, 1e3, 1e5])
    assert torch.equal(support.two_hot(scalars), phi_transform(theirs, scalar_transform(scalars)))

    logits = torch.randn(40, 2 * scale + 1, generator=generator) * 3
    inverse = InverseScalarTransform(scale, "cpu", True)
    assert torch.equal(support.scalars(logits), inverse(logits))


def test_two_hot_and_back():
    support = Support(10, "cpu")
    scalars = torch.tensor([[0.0, 1.0, -3.0, 42.5]])
    probabilities = support.two_hot(scalars)
    assert probabilities.sum(-1)[0].tolist() == pytest.approx([1.0] * 4)
    assert probabilities[0, 0].argmax() == 10 and probabilities[0, 0].max() == 1.0
    assert support.two_hot(torch.tensor([[torch.nan]])).isnan().any()
    back = support.scalars((probabilities[0] + 1e-30).log())[:, 0]
    torch.testing.assert_close(back, scalars[0], atol=1e-2, rtol=1e-3)


# ---- an update that would do damage --------------------------------------------------------------


def frozen(trainer, network) -> dict[str, torch.Tensor]:
    """All weights, and all the optimiser remembers."""
    state = copy.deepcopy(trainer.state_dict())
    found = {f"model {n}": x for n, x in state["model"].items()}
    found |= {f"target {n}": x for n, x in state["target_model"].items()}
    for number, values in state["optimizer_world_model"]["state"].items():
        found |= {f"optimiser {number} {name}": x for name, x in values.items()}
    return found


@pytest.mark.parametrize("damage", ["loss", "gradient"])
def test_an_update_that_is_not_finite_is_not_made(made, damage):
    trainer, network, batch = made(target_update_theta=0.5)
    trainer.update(batch, USED)  # the optimiser has its memory now
    trainer.target.load_state_dict(network.state_dict())  # so that following it changes nothing
    before = frozen(trainer, network)

    bad = batch
    if damage == "loss":
        bad = replace(batch, rewards=np.full_like(batch.rewards, np.nan))
    else:
        # The loss is finite, and overflows on its way back.
        network.world_model.pos_emb.weight.register_hook(lambda g: g * torch.inf)
    with pytest.raises(PriorZeroError, match="not made.*learning_rate"):
        trainer.update(bad, USED)
    after = frozen(trainer, network)
    assert before.keys() == after.keys() and len(before) > 100
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_a_resumed_run_takes_its_own_learning_rate(made):
    """What the message above advises; AdamW's step is the rate times what the moments say."""
    saved, steps = made(weight_decay=0.0)[0], []
    batch = made()[2]
    saved.update(batch, USED)
    state = copy.deepcopy(saved.state_dict())
    for rate in (1e-3, 1e-4):
        trainer, network, _ = made(weight_decay=0.0, learning_rate=rate)
        trainer.load_state_dict(copy.deepcopy(state))
        output = trainer.update(batch, USED)
        assert output.metrics["learning_rate"] == rate
        after = network.state_dict()
        steps.append(torch.cat([(after[n] - x).flatten() for n, x in state["model"].items()]))
    assert steps[0].abs().max() > 1e-4
    torch.testing.assert_close(steps[1], steps[0] / 10, rtol=0, atol=1e-6)


# ---- when numbers are read -----------------------------------------------------------------------


def test_all_numbers_come_in_one_transfer_when_they_are_read(monkeypatch):
    transfers = []
    real = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda t: transfers.append(t.shape) or real(t))
    numbers = dict(wm_loss=torch.tensor(2.0), grad_norm=torch.tensor(3.0))
    output = PendingOutput(numbers, torch.tensor([0.5, 1.5]), {"learning_rate": 0.1})
    assert transfers == []

    assert output.priorities.tolist() == [0.5, 1.5]
    assert output.metrics == dict(wm_loss=2.0, grad_norm=3.0, learning_rate=0.1, value_error=1.0)
    assert transfers == [(4,)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("burn_in", [0, 2])
def test_an_update_never_waits_for_the_gpu(made, dtype, burn_in):
    trainer, _, batch = made(device="cuda", train_dtype=dtype, burn_in=burn_in)
    trainer.update(batch, USED)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = trainer.update(batch, USED)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output.metrics["wm_loss"] > 0


# ---- number formats and compilation --------------------------------------------------------------


def test_auto_is_bfloat16_on_cuda_only():
    assert trains_in_bfloat16("auto", "cuda") and trains_in_bfloat16("bfloat16", "cpu")
    assert not trains_in_bfloat16("auto", "cpu") and not trains_in_bfloat16("float32", "cuda")


def losses(trainer, batch, updates: int) -> dict[str, np.ndarray]:
    torch.manual_seed(0)  # dropout
    told = [trainer.update(batch, USED).metrics for _ in range(updates)]
    return {name: np.array([one[name] for one in told]) for name in told[0]}


def test_bfloat16_has_float32s_losses_within_its_precision(made):
    full, network, batch = made(train_dtype="float32")
    half, other, _ = made(train_dtype="bfloat16")
    exact, rounded = losses(full, batch, 30), losses(half, batch, 30)

    for name in ("latent_loss", "reward_loss", "policy_loss", "value_loss", "wm_loss"):
        np.testing.assert_allclose(rounded[name], exact[name], rtol=0.03, atol=2e-3, err_msg=name)
    assert not np.array_equal(rounded["wm_loss"], exact["wm_loss"])  # it was bfloat16
    assert exact["wm_loss"][-1] < 0.9 * exact["wm_loss"][0]
    assert {p.dtype for p in other.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_update_is_the_same_update(made, monkeypatch):
    """Traced as one graph each, forward and backward; the code generator, which takes minutes, is
    left out.
    """
    real, compiled = torch.compile, []

    def traced(function, mode, dynamic):
        assert (mode, dynamic) == ("default", False)
        compiled.append(function)
        return real(function, backend="aot_eager", fullgraph=True, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", traced)
    (one, network, batch), (two, other, _) = made(), made(compile_update="default")
    assert compiled[-2:] == [other.predict, two.target.values]
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: self)
    assert not network.training and not other.training  # no dropout, which differs

    plain, graph = losses(one, batch, 3), losses(two, batch, 3)
    for name in plain:
        np.testing.assert_allclose(graph[name], plain[name], rtol=1e-4, atol=1e-6, err_msg=name)


# ---- several processes ---------------------------------------------------------------------------


def rows(batch, where: slice):
    """Those of a batch."""
    arrays = {
        name: value[where].copy() for name, value in vars(batch).items() if name != "revisits"
    }
    return replace(batch, **arrays)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_processes_with_half_the_rows_have_the_gradient_of_all(made, compiled_cfg, tmp_path):
    """Real processes under torchrun. Their halves have masks that count differently, so that the
    mean of their own means would be another loss. They keep the same weights to the last bit, and
    who is left alone notices it.
    """
    settings = dict(num_unroll_steps=9, learning_rate=1e-3)
    trainer, network, batch = made(num_unroll_steps=9)
    without_dropout(network)
    batches = [batch, rows(batch, slice(None, None, -1))]
    pairs = [(rows(b, slice(4)), rows(b, slice(4, 8))) for b in batches]
    assert pairs[0][0].mask_step.sum() != pairs[0][1].mask_step.sum()
    weights = torch.linspace(0.5, 1.0, 8).numpy()
    batches = [replace(b, weights=weights) for b in batches]
    pairs = [(rows(b, slice(4)), rows(b, slice(4, 8))) for b in batches]
    task = dict(cfg=compiled_cfg(**settings).policy, weights=network.state_dict(), halves=pairs)
    torch.save(task, tmp_path / "task.pt")

    done = launch("halves", tmp_path)
    assert done.returncode == 0, done.stdout
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in (0, 1))

    # The first update: the gradient of the whole batch, before Adam makes signs of roundings.
    expected = trainer.update(batches[0], USED)
    parameters = dict(network.named_parameters())
    assert len(first["gradients"][0]) > 20
    for name, got in first["gradients"][0].items():
        parameter = parameters[name]
        torch.testing.assert_close(got, parameter.grad, rtol=1e-5, atol=1e-6)
    for name in ("wm_loss", "grad_norm"):
        assert first["metrics"][0][name] == pytest.approx(expected.metrics[name], rel=1e-5)

    # All updates: the same bits in both, and about those of one process.
    expected = trainer.update(batches[1], USED)
    for part in ("model", "target_model"):
        for name, value in first["learnt"][part].items():
            assert torch.equal(value, second["learnt"][part][name]), name
    assert first["learnt"]["vocabulary"] == second["learnt"]["vocabulary"]
    assert first["metrics"][1]["wm_loss"] == pytest.approx(expected.metrics["wm_loss"], rel=1e-4)
    assert first["totals"] == second["totals"] == [1, 10]
    assert "another process of this run has ended" in first["lost"]
