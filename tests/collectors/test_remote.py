"""Workers in Ray's own test cluster of two nodes: what they play, how their ids and weights stay in
step with the learner's, and what their deaths cost.

Games are scripted, texts are hashed (`scripted.py`); the main job with real ones is in
`test_main_job.py`.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.packing import pack
from priorzero.games.group import GameEnvGroup
from priorzero.types import PriorZeroError
from tests.collectors.scripted import (
    ENVIRONMENTS,
    MAKE,
    Encoder,
    Env,
    collector_of,
    policy_of,
    settings_of,
)
from tests.conftest import DIM
from tests.playing import told_actions

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def cluster():
    """Two nodes; this process is in it, as a run is."""
    import ray
    from ray.cluster_utils import Cluster

    from priorzero.ray_link import connect, disconnect

    nodes = Cluster(initialize_head=True, head_node_args=dict(num_cpus=2, include_dashboard=False))
    nodes.add_node(num_cpus=2)
    nodes.wait_for_nodes()
    assert connect(nodes.address, cpus=0, gpus=0) and ray.is_initialized()
    yield nodes
    disconnect()
    nodes.shutdown()


@pytest.fixture
def make(cluster, one_thread):
    """`make(workers, faults={}, **settings of the policy)`: a remote collector and its learner."""
    from priorzero.collectors.remote import RemoteCollector

    made = []

    def build(workers: int, faults=None, limits=None, **policy_settings):
        settings, create = settings_of(**policy_settings)
        settings.collectors.worker_cpus = 0.5
        for name, value in (limits or {}).items():
            setattr(settings.collectors, name, value)
        policy = policy_of(settings, create)
        collector = RemoteCollector(
            settings.collectors,
            MAKE,
            {"settings": settings.as_dict(), "create": create, "faults": faults or {}},
            workers=workers,
            environments=ENVIRONMENTS,
            policy=policy,
            encoder=Encoder(),
            llm=None,
            seed=settings.seed,
        )
        made.append(collector)
        return SimpleNamespace(collector=collector, policy=policy, settings=settings, create=create)

    yield build
    for collector in made:
        collector.close()


def require_in_step(policy, segments) -> None:
    """Every id of these segments is the learner's of that command."""
    for segment in segments:
        for step in segment.steps:
            names = [policy.vocabulary.action_of(i) for i in step.valid_ids]
            assert names == list(step.valid_actions)
            assert step.valid_actions == told_actions(segment.env_id, step.timestep)


async def test_a_single_worker_plays_what_this_process_would(make, randomise):
    """Number for number, with new weights in the second round."""
    far = make(1)
    here = policy_of(far.settings, far.create)
    envs = GameEnvGroup([Env(i) for i in range(ENVIRONMENTS)], seed=far.settings.seed)
    near = collector_of(far.settings, here, envs)
    began, oldest = {}, []  # rounds in which open segments began; the oldest age of each round

    def key(segment):
        return segment.episode_id, segment.steps[0].timestep

    try:
        for round_ in range(4):
            for policy in (far.policy, here):
                randomise(policy.network, seed=round_)
            ours = await near.collect(6, 40 * round_, 1.0)
            theirs = await far.collector.collect(6, 40 * round_, 1.0)

            assert theirs.steps == ours.steps and theirs.running == ours.running
            assert theirs.prior == ours.prior
            ages = [round_ - began.pop(key(s), round_) for s in ours.segments]
            oldest.append(max(ages))
            assert theirs.collect.pop("staleness_mean") == np.mean(ages)
            assert theirs.collect.pop("staleness_max") == max(ages)
            assert theirs.collect == ours.collect
            for segment in near.open_segments:
                if len(segment):
                    began.setdefault(key(segment), round_)
            one, two = pack(ours.segments), pack(theirs.segments)
            assert one.keys() == two.keys()
            for name, values in one.items():
                if name != "segment_episode":  # numbered in order of arrival
                    np.testing.assert_array_equal(values, two[name], err_msg=name)
        assert max(oldest) >= 1
        known, own = (p.vocabulary.state_dict() for p in (far.policy, here))
        assert known == own
    finally:
        envs.close()


async def test_workers_on_two_machines_feed_one_buffer(make, randomise):
    made = make(3, num_segments=6)
    buffer = PriorZeroGameBuffer(made.settings.policy, DIM, 0)
    results = []
    for number in range(4):
        randomise(made.policy.network, seed=number)
        results.append(await made.collector.collect(6, 0, 1.0))
        buffer.push_game_segments(results[-1].segments)

    facts = made.collector.workers
    assert len({f["pid"] for f in facts}) == 3 and len({f["node"] for f in facts}) == 2
    segments = [segment for result in results for segment in result.segments]
    assert {s.env_id for s in segments} == set(range(ENVIRONMENTS))
    require_in_step(made.policy, segments)

    # Their parts of an episode are linked, and an episode has one number.
    episodes = {}
    for segment in segments:
        episodes.setdefault(segment.episode_id, []).append(segment)
    assert sorted(episodes) == list(range(len(episodes)))
    for parts in episodes.values():
        assert len({part.env_id for part in parts}) == 1
        times = [step.timestep for part in parts for step in part.steps]
        assert times == list(range(len(times))), "an episode's segments come in order"
    assert any(len(parts) == 2 for parts in episodes.values())
    pairs = [pair for parts in episodes.values() for pair in itertools.pairwise(parts)]
    assert all(before.successor is after for before, after in pairs)

    # A segment that goes on from one round to the next was begun with older weights.
    ages = [(r.collect["staleness_mean"], r.collect["staleness_max"]) for r in results]
    assert ages[0] == (0.0, 0.0) and max(ages)[1] >= 1
    assert all(0 <= mean <= most for mean, most in ages)

    totals = made.collector.totals()
    assert totals.workers["workers"] == 3 and totals.workers["worker_deaths"] == 0
    # Three workers and the learner: sums, and means of what is a share.
    assert totals.encoder == {"hits": 4.0, "misses": 8.0, "hit_rate": 0.5}
    assert made.collector.watch.seconds["env"] > 0
    batch = buffer.sample(8)
    assert made.policy.learn_mode.forward(batch).metrics["wm_loss"] > 0


async def test_what_a_worker_names_the_learner_knows_before_it_trains(make):
    """Some actions are only met at certain steps; a full vocabulary shares its last ids alike."""
    made = make(2, num_segments=2, action_vocabulary=dict(kind="stable", capacity=10, overflow=4))
    for _ in range(5):
        result = await made.collector.collect(2, 0, 1.0)
        for segment in result.segments:
            for step in segment.steps:
                ids = made.policy.vocabulary.ids(step.state.valid_actions)
                assert step.valid_ids.tolist() == [i for i in ids if i is not None]
                assert made.policy.vocabulary.used_mask[step.valid_ids].all()
    assert made.policy.vocabulary.size == 6 and made.policy.vocabulary.used_mask[6:].any()
    table = made.policy.network.world_model.act_embedding_table
    assert (np.abs(table.text.numpy()).sum(1) > 0)[:6].all()


async def test_positions_as_ids_need_no_list(make):
    made = make(
        2, num_segments=2, action_vocabulary=dict(kind="positional", capacity=8, overflow=1)
    )
    result = await made.collector.collect(4, 0, 1.0)
    for segment in result.segments:
        for step in segment.steps:
            assert step.valid_ids.tolist() == list(range(len(step.valid_actions)))
    assert made.policy.vocabulary.size == 4


async def test_a_killed_worker_costs_its_running_segments_only(make, caplog):
    made = make(2)
    before = await made.collector.collect(4, 0, 1.0)
    victim, other = made.collector.workers
    os.kill(victim["pid"], signal.SIGKILL)

    after = await made.collector.collect(4, 16, 1.0)
    assert len(after.segments) >= 4
    assert made.collector.workers[1] == other and made.collector.workers[0]["pid"] != victim["pid"]
    told = [r for r in caplog.records if "is given up" in r.message]
    assert len(told) == 1
    assert f"process {victim['pid']}) is given up: " in told[0].message
    assert "Its 2 running episodes are lost" in told[0].message and "(death 1" in told[0].message
    assert made.collector.totals().workers["worker_deaths"] == 1

    # The other one's episodes went on; the new worker's are new ones, on other seeds.
    ids = {s.env_id: s.episode_id for s in before.segments}
    went_on = [s for s in after.segments if s.steps[0].timestep > 0 and s.env_id in (2, 3)]
    assert {s.env_id: s.episode_id for s in went_on} == {2: ids[2], 3: ids[3]}
    fresh = [s for s in after.segments if s.env_id in (0, 1)]
    assert fresh and not {s.episode_id for s in fresh} & set(ids.values())
    require_in_step(made.policy, after.segments)


@pytest.mark.parametrize(
    ("fault", "limits", "reason"),
    [
        ("kill", {}, "ActorDiedError"),
        ("raise", {}, "ZeroDivisionError: a fault of ours"),
        ("sleep", {"timeout_s": 5.0}, "it did not answer in 5 s"),
    ],
)
async def test_a_worker_that_fails_within_a_round_is_replaced(make, caplog, fault, limits, reason):
    made = make(2, faults={(1, 0): (fault, 3)}, limits=limits)
    result = await made.collector.collect(4, 0, 1.0)
    assert len(result.segments) >= 4 and {s.env_id for s in result.segments} == {0, 1, 2, 3}
    told = [r.message for r in caplog.records if "is given up" in r.message]
    assert len(told) == 1 and reason in told[0] and "collector worker 1 (" in told[0]
    assert len(told[0]) < 700
    assert made.collector.totals().workers["worker_deaths"] == 1


async def test_workers_that_die_again_and_again_end_the_run(make):
    faults = {(0, life): ("raise", 2) for life in range(9)}
    made = make(1, faults=faults, limits={"max_restarts": 1})
    with pytest.raises(PriorZeroError, match="failed 2 times in a row .*ZeroDivision.*--resume"):
        await made.collector.collect(4, 0, 1.0)


@pytest.mark.parametrize("fault", ["mend", "start"])
async def test_what_the_user_can_mend_is_told_at_once(make, fault):
    made = make(2, faults={(1, 0): (fault, 2)})
    with pytest.raises(PriorZeroError, match=r"^collector worker 1 \(.*put it (back|there)$"):
        await made.collector.collect(4, 0, 1.0)
    assert made.collector.totals().workers["worker_deaths"] == 0


async def test_more_workers_than_room_is_an_error_that_tells_both(make):
    with pytest.raises(PriorZeroError, match="need 8 of Ray's resource CPU, and .* 4 CPU: take"):
        make(4, limits={"worker_cpus": 2.0})


async def test_episodes_are_split_too(make):
    """As llm_only does it: so many may begin, and then no more."""
    made = make(2)
    first = await made.collector.collect(100, 0, 1.0, new_episodes=5)
    assert (first.begun, first.running) == (5, 0)
    assert sum(s.steps[-1].done_kind == "terminated" for s in first.segments) == 5
    assert (await made.collector.collect(100, 0, 1.0, new_episodes=0)).steps == 0


async def test_a_checkpoint_goes_on_with_workers_and_without(make, caplog):
    caplog.set_level("INFO", "priorzero")
    made = make(2)
    await made.collector.collect(4, 0, 1.0)
    state = made.collector.state_dict()
    assert state["elsewhere"] == 4 and state["episodes"] == 4

    again = make(2)
    assert await again.collector.resume(state) == 4
    assert "the 4 that ran when the checkpoint was written do not go on" in caplog.text
    result = await again.collector.collect(4, 0, 1.0)
    assert min(s.episode_id for s in result.segments) == 4
    lives = [one.collector.state_dict()["lives"] for one in (made, again)]
    assert lives == [0, 1], "their games have other seeds"

    # In this process, and back: what was played here is not lost.
    envs = GameEnvGroup([Env(i) for i in range(ENVIRONMENTS)], seed=0)
    try:
        policy = policy_of(made.settings, made.create)
        here = collector_of(made.settings, policy, envs)
        assert await here.resume(state) == 4
        await here.collect(2, 0, 1.0)
        saved = here.state_dict()
    finally:
        envs.close()
    open_steps = sum(len(segment) for segment in here.open_segments)
    back = make(2)
    back.policy.vocabulary.load_state_dict(policy.vocabulary.state_dict())
    assert await back.collector.resume(saved) == 4
    result = await back.collector.collect(4, 0, 1.0)
    assert result.transitions == open_steps + sum(len(s) for s in result.segments[-4:])
