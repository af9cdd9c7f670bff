"""ORZ's workers in a Ray cluster that is joined: two nodes of Ray's own test cluster."""

from __future__ import annotations

import copy
import time

import pytest

from priorzero.llm.update.trainers import builtin
from priorzero.orz import orz_status
from priorzero.types import PriorZeroError
from tests.llm.update.test_orz_trainer import PHASES, far, orz_settings, weights

FOUND, REASON = orz_status()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOUND, reason=f"Open-Reasoner-Zero: {REASON}"),
    pytest.mark.timeout(900),
]


@pytest.fixture
def address():
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True,
        head_node_args=dict(num_cpus=2, num_gpus=1, include_dashboard=False),
    )
    nodes.add_node(num_cpus=2, num_gpus=1)
    yield nodes.address
    nodes.shutdown()


def test_workers_are_spread_and_leave_the_cluster_as_it_was(address, byte_model):
    import ray

    from priorzero.llm.update.trainers import orz

    of = orz_settings(batch_size=0)
    of.orz.ray_address, of.orz.actor_nodes, of.orz.placement = address, 2, "STRICT_SPREAD"
    theirs = builtin.make(copy.deepcopy(byte_model), None, of, "sum")
    ours = orz.make(byte_model, None, of, "sum")
    try:
        rooms = ray.util.placement_group_table().values()
        (room,) = [r for r in rooms if r["state"] == "CREATED"]
        assert len(set(room["bundles_to_node_id"].values())) == 2
        for trainer in (ours, theirs):
            trainer.update({"rft": PHASES[0]})
        assert far(weights(ours), weights(theirs)) < 1e-3
    finally:
        ours.close()
    assert not ray.is_initialized()

    # It is free again for others; and who asks for more than there is is told what there is.
    until = time.monotonic() + 60
    ray.init(address=address, log_to_driver=False)
    try:
        while ray.available_resources().get("GPU", 0) < 2 and time.monotonic() < until:
            time.sleep(0.2)
        assert ray.available_resources()["GPU"] == 2
        of.orz.actor_nodes, of.orz.start_timeout_s = 3, 3.0
        with pytest.raises(PriorZeroError, match="no room for 3 x .*it has 2 GPU"):
            orz.make(byte_model, None, of, "sum")
    finally:
        ray.shutdown()


def test_a_start_that_takes_too_long_is_told(byte_model, monkeypatch):
    """Ray's bare exception, on a machine that is busy."""
    import ray

    from priorzero.llm.update.trainers import orz

    def late(**given):
        raise Exception("the current node timed out during startup")

    monkeypatch.setattr(ray, "init", late)
    with pytest.raises(PriorZeroError, match="Ray does not start .*timed out"):
        orz.make(byte_model, None, orz_settings(), "sum")
