"""Recording: what a line says against what was played, what it costs the run when the disk fails,
and what a reader makes of files that a kill has cut.
"""

from __future__ import annotations

import gzip
import json
import resource
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from priorzero.decisions.reader import find_episode, read_episodes
from priorzero.decisions.record import Moment
from priorzero.decisions.recorder import Recorder
from priorzero.games.group import GameEnvGroup
from priorzero.settings.decisions import DecisionSettings
from priorzero.settings.policy import RootPriorSettings
from priorzero.types import PriorZeroError, TextState
from priorzero_collector import PriorZeroCollector
from priorzero_evaluator import PriorZeroEvaluator
from tests.playing import FakePrior, ScriptedEnv, logprobs, make_watched, told_actions

SIZES = dict(
    num_simulations=8,
    action_vocabulary=dict(capacity=64, overflow=4),
    game_segment_length=4,
)


def decode(ids) -> str:
    return "prompt " + " ".join(map(str, ids))


@pytest.fixture
def play(compiled_cfg, encoder, one_thread, tmp_path):
    """Players on scripted environments, and their recorder; `record=None` for none."""
    opened = []

    def make(record: dict | None = None, **policy):
        cfg = compiled_cfg(**SIZES)
        watched = make_watched(cfg, encoder, **policy)
        envs = [ScriptedEnv(0, length=3), ScriptedEnv(1, length=5, end="truncated")]
        group = GameEnvGroup(envs, seed=0)
        prior = FakePrior()
        recorder = None
        if record is not None:
            recorder = Recorder(
                tmp_path / "decisions",
                DecisionSettings(**record),
                reduction=cfg.policy.settings.root_prior.reduction,
                decode=decode,
            )
        common = (cfg.policy.settings, watched, group, encoder, prior)
        evaluator = PriorZeroEvaluator(
            *common,
            history_length=2,
            seed=0,
            temperature=0.0,
            transcripts=None,
            recorder=recorder,
        )
        collector = PriorZeroCollector(*common, history_length=2, seed=0, recorder=recorder)
        opened.append(group)
        return SimpleNamespace(
            evaluator=evaluator,
            collector=collector,
            envs=envs,
            recorder=recorder,
            prior=prior,
            policy=watched,
        )

    yield make
    for group in opened:
        group.close()


def searched(made) -> list:
    """Every plan of the player, in the order of the decisions: by call, then by environment."""
    return [plan for _, outputs in made.policy.calls for plan in outputs]


async def test_an_evaluation_is_told_as_it_was_played(play, tmp_path):
    made = play({}, root_prior=RootPriorSettings(temperature=2.0))
    await made.evaluator.evaluate("world_model_llm", 2, 40, "iter000007")
    made.recorder.close()

    episodes = read_episodes(tmp_path)
    assert [e.name for e in episodes] == [f"iter000007/world_model_llm/{n}" for n in (0, 1)]
    # Both environments are stepped together until the shorter episode is over.
    plans = searched(made)
    own = {0: plans[0:6:2], 1: [*plans[1:6:2], *plans[6:]]}

    for number, episode in enumerate(episodes):
        env = made.envs[number]
        assert [s["commands"][s["chosen"]] for s in episode.steps] == env.played[0]
        for t, (step, plan) in enumerate(zip(episode.steps, own[number], strict=True)):
            text = f"env {number} episode 1 step {t}"
            commands = told_actions(number, t)
            assert (step["text"], tuple(step["commands"])) == (text, commands)
            assert (step["step"], step["env_steps"], step["seed"]) == (t, 40, 1)
            assert step["score"] == sum(range(t + 1))
            assert (step["reward"], step["score_after"]) == (t + 1, sum(range(t + 2)))

            sums = np.array([sum(logprobs(text, a)) for a in commands])
            np.testing.assert_allclose(step["llm_logprobs"], sums, atol=1e-5)
            shares = np.exp(sums / 2)  # at the root's temperature
            np.testing.assert_allclose(step["llm"], shares / shares.sum(), atol=1e-5)
            assert (step["llm_version"], step["llm_temperature"]) == (FakePrior.VERSION, 2.0)
            asked = made.prior.told.index((text, commands))
            assert step["prompt"] == f"prompt 1 {asked}"

            assert step["visits"] == plan.visit_counts.tolist() and sum(step["visits"]) == 8
            np.testing.assert_allclose(step["improved"], plan.target_policy, atol=1e-5)
            np.testing.assert_allclose(step["mixture"], np.exp(plan.prior.log_mixed), atol=1e-5)
            np.testing.assert_allclose(step["world_model"], np.exp(plan.prior.log_wm), atol=1e-5)
            assert step["value"] == pytest.approx(plan.root_value, abs=1e-5)

            tree = step["tree"]
            assert len(tree["n"]) == 9 and tree["command"][0] is None
            # Below the root it is the same search: its children are the root's commands.
            visits = dict.fromkeys(commands, 0)
            for parent, command, n in zip(tree["parent"], tree["command"], tree["n"], strict=True):
                if parent == 0:
                    visits[command] = n
            assert list(visits.values()) == step["visits"]

        last = episode.steps[-1]
        assert [s["end"] for s in episode.steps[:-1]] == ["running"] * (len(episode.steps) - 1)
        assert last["end"] == env.end and last["return"] == sum(s["reward"] for s in episode.steps)
        assert last["last_text"] == f"env {number} episode 1 step {env.length}"


async def test_targets_with_another_prior_stand_beside_the_searchs_policy(play, tmp_path):
    own = dict(target_prior="world_model", root_prior=RootPriorSettings())
    made = play({}, **own)
    await made.evaluator.evaluate("world_model_llm", 2, 0, "iter000000")
    made.recorder.close()
    plans = {p.world_model_target.round(5).tobytes() for p in searched(made)}
    steps = [s for e in read_episodes(tmp_path) for s in e.steps]
    assert {np.array(s["target_world_model"]).tobytes() for s in steps} == plans
    assert any(s["target_world_model"] != s["improved"] for s in steps)
    assert not any("target_llm" in s for s in steps)  # evaluations teach nobody


@pytest.mark.parametrize("mode", ["llm", "random", "world_model"])
async def test_modes_tell_what_they_know(play, tmp_path, mode):
    made = play({})
    await made.evaluator.evaluate(mode, 2, 0, "iter000000")
    made.recorder.close()
    steps = [s for e in read_episodes(tmp_path) for s in e.steps]
    assert len(steps) == 8
    for step in steps:
        assert ("llm" in step and "prompt" in step) == (mode == "llm")
        assert ("visits" in step and "tree" in step) == (mode == "world_model")
        if mode == "llm":
            assert step["chosen"] == int(np.argmax(step["llm"]))
            assert sum(step["llm"]) == pytest.approx(1, abs=1e-4)


async def test_recording_changes_nothing(play, tmp_path):
    plain, recorded = play(None), play(dict(collect_share=1.0))
    for made in (plain, recorded):
        await made.evaluator.evaluate("world_model_llm", 2, 0, "a")
        await made.collector.collect(6, 0, 1.0)
    assert [e.played for e in plain.envs] == [e.played for e in recorded.envs]
    for one, other in zip(searched(plain), searched(recorded), strict=True):
        np.testing.assert_array_equal(one.visit_counts, other.visit_counts)
        assert one.root_value == other.root_value and one.tree is None and other.tree is not None
    recorded.recorder.close()


async def test_a_share_of_the_training_episodes_is_recorded(play, tmp_path):
    made = play(dict(collect_share=0.5, trees=False, prompts=False))
    result = await made.collector.collect(12, 100, 1.0)
    made.recorder.close()
    begun = sum(len(env.played) for env in made.envs)
    episodes = read_episodes(tmp_path)
    numbers = [int(e.name.removeprefix("collect/")) for e in episodes]
    played = [n for n in range(begun) if n % 2]
    assert numbers == played[: len(numbers)] and len(played) - len(numbers) <= 1

    steps = [s for e in episodes for s in e.steps]
    assert all("tree" not in s and "prompt" not in s and "llm" in s for s in steps)
    assert all(100 <= s["env_steps"] < 100 + result.steps for s in steps)
    for segment in result.segments:
        if segment.episode_id in numbers:
            recorded = episodes[numbers.index(segment.episode_id)].steps
            for record in segment.steps:
                told = recorded[record.timestep]
                assert told["commands"][told["chosen"]] == record.action
                np.testing.assert_allclose(told["behaviour"], record.behaviour, atol=1e-5)


async def test_a_hang_is_recorded_too(play, tmp_path):
    made = play({})
    made.envs[1].end = "hang"
    await made.evaluator.evaluate("random", 2, 0, "x")
    made.recorder.close()
    steps = read_episodes(tmp_path)[1].steps
    assert len(steps) == 5 and steps[-1]["end"] == "hang" and steps[-1]["reward"] == 0


# ---- files ---------------------------------------------------------------------------------------


@pytest.fixture
def recorder(tmp_path):
    """Makes recorders of one run's folder, without a game."""
    made = []

    def make(**settings) -> Recorder:
        one = Recorder(
            tmp_path / "decisions",
            DecisionSettings(collect_share=1.0, **settings),
            reduction="sum",
        )
        made.append(one)
        return one

    yield make
    for one in made:
        one.close()  # a second time, as a rule


def write(recorder: Recorder, steps, *, episode: int = 0, text: str = "", bad: bool = False):
    tape = recorder.collection(episode, game="g", seed=1000)
    for step in steps:
        info = {} if bad else {"done_kind": "running", "score": 0.0}
        outcome = SimpleNamespace(info=info, reward=0.0, done=False)
        state = TextState(text or f"text {step}", ("wait",))
        tape.write(step, Moment(state, ("wait",), "wait", outcome), env_steps=step)


def texts(run, episode: int = 0) -> list[str]:
    return [s["text"] for s in read_episodes(run)[episode].steps]


def finish(recorder: Recorder) -> dict[str, float]:
    recorder.close()
    return recorder.stats()


@contextmanager
def files_up_to(size: int):
    """The operating system takes no byte of a file beyond this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def until(holds) -> None:
    """Wait for the recorder's thread."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_disk_that_fails_costs_records_and_nothing_else(recorder, tmp_path, caplog):
    one = recorder()
    write(one, range(2))
    one.flush()
    noise = "".join(map(str, np.random.default_rng(0).integers(0, 9, 20_000)))
    until(lambda: one.stats()["decisions_written"])
    with files_up_to(1000):
        write(one, [2], text=noise)
        one.flush()
        write(one, [2], text=noise)
        one.flush()
        until(lambda: one.stats()["decisions_lost"] == 2)
    write(one, [2, 3])
    told = finish(one)

    # What was written before and after is whole, for any reader; the log says it once.
    gzip.decompress((tmp_path / "decisions" / "collect.jsonl.gz").read_bytes())
    assert texts(tmp_path) == ["text 0", "text 1", "text 2", "text 3"]
    assert (told["decisions_written"], told["decisions_lost"]) == (4, 2)
    errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    assert len(errors) == 1 and "File too large" in errors[0] and "run goes on" in errors[0]


def test_a_limit_on_the_folder_is_kept(recorder, tmp_path, caplog):
    noise = np.random.default_rng(0).integers(32, 127, 3_000_000, dtype=np.uint8).tobytes().decode()
    for _ in range(2):  # a resumed run counts what is there
        one = recorder(max_mib=4)
        write(one, [0], text=noise)
        told = finish(one)
    assert told["decisions_lost"] == 1 and told["decisions_mib"] < 4
    assert "decisions.max_mib is 4" in caplog.text


def test_a_decision_that_cannot_be_told_is_counted_and_players_go_on(recorder, tmp_path, caplog):
    one = recorder()
    write(one, [0])
    write(one, range(1, 2000), bad=True)  # more than may wait
    write(one, [1])
    told = finish(one)
    assert (told["decisions_written"], told["decisions_lost"]) == (2, 1999)
    assert texts(tmp_path) == ["text 0", "text 1"]
    assert "KeyError" in caplog.text


def test_a_resumed_run_replaces_what_it_plays_again(recorder, tmp_path):
    one = recorder()
    write(one, range(6))
    write(one, range(3), episode=10)
    write(one, range(3), episode=9)
    one.close()
    again = recorder()
    write(again, [3, 4], text="again")
    again.close()

    assert [e.name for e in read_episodes(tmp_path)] == ["collect/0", "collect/9", "collect/10"]
    assert texts(tmp_path) == ["text 0", "text 1", "text 2", "again", "again"]


def test_a_part_that_a_kill_has_cut_is_left_out(recorder, tmp_path, caplog):
    first = recorder()
    write(first, range(3))
    first.close()
    path = tmp_path / "decisions" / "collect.jsonl.gz"
    whole = path.read_bytes()
    second = recorder()
    write(second, range(3, 400))
    second.close()
    path.write_bytes(path.read_bytes()[: len(whole) + 600])  # in the middle of the second part
    third = recorder()
    write(third, range(3, 6), text="after the kill")
    third.close()

    assert texts(tmp_path) == ["text 0", "text 1", "text 2", *["after the kill"] * 3]
    assert "a damaged part is left out" in caplog.text


def test_another_format_and_an_empty_folder_are_refused(recorder, tmp_path):
    with pytest.raises(PriorZeroError, match="no recorded decisions"):
        read_episodes(tmp_path)
    one = recorder()
    write(one, [0])
    one.close()
    path = tmp_path / "decisions" / "collect.jsonl.gz"
    line = json.loads(gzip.decompress(path.read_bytes()))
    path.write_bytes(gzip.compress(json.dumps(line | {"v": 2}).encode()))
    with pytest.raises(PriorZeroError, match="recorded in format 2"):
        read_episodes(tmp_path)


def test_episodes_are_found_by_number_and_by_name(recorder, tmp_path):
    one = recorder()
    for number in range(3):
        write(one, [0], episode=number)
    one.close()
    episodes = read_episodes(tmp_path)
    assert find_episode(episodes, "2").name == "collect/2"
    assert find_episode(episodes, "collect/1") is episodes[1]
    with pytest.raises(PriorZeroError, match="no recorded episode 3; there are 0 to 2"):
        find_episode(episodes, "3")


def test_what_comes_after_the_end_is_counted(recorder, tmp_path):
    one = recorder()
    write(one, [0])
    one.close()
    write(one, range(1, 3000))  # waits for nobody
    assert one.stats()["decisions_lost"] == 2999 and texts(tmp_path) == ["text 0"]
