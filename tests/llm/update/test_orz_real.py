"""Open-Reasoner-Zero itself, with Ray and DeepSpeed, on small models on the CPU. Skipped where it
is not there; docs/ORZ.md says how to get it.
"""

from __future__ import annotations

import asyncio
import copy
import json
import time
from types import SimpleNamespace

import pytest
import torch

from priorzero.llm.update.trainers import builtin
from priorzero.orz import orz_status
from tests.llm.decisions import REQUESTS, sample
from tests.llm.update.test_orz_trainer import PHASES, far, orz_settings, weights

FOUND, REASON = orz_status()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason=f"Open-Reasoner-Zero: {REASON}"),
    pytest.mark.timeout(900),
]


@pytest.fixture(scope="module")
def cluster():
    import ray

    ray.init(address="local", num_cpus=4, num_gpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


@pytest.fixture
def make_trainer(cluster, byte_model):
    """Real trainers, which are closed; then Ray has its room back."""
    made = []

    def make(of):
        from priorzero.llm.update.trainers import orz

        made.append(orz.make(copy.deepcopy(byte_model), None, of, "sum"))
        return made[-1]

    yield make
    for trainer in made:
        trainer.close()
    until = time.monotonic() + 60
    while cluster.available_resources().get("GPU", 0) < 2 and time.monotonic() < until:
        time.sleep(0.2)
    assert cluster.available_resources()["GPU"] == 2


def gradient(trainer) -> torch.Tensor:
    """Of the first step, up to a factor: what Adam's first moment is then."""
    kept = trainer.state_dict()["optimizer"]["state"]
    return torch.cat([kept[i]["exp_avg"].flatten() for i in sorted(kept)])


@pytest.mark.parametrize(("workers", "stage"), [(1, 2), (2, 2), (2, 3)])
def test_one_step_has_the_built_in_trainers_gradient(make_trainer, byte_model, workers, stage):
    """Of six decisions in several packs, two of them in one; and the decisions that turned out well
    become likelier.
    """
    of = orz_settings(workers=workers, batch_size=0)
    of.orz.zero_stage = stage
    byte_model.config.dtype = torch.bfloat16  # as published models say; workers are to use float32
    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    ours = make_trainer(of)

    expected, metrics = (t.update({"rft": PHASES[0]}) for t in (theirs, ours))

    cosine = torch.cosine_similarity(gradient(ours), gradient(theirs), dim=0)
    assert cosine > 0.99999
    assert metrics["rft_orz_packs"] > workers
    assert metrics["rft_grad_norm"] == pytest.approx(expected["rft_grad_norm"], rel=1e-3)
    assert metrics["rft_policy_loss"] == pytest.approx(expected["rft_policy_loss"], rel=1e-3)
    # Adam's first step is nearly the sign of the gradient, which rounding turns where it is 0.
    moved = [v for n, v in weights(ours).items() if far({n: v}, {n: weights(theirs)[n]}) < 1e-4]
    assert len(moved) == len(weights(theirs))


def test_several_updates_a_resume_and_a_death(make_trainer, byte_model, cluster, caplog):
    of = orz_settings("builtin", batch_size=0, learning_rate=1e-3)
    of.rft.advantage, of.rft.max_importance = "raw", 0.0  # a weight of its own would hide bad ones
    ours = make_trainer(of)
    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    good = sample(REQUESTS[2], action_index=0, value_target=1.0)
    bad = sample(REQUESTS[2], action_index=3, value_target=-1.0)
    drawn = [good, bad] * 3

    def said(trainer) -> list[float]:
        pairs = zip(trainer.score([good.request, bad.request]), (good, bad), strict=True)
        return [sum(scores.token_logprobs[s.action_index]) for scores, s in pairs]

    before = said(ours)
    for _ in range(3):
        for trainer in (ours, theirs):
            trainer.update({"rft": drawn})
    for after in (said(ours), said(theirs)):
        assert after[0] > before[0] + 0.1 and after[1] < before[1] - 0.1

    # Others go on from its checkpoint as it does itself.
    saved = copy.deepcopy(ours.state_dict())
    other = make_trainer(of)

    async def resume() -> None:  # as the run's loop does it
        other.load_state_dict(copy.deepcopy(saved))

    asyncio.run(resume())
    assert far(weights(other), weights(ours)) == 0.0
    for trainer in (ours, other):
        trainer.update({"rft": PHASES[0]})
    assert far(weights(other), weights(ours)) < 1e-6

    # A worker dies; the built-in trainer goes on from the same weights and moments.
    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    cluster.kill(ours._session._trainer.policy_model._actor_handlers[0])
    for trainer in (ours, theirs):
        trainer.update({"rft": PHASES[1]})
    assert far(weights(ours), weights(theirs)) == 0.0
    assert ours.stats()["orz_failures"] == 1
    assert f"{cluster.get_runtime_context().get_session_name()}/logs/worker-*.err" in caplog.text


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_decisions_in_one_pack_do_not_see_each_other(cluster, byte_model, tmp_path, dtype, close):
    """And their log-probabilities are taken in float32, whatever the model computes in."""
    from priorzero.llm.update.orz.arguments import orz_arguments
    from priorzero.llm.update.orz.cluster import Cluster
    from priorzero.llm.update.orz.packs import RatedDecision, plan_packs
    from priorzero.llm.update.orz.session import OrzSession

    of = orz_settings()
    of.orz.dtype = dtype
    byte_model.save_pretrained(tmp_path / "base")
    arguments = orz_arguments(of, cuda=False, model=tmp_path / "base", folder=tmp_path / "own")
    session = OrzSession(arguments, Cluster(of.orz, cuda=False), 600, 600)
    try:
        torch.manual_seed(1)
        rows = [torch.randint(3, 262, (20 + i,)) for i in range(5)]
        some = torch.ones(4, dtype=torch.float64)
        decisions = [RatedDecision(tuple(row.tolist()), some, some * torch.nan) for row in rows]
        plan = plan_packs(decisions, step_size=0, workers=1, max_tokens=200)
        ((got,),) = session.log_probs(plan)
    finally:
        session.close()

    assert len(plan.packs[0][0].decisions) == 5
    assert got.dtype == torch.float32 and (got != got.bfloat16()).any()
    alone = []
    with torch.no_grad():
        for row in rows:
            logits = byte_model(row[None]).logits[0].log_softmax(-1)
            alone.append(logits[-5:-1].gather(1, row[-4:, None])[:, 0])
    torch.testing.assert_close(got[0], torch.cat(alone), rtol=0, atol=close)


def test_orz_reads_the_exported_prompts(tmp_path, tiny_llm):
    """By the data set of its own experiments."""
    from transformers import AutoTokenizer

    from priorzero.export_orz import PROMPTS, main
    from priorzero.llm.update.orz.mends import orz_imported
    from tests.test_export_samples import make_run, settings_of

    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    run = make_run(tmp_path / "run", settings_of(tiny_llm), tokenizer)
    assert main([str(run), str(tmp_path / "out")]) == 0
    dialogues = json.loads((tmp_path / "out" / PROMPTS).read_text(encoding="utf-8"))
    with orz_imported():
        pytest.importorskip("playground.zero_setting_base", exc_type=ImportError)
        from playground.zero_setting_base import CustomDataset

    reads = CustomDataset(dialogues, tokenizer, 2048, SimpleNamespace(), num_processors=1)
    assert len(reads) == 2
    assert {reads[i][1]["answer"] for i in range(2)} == {"look", "take lamp"}
    for (prompt, _), (question, _) in zip((reads[0], reads[1]), dialogues, strict=True):
        assert question["value"] in prompt
