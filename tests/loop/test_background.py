"""Training beside collection, and evaluations beside both, on made-up parts: what overlaps, what
waits for what, and how it fails.

Stages are stopped and let go by events; no time is measured.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from types import SimpleNamespace

import pytest
import torch

from priorzero.compute import thread_pool, torch_threads
from priorzero.loop import background, beside, saving
from priorzero.loop.background import Background, suggested
from priorzero.loop.schedules import parallel
from priorzero.loop.train import train
from priorzero.types import PriorZeroError

GO = SimpleNamespace(requested=False)
SECONDS = 30  # that nothing here needs


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


@pytest.fixture(autouse=True)
async def nothing_is_left():
    """No test leaves a task behind, whatever failed in it."""
    yield
    assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []


class Stopped:
    """A function of the parts that stops at each call until `go`; counts the calls begun."""

    def __init__(self, real) -> None:
        self._real, self._room = real, threading.Semaphore(0)
        self.begun = 0

    def __call__(self, *arguments):
        self.begun += 1
        assert self._room.acquire(timeout=SECONDS)
        return self._real(*arguments)

    def go(self, calls: int = 1) -> None:
        self._room.release(calls)


async def until(holds) -> None:
    """Let the others work until it holds."""
    async with asyncio.timeout(SECONDS):
        while not holds():
            await asyncio.sleep(0.001)


async def some_turns() -> None:
    """Of the event loop: enough for whatever may go on without an event to go on."""
    for _ in range(20):
        await asyncio.sleep(0.001)


def in_background(made, **settings):
    """A run whose world model stops in each update, one update a phase."""
    run = made(
        **{"wm_train_freq": 1, "llm_train_freq": 100, "eval_freq": 0, "save_freq": 0} | settings
    )
    run.plays = [(2, 2)] * 50
    update = Stopped(run.parts.policy.learn_mode.forward)
    run.parts.policy.learn_mode.forward = update
    return run, update


def collections(run) -> int:
    return sum(event.startswith("collect") for event in run.events)


# ---- ahead, but not too far ----------------------------------------------------------------------


@pytest.mark.parametrize("degree", [1, 2, 3])
async def test_collection_overlaps_training_and_runs_ahead_by_the_degree(made, degree):
    run, update = in_background(made, iterations=6, off_policy_degree=degree)
    whole = asyncio.create_task(train(run.parts, GO))

    # The first phase stands still, and so many more were collected and handed over beside it.
    await until(lambda: collections(run) == degree + 1)
    await some_turns()
    assert collections(run) == degree + 1 and update.begun == 1
    assert run.parts.background.world_model.behind == degree + 1

    # Each phase that ends lets one more collection begin.
    for ended in range(1, 4):
        update.go()
        await until(lambda n=ended: collections(run) == min(6, degree + 1 + n))
        await some_turns()
        assert collections(run) == min(6, degree + 1 + ended)
    update.go(9)
    await whole
    assert run.parts.progress.updates == 6 and collections(run) == 6


async def test_degree_0_trains_in_turn_and_touches_nothing(made):
    run, update = in_background(made, iterations=2)
    before = asyncio.get_running_loop()._default_executor
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: update.begun == 1)
    await some_turns()
    assert run.take() == ["collect from 0"]
    update.go(2)
    await whole
    assert run.take() == ["update", "collect from 2", "update"]  # no copy, no hand-over
    assert asyncio.get_running_loop()._default_executor is before or before is None


async def test_the_llm_trains_beside_the_world_model_and_each_keeps_its_order(made):
    run, update = in_background(made, iterations=4, off_policy_degree=2, llm_train_freq=2)
    release = asyncio.Event()
    llm = run.parts.llm.phase.run

    async def stopped(draw):
        run.events.append("llm begins")
        await release.wait()
        return await llm(draw)

    run.parts.llm.phase.run = stopped
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: "llm begins" in run.events and update.begun == 1)
    update.go(9)
    await until(lambda: run.parts.progress.updates == 4)
    # Its second phase waits for the first.
    assert run.events.count("llm begins") == 1 and run.parts.background.llm.behind == 2
    release.set()
    await whole
    assert run.parts.progress.llm_version == 2
    assert [e for e in run.take() if e.startswith("weights")] == [
        f"weights {n}" for n in (1, 2, 3, 4)
    ]
    assert run.parts.history.losses == {"wm_loss": [1.0, 2.0, 3.0, 4.0], "sft_loss": [0.25] * 2}


async def test_a_run_in_the_background_does_what_one_in_turn_does(made, tmp_path, told):
    """As much is trained, evaluated and saved at the same places; before these it settles."""
    runs = []
    for degree in (0, 1):
        run = made(iterations=4, off_policy_degree=degree)
        run.returns = [9.0, 1.0, 3.0]
        await train(run.parts, GO)
        runs.append(run)
    in_turn, beside_it = (run.parts for run in runs)
    assert beside_it.progress == in_turn.progress
    assert beside_it.history.losses == in_turn.history.losses
    assert beside_it.history.evaluations == in_turn.history.evaluations
    for pointer in ("latest", "best"):
        assert (tmp_path / "ckpt" / pointer).read_text().startswith("iter_00000004")
    events = runs[1].take()
    assert events[:2] == ["act apart from 0", "evaluate world_model iter000000 at 0"]
    assert events.count("llm") == 2 and "weights 8" in events
    middle = events.index("evaluate world_model iter000002 at 10")
    assert sorted(events[:middle]).count("update") == 4, "an evaluation saw unfinished training"


async def test_a_checkpoint_holds_what_was_handed_over(made, tmp_path, told):
    run, update = in_background(made, iterations=3, off_policy_degree=3, save_freq=2)
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: collections(run) == 2)
    await some_turns()
    assert not (tmp_path / "ckpt").exists() and collections(run) == 2
    update.go(2)
    await until(lambda: collections(run) == 3)
    assert (tmp_path / "ckpt" / "latest").read_text() == "iter_00000002"
    state, _, _ = run.parts.checkpoints.load("latest")
    assert state["progress"]["updates"] == 2
    assert "Waiting for what is under way beside the loop: world model 2" in told.text
    update.go()
    await whole


async def test_a_stop_waits_for_what_was_handed_over_and_saves_it(made, tmp_path, told):
    run, update = in_background(made, iterations=99, off_policy_degree=2)
    stop = SimpleNamespace(requested=False)
    whole = asyncio.create_task(train(run.parts, stop))
    await until(lambda: collections(run) == 3)
    stop.requested = True
    update.go()  # the loop waits for room, and then for all of it
    await until(lambda: collections(run) == 4)
    await some_turns()
    assert not whole.done() and collections(run) == 4
    update.go(3)
    await whole
    assert "Stopped by a signal after iteration 4; continue with --resume" in told.text
    state, _, _ = run.parts.checkpoints.load("latest")
    assert (state["progress"]["iteration"], state["progress"]["updates"]) == (4, 4)

    # It goes on from there, with a copy to act with as old as that.
    again, update = in_background(made, iterations=5, off_policy_degree=2)
    await saving.load(again.parts, "latest")
    update.go(1)
    await train(again.parts, GO)
    assert "act apart from 4" in again.events and again.parts.progress.updates == 5


async def test_what_is_told_of_it(made, tmp_path):
    run, update = in_background(made, iterations=3, off_policy_degree=1, llm_train_freq=1)
    update.go(99)
    release = asyncio.Event()

    async def stopped(draw):
        await release.wait()
        return {}

    run.parts.llm.phase.run = stopped
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: run.parts.background.llm.behind == 2)
    release.set()
    await whole
    run.parts.metrics.flush()
    lines = (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()
    perf = [row for row in map(json.loads, lines) if row["namespace"] == "perf"]
    assert [row["background_degree"] for row in perf] == [1.0] * 3
    assert [row["background_llm_behind"] for row in perf][:2] == [1.0, 2.0]
    assert all(0 <= row["background_wm_behind"] <= 2 for row in perf)
    # One update each iteration: those handed over, less those in the acting weights.
    assert all(0 <= row["background_acting_age"] <= n for n, row in enumerate(perf, 1))
    assert all(row["background_seconds_waited"] >= 0 for row in perf)
    assert "background_eval_behind" not in perf[0]


async def test_overlap_is_the_time_both_are_at_work():
    chains, now = Background(), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(background.time, "perf_counter", lambda: now[0])
        chains._mark()
        release = asyncio.Event()
        chains.world_model.add(release.wait)
        await until(lambda: chains.world_model.running)
        now[0] = 3.0  # a phase alone
        with chains.collecting():
            now[0] = 5.0  # both
            release.set()
            await until(lambda: not chains.world_model.behind)
            now[0] = 9.0  # collection alone
        assert chains.metrics(0)["background_seconds_overlap"] == 2.0
        assert chains.metrics(0)["background_seconds_overlap"] == 0.0
        assert list(chains.world_model.seconds) == [5.0]
        chains.world_model.add(release.wait)
        await until(lambda: not chains.world_model.behind)
        assert list(chains.world_model.intervals) == [0.0, 6.0]


# ---- the degree that chooses itself --------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "intervals", "degree"),
    [
        ([], [], 1),
        ([1.0], [], 1),
        ([1, 1, 1], [2, 2, 2], 1),
        ([1, 1, 5], [4, 4, 4], 2),  # one slow phase of a chain that is faster on the whole
        ([1, 1, 1, 13], [5, 5, 5, 5], 3),
        ([4, 4, 4], [1, 1, 9], 3),  # the mirror image: one slow collection
        ([0.001], [1000.0], 1),
        ([1.0, 1.0], [0.0, 0.0], 1),
        ([0.1] * 99 + [90.0], [1.0], 8),
    ],
)
def test_the_degree_that_suits_the_times(phases, intervals, degree):
    assert suggested(phases, intervals) == degree


async def test_the_degree_is_chosen_and_told(made, told):
    run = made(iterations=3, off_policy_degree=-1, eval_freq=0)
    chains = run.parts.background
    chains.world_model.seconds.extend([1, 1, 1, 13])
    chains.world_model.intervals.extend([5, 5, 5, 5])
    await train(run.parts, GO)
    assert "off_policy_degree is now 3, by the measured times (was 1)" in told.text


# ---- what fails ----------------------------------------------------------------------------------

FAULTS = ("collect", "update", "weights", "llm", "evaluate")


@pytest.mark.parametrize("async_eval", [False, True])
@pytest.mark.parametrize("degree", [0, 2])
@pytest.mark.parametrize("stage", FAULTS)
async def test_an_exception_ends_the_run_with_itself(
    made, tmp_path, told, stage, degree, async_eval
):
    """In any stage: the last checkpoint stands, nothing hangs, nothing is left running."""
    run = made(
        iterations=20,
        save_freq=1,
        eval_freq=3,
        off_policy_degree=degree,
        async_eval=async_eval,
    )
    fault = PriorZeroError(f"no {stage} today")
    parts = run.parts

    def broken(*_, **__):
        if parts.progress.iteration >= 3:
            raise fault
        return real(*_, **__)

    owner, name = {
        "collect": (parts.collector, "collect"),
        "update": (parts.policy.learn_mode, "forward"),
        "weights": (parts.policy, "offer_weights"),
        "llm": (parts.llm.phase, "run"),
        "evaluate": (parts.evaluator, "evaluate"),
    }[stage]
    if stage == "weights" and not degree:
        pytest.skip("in turn there is nothing to hand over")
    if stage == "evaluate" and async_eval:
        owner = SimpleNamespace(evaluate=parts.evaluator.evaluate)
        parts.evaluator.playing = lambda policy: owner
    real = getattr(owner, name)
    setattr(owner, name, broken)

    async with asyncio.timeout(SECONDS):
        with pytest.raises(PriorZeroError) as raised:
            await train(parts, GO)
    assert raised.value is fault
    latest = (tmp_path / "ckpt" / "latest").read_text()
    # What fails beside the loop is raised before the next save.
    assert latest in ("iter_00000002", "iter_00000003", "iter_00000004")
    state, _, _ = parts.checkpoints.load("latest")
    assert state["progress"]["iteration"] == int(latest[-8:])
    assert "never retrieved" not in told.text


async def test_a_failure_drops_what_waits_and_lets_what_is_under_way_finish(made):
    run, update = in_background(made, iterations=20, off_policy_degree=3, llm_train_freq=2)

    async def broken(draw):
        await until(lambda: run.parts.background.world_model.behind >= 2)
        raise PriorZeroError("the engine is gone")

    run.parts.llm.phase.run = broken
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: run.parts.background.llm.failure is not None)
    await some_turns()
    assert not whole.done() and update.begun == 1, "a thread was left at work"
    update.go(99)
    with pytest.raises(PriorZeroError, match="the engine is gone"):
        await whole
    assert update.begun == 1


async def test_after_a_failure_a_chain_does_nothing_more():
    chains, done = Background(), []

    async def broken():
        raise PriorZeroError("not finite")

    async def other():
        done.append("other")

    chains.world_model.add(broken)
    chains.world_model.add(other)
    with pytest.raises(PriorZeroError, match="not finite"):
        await chains.settle()
    await chains.abandon()
    assert not done and chains.world_model.behind == 0
    with pytest.raises(PriorZeroError, match="not finite"):
        await chains.room()


async def test_what_never_ends_is_left_behind(made, told, monkeypatch):
    monkeypatch.setattr(background, "_GRACE_S", 0.01)
    run = made(iterations=3, off_policy_degree=1, llm_train_freq=1, eval_freq=0)

    async def hangs(draw):
        await asyncio.Event().wait()

    def broken(batch):
        raise PriorZeroError("not finite")

    run.parts.llm.phase.run = hangs
    run.parts.policy.learn_mode.forward = broken
    with pytest.raises(PriorZeroError, match="not finite"):
        await train(run.parts, GO)
    assert "LLM: what was under way did not end within 0.01 s and is left behind" in told.text


# ---- evaluation beside what follows --------------------------------------------------------------


def evaluating(made, **settings):
    """A run whose evaluations of snapshots stop until they are let go."""
    run = made(async_eval=True, **settings)
    gates: list[asyncio.Event] = []
    playing = run.parts.evaluator.playing

    def stopped(policy):
        real = playing(policy)
        gate = asyncio.Event()
        gates.append(gate)

        async def evaluate(*arguments):
            await gate.wait()
            return await real.evaluate(*arguments)

        return SimpleNamespace(evaluate=evaluate)

    run.parts.evaluator.playing = stopped
    return run, gates


async def test_an_evaluation_plays_a_snapshot_and_judges_its_checkpoint(made, tmp_path):
    """The evaluation of iteration 2 ends during iteration 5; the best is the checkpoint of 2."""
    run, gates = evaluating(made, iterations=6, eval_freq=2, save_freq=0, llm_train_freq=100)
    run.returns = [0.0, 7.0, 5.0]
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: len(gates) == 1)
    gates[0].set()
    await until(lambda: len(gates) == 2)
    await until(lambda: run.parts.progress.iteration == 4)
    await some_turns()
    # The next evaluation waits for it, and so does collection after that.
    assert len(gates) == 2 and run.parts.progress.iteration == 4
    assert [e["iteration"] for e in run.parts.history.evaluations] == [0]
    gates[1].set()
    await until(lambda: len(gates) == 3)
    gates[2].set()
    await whole

    evaluations = run.parts.history.evaluations
    assert [(e["iteration"], e["env_steps"]) for e in evaluations] == [
        (0, 0),
        (2, 10),
        (4, 20),
        (6, 30),
    ]
    assert run.parts.progress.best_return == 7.0
    assert {p: (tmp_path / "ckpt" / p).read_text() for p in ("latest", "best")} == {
        "latest": "iter_00000006",
        "best": "iter_00000002",
    }
    state, _, _ = run.parts.checkpoints.load("best")
    assert (state["progress"]["iteration"], state["progress"]["updates"]) == (2, 4)
    events = run.take()
    assert "snapshot after 4 updates" in events and "snapshot after 8 updates" in events
    # With the LLM first, and its weights kept until then; then without.
    played = [e for e in events if e != "update" and not e.startswith("collect")]
    assert played[6:12] == [
        *["LLM kept", "snapshot after 4 updates", "evaluate world_model_llm iter000002 at 10"],
        *["LLM free", "snapshot after 4 updates", "evaluate world_model iter000002 at 10"],
    ]
    run.parts.metrics.flush()
    rows = map(json.loads, (tmp_path / "log" / "metrics.jsonl").read_text().splitlines())
    steps = [row["step"] for row in rows if "world_model_llm/return_mean" in row]
    assert steps == [0, 10, 20, 30]


async def test_a_checkpoint_under_judgement_outlives_later_ones(made, tmp_path):
    run, gates = evaluating(made, iterations=9, eval_freq=4, save_freq=0, llm_train_freq=100)
    run.returns = [0.0, 7.0]
    saved = []

    async def saves(draw=None):
        saved.append(run.parts.progress.iteration)
        run.parts.checkpoints.save(run.parts.progress.iteration, {}, None, {})

    real = run.parts.collector.collect

    async def collect(*arguments):
        if run.parts.progress.iteration in (5, 6, 7):
            await saves()
        return await real(*arguments)

    run.parts.collector.collect = collect
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: len(gates) == 1)
    gates[0].set()
    await until(lambda: saved == [5, 6, 7])
    names = {p.name for p in (tmp_path / "ckpt").iterdir() if p.is_dir()}
    assert "iter_00000004" in names and "iter_00000005" not in names
    for gate in gates:
        gate.set()
    await until(lambda: len(gates) == 3)
    gates[2].set()
    await whole
    assert (tmp_path / "ckpt" / "best").read_text() == "iter_00000004"


async def test_a_full_disk_at_the_snapshot_costs_the_best_checkpoint(made, tmp_path, told):
    run = made(async_eval=True, iterations=3, eval_freq=1, save_freq=0)
    run.returns = [0.0, 5.0, 4.0, 3.0]
    real = torch.save

    def full(state, path):
        if run.parts.progress.iteration == 1:
            raise OSError(28, "No space left on device")
        real(state, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "save", full)
        await train(run.parts, GO)
    assert "the best evaluation so far has no checkpoint: it could not be written" in told.text
    assert run.parts.progress.best_return == 4.0 and run.parts.progress.save_failures == 1
    assert (tmp_path / "ckpt" / "best").read_text() == "iter_00000002"


async def test_a_stop_waits_for_the_evaluation(made):
    run, gates = evaluating(made, iterations=9, eval_freq=4)
    stop = SimpleNamespace(requested=False)
    whole = asyncio.create_task(train(run.parts, stop))
    await until(lambda: collections(run) >= 1)
    stop.requested = True
    await some_turns()
    assert not whole.done()
    gates[0].set()
    await whole
    assert [e["iteration"] for e in run.parts.history.evaluations] == [0]


async def test_an_interrupted_evaluation_is_played_again(made, tmp_path):
    """Killed while the snapshot of iteration 2 was judged: the checkpoint does not know of it."""
    run, gates = evaluating(made, iterations=9, eval_freq=2, save_freq=0)
    whole = asyncio.create_task(train(run.parts, GO))
    await until(lambda: gates)
    gates[0].set()
    await until(lambda: collections(run) >= 3)
    whole.cancel()
    with pytest.raises(asyncio.CancelledError):
        await whole

    again = made(async_eval=True, iterations=3, eval_freq=2)
    await saving.load(again.parts, "latest")
    await train(again.parts, GO)
    assert [e["iteration"] for e in again.parts.history.evaluations] == [0, 2, 3]


async def test_in_any_schedule_an_evaluation_that_fails_ends_the_run_at_the_next_step(made):
    run = made(
        async_eval=True,
        wm_training_mode="sequential",
        sequential_wm_updates=1000,
        iterations=50,
        eval_freq=100,
        save_freq=0,
    )

    async def broken(*_):
        raise PriorZeroError("the LLM is gone")

    run.parts.evaluator.playing = lambda policy: SimpleNamespace(evaluate=broken)
    with pytest.raises(PriorZeroError, match="the LLM is gone"):
        await train(run.parts, GO)
    assert run.parts.progress.iteration <= 1


async def test_without_an_llm_nothing_of_it_is_asked(made):
    run = made(async_eval=True, llm=False, iterations=1)
    run.parts.settings.eval.modes = ["world_model"]
    await train(run.parts, GO)
    assert "LLM kept" not in run.take()


# ---- threads -------------------------------------------------------------------------------------


def test_a_pools_threads_do_not_begin_with_a_searchs_number():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    searching, done = threading.Event(), threading.Event()

    def search():
        with torch_threads(1):
            searching.set()
            done.wait(SECONDS)

    # One whose thread begins during the search, and one whose thread did nothing before it.
    pool, waiting = thread_pool(1, "test"), thread_pool(1, "waiting")
    waiting.submit(int).result()
    searcher = threading.Thread(target=search)
    searcher.start()
    try:
        searching.wait(SECONDS)
        seen = []
        plain = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        plain.start()
        plain.join()
        assert seen == [1], "torch has changed: the pool is not needed any more"
        assert waiting.submit(torch.get_num_threads).result() == 3
        assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        done.set()
        searcher.join()
        pool.shutdown()
        waiting.shutdown()
        torch.set_num_threads(before)


async def test_the_schedule_is_parallels(made):
    run = made(off_policy_degree=2)
    async with beside.background(run.parts):
        await parallel.iterate(run.parts)
        await run.parts.background.settle()
    assert run.take()[-1] == "weights 2"
