"""Schedules with turns, sequential and alternating, on made-up parts: what happens in which order,
where it ends, what is told, and that a resumed run goes on within the turn it was in.

An iteration of the made-up collector brings three transitions, which call for two updates.
"""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from priorzero.loop import saving, schedules
from priorzero.loop.train import train

ROOT = Path(__file__).resolve().parents[2]
GO = SimpleNamespace(requested=False)
QUIET = dict(eval_freq=0, save_freq=0)


@pytest.fixture(autouse=True)
def told(caplog):
    caplog.set_level(logging.INFO)
    return caplog


def drawn(events: list[str]) -> str:
    """One letter per event: c collect, n collect without the LLM, u an update, l a phase of the
    LLM, E an evaluation of a mode.
    """
    letters = {"update": "u", "llm": "l", "evaluate": "E"}
    return "".join(
        ("n" if event.endswith("without the LLM") else "c")
        if event.startswith("collect")
        else letters[event.split()[0]]
        for event in events
    )


def turns_in(folder) -> list[tuple[int, int, int]]:
    """Turn, whether the LLM's, and how much of it is done, of every iteration."""
    rows = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").open()]
    return [
        (row["turn"], row["turn_llm"], row["turn_updates"])
        for row in rows
        if row["namespace"] == "perf"
    ]


# What each mode plays and trains, iteration by iteration. Five updates take three iterations, the
# third of which updates once; four take two.
MODES = [
    ("sequential", {}, "cuu cuu cu cl cl"),
    ("sequential", dict(sequential_repeat=True), "cuu cuu cu cl cl cuu cuu cu cl cl cuu cuu"),
    ("sequential", dict(sequential_wm_updates=1, sequential_llm_phases=3), "cu cl cl cl"),
    ("alternating", {}, "cuu cuu cl cl cuu cuu cl cl cuu cuu cl cl"),
    ("alternating", dict(alternating_first="llm"), "cl cl cuu cuu cl cl cuu cuu cl cl cuu cuu"),
    (
        "alternating",
        dict(alternating_llm_collect="world_model"),
        "cuu cuu nl nl cuu cuu nl nl cuu cuu nl nl",
    ),
    (
        "alternating",
        dict(alternating_llm_collect="world_model", alternating_first="llm"),
        "nl nl cuu cuu nl nl cuu cuu nl nl cuu cuu",
    ),
    (
        "alternating",
        dict(alternating_llm_collect="nothing", alternating_wm_updates=3, alternating_llm_phases=3),
        "cuu cu l l l cuu cu l l l cuu cu",
    ),
]
IDS = [f"{mode} {' '.join(map(str, given.values()))}".strip() for mode, given, _ in MODES]


@pytest.mark.parametrize(("mode", "given", "sequence"), MODES, ids=IDS)
async def test_what_happens_in_which_order(made, mode, given, sequence):
    run = made(wm_training_mode=mode, iterations=12, **QUIET, **given)
    await train(run.parts, GO)
    assert drawn(run.take()) == sequence.replace(" ", "")
    progress = run.parts.progress
    assert progress.iteration == len(sequence.split())
    assert progress.updates == sequence.count("u")
    assert progress.llm_version == sequence.count("l")
    assert progress.env_steps == 5 * (sequence.count("c") + sequence.count("n"))


@pytest.mark.parametrize("stop", [1, 2, 4, 7])
@pytest.mark.parametrize(("mode", "given", "sequence"), MODES, ids=IDS)
async def test_a_resumed_run_goes_on_within_its_turn(made, mode, given, sequence, stop):
    """Interrupted after any iteration, and once more two iterations later: together the runs do
    what the uninterrupted one does, evaluations included.
    """
    plan = dict(wm_training_mode=mode, iterations=12, save_freq=0, **given)
    whole = made(**plan, eval_freq=5)
    await train(whole.parts, GO)

    events, held = [], 0
    for limit in (stop, stop + 2, 12):
        run = made(**plan, eval_freq=5)
        run.held = held  # of a buffer that was saved
        if events:
            await saving.load(run.parts, "latest")
            run.take()
        await train(run.parts, _until(run, limit) if limit < 12 else GO)
        assert run.parts.progress.iteration == min(limit, len(sequence.split()))
        events += run.take()
        held = run.held
    # Where the schedule was finished before an interruption, each start evaluates once more.
    expected = whole.take()
    assert _once(events) == _once(expected)
    assert run.parts.progress == whole.parts.progress


def _until(run, iteration: int):
    """Asks to stop once so many iterations are finished."""

    class Stop:
        @property
        def requested(self) -> bool:
            return run.parts.progress.iteration >= iteration

    return Stop()


def _once(events: list[str]) -> list[str]:
    """Evaluations of an iteration count once."""
    seen: set[str] = set()
    kept = []
    for event in events:
        if event not in seen or not event.startswith("evaluate"):
            kept.append(event)
        seen.add(event)
    return kept


async def test_a_lost_buffer_is_refilled_before_the_llm_learns_from_it(made, told):
    """A run resumed in a turn that collects nothing plays until the LLM has what it draws from: six
    transitions here, or as many as were ever played.
    """
    plan = dict(wm_training_mode="alternating", alternating_llm_collect="nothing", **QUIET)
    plan |= dict(alternating_wm_updates=6, alternating_llm_phases=4)
    run = made(**plan, iterations=3)
    await train(run.parts, GO)
    assert drawn(run.take()) == "cuucuucuu"

    resumed = made(**plan, iterations=7)
    await saving.load(resumed.parts, "latest")
    resumed.take()
    await train(resumed.parts, GO)
    assert drawn(resumed.take()) == "clcl" + "ll"
    assert told.text.count("this iteration refills it by playing") == 2
    assert resumed.parts.progress.turns == 2

    # A full buffer that forgets is not a lost one: it never holds all that was played.
    small = made(**plan, iterations=5)
    small.parts.settings.policy.replay_buffer_size = 8
    small.parts.settings.llm.sft.recent_transitions = 50
    small.parts.buffer.get_num_of_transitions = lambda: 6
    await train(small.parts, GO)
    assert drawn(small.take()) == "cuucuucuu" + "ll"


async def test_the_llms_turn_without_collection_evaluates_logs_and_saves(made, tmp_path, told):
    run = made(
        wm_training_mode="alternating",
        alternating_wm_updates=2,
        alternating_llm_phases=4,
        alternating_llm_collect="nothing",
        iterations=5,
        eval_freq=2,
        save_freq=3,
        sample_prompt_freq=1,
    )
    run.returns = [0.0, 1.0, 3.0, 2.0]
    await train(run.parts, GO)
    assert drawn(run.take()) == "EE" + "cuu" + "l" + "EE" + "ll" + "EE" + "l" + "EE"

    # Evaluations and checkpoints by the iterations, all at the same environment step.
    evaluations = run.parts.history.evaluations
    assert [(e["iteration"], e["env_steps"]) for e in evaluations] == [
        (0, 0),
        (2, 5),
        (4, 5),
        (5, 5),
    ]
    pointers = {p: (tmp_path / "ckpt" / p).read_text() for p in ("latest", "best")}
    assert pointers == {"latest": "iter_00000005", "best": "iter_00000004"}
    assert told.text.count("✓ Saved") == 4  # best at 2, by the clock at 3, best at 4, the end
    assert run.parts.history.losses == {"wm_loss": [1.5], "sft_loss": [0.25] * 4}
    assert told.messages.count("✓ LLM training done - llm_sft_loss: 0.2500") == 4

    run.parts.metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").open()]
    perf = [row for row in rows if row["namespace"] == "perf"]
    assert [row["step"] for row in perf] == [5] * 5
    assert perf[0]["env_steps_per_second"] > 0
    assert [row["env_steps_per_second"] for row in perf[1:]] == [0.0] * 4
    assert len([row for row in rows if row["namespace"] == "llm"]) == 4


async def test_which_turn_it_is_is_told(made, tmp_path, told):
    run = made(wm_training_mode="sequential", iterations=9, **QUIET)
    await train(run.parts, GO)
    run.parts.metrics.close()
    assert turns_in(tmp_path) == [(0, 0, 2), (0, 0, 4), (0, 0, 5), (1, 1, 1), (1, 1, 2)]
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`perf/(turn\w*)`", page)) == {"turn", "turn_llm", "turn_updates"}
    assert [m for m in told.messages if "Turn" in m] == [
        "[Iter 0] Turn 0: the world model, 5 updates",
        "[Iter 3] Turn 1: the LLM, 2 phases",
    ]
    assert "sequential is finished after 5 iterations" in told.messages


async def test_a_phase_without_anything_to_learn_counts(made, told):
    run = made(wm_training_mode="alternating", alternating_wm_updates=2, iterations=6, **QUIET)
    run.learns = False
    await train(run.parts, GO)
    assert drawn(run.take()) == "cuu" + "clcl" + "cuu" + "clcl"
    assert told.text.count("The LLM found no decision to learn from") == 4
    assert run.parts.progress.llm_version == 0


async def test_the_world_models_turn_waits_for_the_first_env_steps(made):
    run = made(wm_training_mode="alternating", iterations=4, **QUIET)
    run.parts.settings.policy.train_start_after_envsteps = 6
    await train(run.parts, GO)
    assert drawn(run.take()) == "c" + "cuu" + "cuu" + "cl"


async def test_a_turn_that_was_shortened_meanwhile_ends(made):
    plan = dict(wm_training_mode="alternating", **QUIET)
    run = made(**plan, alternating_wm_updates=100, iterations=3)
    await train(run.parts, GO)
    resumed = made(**plan, alternating_wm_updates=4, iterations=6)
    await saving.load(resumed.parts, "latest")
    resumed.take()
    await train(resumed.parts, GO)
    assert drawn(resumed.take()) == "c" + "cl" + "cl"


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        (dict(wm_training_mode="sequential", iterations=3), "LLM"),
        (dict(wm_training_mode="sequential", iterations=4), None),
        (
            dict(wm_training_mode="alternating", alternating_first="llm", iterations=1),
            "world model",
        ),
    ],
)
async def test_iterations_that_are_over_before_the_second_turn(made, told, given, missing):
    run = made(**QUIET, **given)
    await train(run.parts, GO)
    warnings = [record.getMessage() for record in told.records if record.levelname == "WARNING"]
    assert len(warnings) == (missing is not None)
    if missing is not None:
        assert f"are over before the {missing} had a turn" in warnings[0]


def of_the_manual(word: str) -> str:
    """The Python example of the manual that contains this word."""
    manual = ROOT / "PRIORZERO_ORZ_EXECUTABLE.md"
    blocks = re.findall(r"```python\n(.*?)```", manual.read_text(encoding="utf-8"), re.S)
    (block,) = [block for block in blocks if word in block]
    return block


async def test_the_manuals_subclass(made):
    names = {"__name__": "read"}
    exec(of_the_manual("LateStart"), names)
    run = made()
    run.parts.config = names["LateStart"](alone=2, iterations=4, **QUIET)
    await train(run.parts, GO)
    assert drawn(run.take()) == "nuu" + "nuu" + "cuul" + "cuul"
    assert run.parts.config.as_dict()["schedule"]["alone"] == 2


async def test_the_manuals_file(made, tmp_path, told):
    (tmp_path / "until_won.py").write_text(of_the_manual("until_won"))
    schedules.__path__.append(str(tmp_path))
    try:
        run = made(wm_training_mode="until_won", iterations=9, eval_freq=1)
        run.returns = [10.0, 4.0, 10.0]  # the untrained network's does not count
        await train(run.parts, GO)
    finally:
        schedules.__path__.remove(str(tmp_path))
    # Parallel, and once more evaluated at the end.
    assert drawn(run.take()) == "EEcuu" + "EEcuul" + "EEcuu" + "EE"
    assert "until_won is finished after 3 iterations" in told.messages


async def test_a_configuration_may_have_its_own_schedule(made):
    """By subclass: its method comes before the file that `wm_training_mode` names."""
    run = made(iterations=9, **QUIET)
    run.config.iterate = lambda parts: parts.llm.phase.run(parts.buffer.sample_llm)
    run.config.finished = lambda parts: parts.progress.iteration == 3
    await train(run.parts, GO)
    assert drawn(run.take()) == "lll"
