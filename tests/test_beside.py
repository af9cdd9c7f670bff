"""Real runs of tiny sizes whose training or evaluation goes on beside the loop: the same numbers
where they must be the same, and what is left when something dies.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.types import PriorZeroError
from tests.conftest import text_vector
from tests.test_entry import TINY, Job, experiment, metrics, read_json, run

# What time it took differs from run to run; what was computed does not.
TIMES = ("train_time", "seconds")


@pytest.fixture
def plain_encoder(monkeypatch):
    """Vectors that depend on the text alone. The real encoder's last bits depend on which texts are
    encoded together, and so on what happens first.
    """
    from priorzero.text.encoder import SentenceEncoder

    def compute(self, texts):
        return {text: text_vector(text, self.dim) for text in texts}

    monkeypatch.setattr(SentenceEncoder, "_compute", compute)


def tiny_config(llm: str | None = None, config: type | None = None, **schedule):
    from priorzero.settings.record import merge
    from priorzero_config import HybridTrainingConfig

    own: dict = dict(eval=dict(modes=["world_model"]))
    if llm is not None:
        learns = dict(lora=dict(last_layers=1), sft=dict(samples=4))
        own = dict(
            llm=dict(model=llm, engine="transformers", **learns),
            eval=dict(modes=["world_model", "world_model_llm"]),
        )
    return (config or HybridTrainingConfig)(
        env_id="tw-simple",
        exp_name="tiny",
        enable_llm=llm is not None,
        debug_mode=True,
        overrides=merge(TINY, own),
        **dict(iterations=4, eval_freq=1, save_freq=0, llm_train_freq=1) | schedule,
    )


async def trained(cwd: Path, monkeypatch, llm: str | None = None, **schedule) -> Path:
    """A run in this process; returns its folder."""
    from priorzero_orz_entry import train_priorzero_orz

    cwd.mkdir()
    monkeypatch.chdir(cwd)
    await train_priorzero_orz(tiny_config(llm, **schedule))
    return experiment(cwd)


def computed(folder: Path, *namespaces: str) -> list[dict]:
    return [
        {name: value for name, value in row.items() if not name.endswith(TIMES)}
        for row in metrics(folder)
        if row["namespace"] in namespaces
    ]


def evaluations(folder: Path) -> list[dict]:
    return read_json(folder / "summary.json")["evaluations"]


async def test_an_evaluation_beside_changes_nothing_and_finds_the_same(
    tmp_path, monkeypatch, plain_encoder, one_thread
):
    """Losses, games and evaluations are those of a run that stops for its evaluations."""
    folders = [
        await trained(tmp_path / name, monkeypatch, async_eval=async_eval)
        for name, async_eval in (("in_turn", False), ("beside", True))
    ]
    in_turn, beside = (computed(folder, "collect", "prior", "wm") for folder in folders)
    assert len([row for row in in_turn if row["namespace"] == "wm"]) == 4
    assert beside == in_turn
    told = [evaluations(folder) for folder in folders]
    assert told[0] == told[1] and [e["iteration"] for e in told[0]] == [0, 1, 2, 3, 4]
    assert sorted(computed(folders[0], "eval"), key=str) == sorted(
        computed(folders[1], "eval"), key=str
    )
    behind = [row.get("background_eval_behind") for row in computed(folders[1], "perf")]
    assert None not in behind and "background_degree" not in metrics(folders[1])[-2]


@pytest.mark.slow
async def test_with_an_llm_too(tmp_path, monkeypatch, plain_encoder, one_thread, tiny_llm):
    """The engine answers each evaluation with the weights of its snapshot."""
    folders = [
        await trained(
            tmp_path / name, monkeypatch, tiny_llm, async_eval=async_eval, llm_train_freq=2
        )
        for name, async_eval in (("in_turn", False), ("beside", True))
    ]
    rows = [computed(folder, "collect", "wm", "llm") for folder in folders]
    assert [row["namespace"] for row in rows[0]] == [row["namespace"] for row in rows[1]]
    assert sum(row["namespace"] == "llm" for row in rows[0]) == 2
    # Which states are scored together may move an LLM's score by its last bits.
    for one, other in zip(*rows, strict=True):
        for name in one.keys() - {"namespace"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name
    assert evaluations(folders[0]) == evaluations(folders[1])


async def test_degree_0_is_collecting_and_training_in_turn(
    tmp_path, monkeypatch, plain_encoder, one_thread
):
    """Number for number the schedule as it was before anything could run beside it."""
    from priorzero_config import HybridTrainingConfig

    class InTurn(HybridTrainingConfig):
        async def iterate(self, parts):
            from priorzero.loop import reporting, stages

            started = time.perf_counter()
            collected = await stages.collect(parts)
            wm = {}
            if parts.progress.iteration % 2 == 0:
                updates = stages.updates_due(parts, collected.transitions * 2)
                wm = await stages.train_world_model(parts, updates)
            reporting.log_iteration(parts, collected, wm, {}, time.perf_counter() - started)

    plain = await trained(tmp_path / "plain", monkeypatch, config=InTurn)
    zero = await trained(tmp_path / "zero", monkeypatch, wm_train_freq=2)
    names = ("collect", "prior", "wm", "eval")
    assert computed(plain, *names) == computed(zero, *names)
    assert len(computed(zero, "wm")) == 2


@pytest.mark.slow
async def test_a_run_in_the_background_trains_as_much(tmp_path, monkeypatch, one_thread, tiny_llm):
    """With an LLM that learns, and evaluations beside it all; the first collection is that of a run
    in turn, number for number.
    """
    settings = dict(iterations=5, eval_freq=2, save_freq=2)
    in_turn = await trained(tmp_path / "in_turn", monkeypatch, tiny_llm, **settings)
    beside = await trained(
        tmp_path / "beside",
        monkeypatch,
        tiny_llm,
        off_policy_degree=2,
        async_eval=True,
        **settings,
    )
    first = [computed(folder, "collect")[0] for folder in (in_turn, beside)]
    assert first[0]["transitions"] == first[1]["transitions"]
    assert first[0]["root_value"] == pytest.approx(first[1]["root_value"], abs=1e-4)

    for namespace in ("collect", "llm"):
        assert len(computed(beside, namespace)) == 5, namespace
    wm, perf = computed(beside, "wm"), computed(beside, "perf")
    assert len(wm) == 5 and all(np.isfinite(row["wm_loss"]) for row in wm)
    assert all(0 <= row["background_wm_behind"] <= 3 for row in perf)
    assert [e["iteration"] for e in evaluations(beside)] == [0, 2, 4, 5]
    # Versions 1 to 5 were published, each checked against the trainer.
    assert [row["push_version"] for row in computed(beside, "llm")] == [1, 2, 3, 4, 5]

    import torch

    state = torch.load(
        beside / "ckpt" / (beside / "ckpt" / "latest").read_text() / "state.pt", weights_only=True
    )
    assert state["progress"]["updates"] == sum(row["updates"] for row in wm)
    assert state["progress"]["llm_version"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "error", "saved"),
    [
        ("collect", "the LLM engine failed and llm.required is set", 2),
        # The phase belongs to the iteration before, whose checkpoint waits for it.
        ("publish", "the LLM engine did not take over the trained weights", 1),
        ("evaluate", "the LLM engine failed and llm.required is set", 2),
    ],
    ids=["collect", "publish", "evaluate"],
)
async def test_a_dead_engine_ends_the_run_and_the_last_checkpoint_stands(
    tmp_path, monkeypatch, one_thread, tiny_llm, stage, error, saved
):
    """The engine is closed in iteration 2: before it is asked by play, before it gets new weights
    from a phase beside collection, before an evaluation beside both asks it.
    """
    from priorzero.loop.train import train
    from priorzero_orz_entry import build

    monkeypatch.chdir(tmp_path)
    config = tiny_config(
        tiny_llm, iterations=9, eval_freq=1, save_freq=1, off_policy_degree=1, async_eval=True
    )
    config.priorzero_cfg.llm.required = True
    async with asyncio.timeout(200), await build(config) as parts:

        def dying(owner, name):
            real = getattr(owner, name)

            async def call(*arguments):
                if parts.progress.iteration >= 2:
                    await parts.llm.engine.close()
                return await real(*arguments)

            monkeypatch.setattr(owner, name, call)

        if stage == "collect":
            dying(parts.collector, "collect")
        if stage == "publish":
            dying(parts.llm.phase, "publish")
        if stage == "evaluate":
            real = parts.evaluator.playing

            def playing(policy):
                player = real(policy)
                dying(player, "evaluate")
                return player

            monkeypatch.setattr(parts.evaluator, "playing", playing)

        with pytest.raises(PriorZeroError, match=error):
            await train(parts, SimpleNamespace(requested=False))

        state, llm, _ = parts.checkpoints.load("latest")
        assert state["progress"]["iteration"] == saved and llm is not None
        assert state["progress"]["llm_version"] == saved
        assert [t for t in asyncio.all_tasks() if t is not asyncio.current_task()] == []


@pytest.mark.slow
def test_sigterm_beside_everything_saves_and_resume_goes_on(tmp_path):
    beside = ["--off-policy-degree=2", "--async-eval", "--eval-freq=3"]
    with Job(tmp_path, "--iterations=1000", *beside) as job:
        job.wait_for("[Iter 4] Collecting data...")
        job.signal()
        stopped = job.finish()
    assert stopped.status == 0, stopped.output
    assert "Traceback" not in stopped.output and "never retrieved" not in stopped.output
    done = read_json(experiment(tmp_path) / "summary.json")["iterations"]
    assert f"Stopped by a signal after iteration {done}; continue with --resume" in stopped.lines
    assert (experiment(tmp_path) / "ckpt" / "latest").read_text() == f"iter_{done:08d}"
    trained = [r for r in metrics(experiment(tmp_path)) if r["namespace"] == "wm"]
    assert len(trained) == done, "a phase that was handed over is not in the checkpoint"

    resumed = run(tmp_path, f"--iterations={done + 2}", *beside, "--resume")
    assert resumed.status == 0, resumed.output
    after = read_json(experiment(tmp_path) / "summary.json")
    assert after["iterations"] == done + 2
    places = [e["iteration"] for e in after["evaluations"]]
    assert places == [*(n for n in range(0, done + 2, 3)), done + 2]
