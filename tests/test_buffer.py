"""The replay buffer against hand-worked episodes and a slow reference that sees whole episodes, not
segments.

Observation i of episode e is the vector [e, i, …], so every target tells which state it was made
from.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.packing import pack, unpack
from priorzero.data.segment import Segment, StepRecord, window
from priorzero.settings.policy import PolicySettings, VocabularySettings
from priorzero.types import ActionScores, TextState, TokenisedRequest

V, DIM = 9, 3
GAMMA = 0.9


def settings(**changes) -> PolicySettings:
    base = dict(
        replay_buffer_size=10_000,
        num_unroll_steps=3,
        td_steps=2,
        context_steps=1,
        discount_factor=GAMMA,
        game_segment_length=1,
        action_vocabulary=VocabularySettings(capacity=V, overflow=1),
    )
    return PolicySettings(**base | changes)


def empty(settings: PolicySettings) -> PriorZeroGameBuffer:
    return PriorZeroGameBuffer(settings, DIM, seed=0)


def state_vector(episode: int, index: int) -> np.ndarray:
    return np.array([episode, index, 1.0], dtype=np.float32)


@dataclass
class Episode:
    """A whole episode as it was played. end: terminated, truncated, hang or running (not finished
    yet).
    """

    number: int
    rewards: list[float]
    end: str
    cuts: list[int] = field(default_factory=list)  # lengths of its segments
    steps: list[StepRecord] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.number)
        for t, reward in enumerate(self.rewards):
            count = int(rng.integers(1, 5))
            ids = rng.permutation(V)[:count]
            actions = tuple(f"do {i}" for i in ids)
            visits = rng.integers(1, 9, size=count).astype(float)
            last = t == len(self.rewards) - 1
            self.steps.append(
                StepRecord(
                    state=TextState(f"room {t}", actions),
                    observation=state_vector(self.number, t),
                    valid_actions=actions,
                    valid_ids=ids,
                    action_index=int(rng.integers(count)),
                    visit_counts=visits,
                    behaviour=np.full(count, 1 / count),
                    target_policy=rng.dirichlet(np.ones(count)),
                    root_value=float(rng.normal()),
                    predicted_value=float(rng.normal()),
                    reward=reward,
                    done_kind=self.end if last else "running",
                    timestep=t,
                    request=TokenisedRequest((1,), (self.number, t), ((2, 3),) * count),
                    scores=ActionScores(((-1.0, -0.5),) * count, weights_version=7),
                )
            )

    def segments(self) -> list[Segment]:
        cuts, result, at = list(self.cuts) or [len(self.steps)], [], 0
        for length in cuts:
            segment = Segment(0, self.number, length, self.steps[max(at - 9, 0) : at])
            for t in range(at, at + length):
                segment.record(self.steps[t], state_vector(self.number, t + 1))
            result.append(segment)
            at += length
        assert at == len(self.steps)
        return result


def expected_row(episode: Episode, start: int, unroll: int, td: int) -> dict[str, np.ndarray]:
    """The targets of a window from `start` on, from the whole episode, one state at a time."""
    n, over = len(episode.steps), episode.end == "terminated"
    row = {
        name: []
        for name in (
            "reward",
            "returns",
            "discount",
            "bootstrap_state",
            "step",
            "value",
            "policy",
            "search",
        )
    }
    for t in range(start, start + unroll):
        policy = np.zeros(V)
        if t < n:
            span = min(td, n - t)
            row["reward"].append(episode.rewards[t])
            row["returns"].append(sum(GAMMA**i * episode.rewards[t + i] for i in range(span)))
            row["discount"].append(0.0 if t + span == n and over else GAMMA**span)
            row["bootstrap_state"].append(t + span)
            row["search"].append(episode.steps[t + span].root_value if t + span < n else np.nan)
            step = episode.steps[t]
            for action_id, p in zip(step.valid_ids, step.target_policy, strict=True):
                policy[action_id] = p
        else:
            row["reward"].append(0.0)
            row["returns"].append(0.0)
            row["discount"].append(0.0)
            row["bootstrap_state"].append(None)
            row["search"].append(np.nan)
        row["step"].append(float(t < n))
        row["value"].append(float(t < n or over))
        row["policy"].append(policy)
    return row


def check_row(batch, row: int, episode: Episode, start: int, unroll: int, td: int) -> None:
    want, n = expected_row(episode, start, unroll, td), len(episode.steps)
    where = (
        f"episode {episode.number} ({episode.end}, {n} steps, cuts {episode.cuts}), start {start}"
    )
    states = [min(start + k, n) for k in range(unroll + 1)]
    assert batch.observations[row, :, 0].tolist() == [episode.number] * (unroll + 1), where
    assert batch.observations[row, :, 1].tolist() == states, where
    np.testing.assert_allclose(batch.rewards[row], want["reward"], atol=1e-6, err_msg=where)
    np.testing.assert_allclose(batch.returns[row], want["returns"], atol=1e-5, err_msg=where)
    np.testing.assert_allclose(batch.discounts[row], want["discount"], atol=1e-6, err_msg=where)
    np.testing.assert_array_equal(batch.mask_step[row], want["step"], err_msg=where)
    np.testing.assert_array_equal(batch.mask_value[row], want["value"], err_msg=where)
    np.testing.assert_array_equal(batch.mask_reward[row], want["value"], err_msg=where)
    np.testing.assert_allclose(batch.policies[row], want["policy"], atol=1e-6, err_msg=where)
    np.testing.assert_allclose(batch.search_values[row], want["search"], atol=1e-6, err_msg=where)
    known = set(episode.steps[-1].valid_ids.tolist()) | {s.action_id for s in episode.steps}
    for k in range(unroll):
        if start + k < n:
            assert batch.actions[row, k] == episode.steps[start + k].action_id, where
        assert batch.actions[row, k] in known, where  # a filler is an id that names an action
        if want["bootstrap_state"][k] is not None:
            at = batch.bootstrap_index[row, k]
            assert batch.bootstrap_observations[row, at].tolist() == [
                episode.number,
                want["bootstrap_state"][k],
                1,
            ], where
    # The window the bootstrap values are read from is a stretch of the episode, its actions the
    # ones played there.
    first = int(batch.bootstrap_observations[row, 0, 1])
    for k, state in enumerate(want["bootstrap_state"]):
        # Beyond the episode the last state is repeated; only its first copy has the right steps
        # before it.
        assert state is None or batch.bootstrap_index[row, k] == state - first, where
    for k in range(unroll):
        assert batch.bootstrap_observations[row, k, 1] == min(first + k, n), where
        if first + k < n:
            assert batch.bootstrap_actions[row, k] == episode.steps[first + k].action_id, where
        assert batch.bootstrap_actions[row, k] in known, where


def filled(episodes: list[Episode], **changes) -> PriorZeroGameBuffer:
    cfg = settings(**changes)
    buffer = empty(cfg)
    for episode in episodes:
        buffer.push_game_segments(episode.segments())
    return buffer


def sample_at(buffer: PriorZeroGameBuffer, indices):
    """The batch of these transitions."""
    return buffer.batch_of(np.asarray(indices), np.ones(len(indices), dtype=np.float32))


# ---- by hand -------------------------------------------------------------------------------------


def test_inside_an_episode_across_a_segments_end_and_at_a_true_end():
    """Five steps, rewards 1 2 3 4 5, two segments of 3 and 2, terminated; 3 unrolled steps, 2-step
    returns.
    """
    buffer = filled([Episode(0, [1.0, 2.0, 3.0, 4.0, 5.0], "terminated", cuts=[3, 2])])
    batch = sample_at(buffer, [0, 2, 4])
    # From step 0: 1 + 0.9 * 2, then v(s2); 2 + 0.9 * 3, v(s3); 3 + 0.9 * 4, v(s4), which lie in the
    # next segment.
    assert batch.returns[0] == pytest.approx([2.8, 4.7, 6.6])
    assert batch.discounts[0] == pytest.approx([0.81, 0.81, 0.81])
    assert batch.bootstrap_observations[0, :, 1].tolist() == [2, 3, 4] and batch.bootstrap_index[
        0
    ].tolist() == [0, 1, 2]
    # From step 2: 3 + 0.9 * 4, v(s4); then the end: 4 + 0.9 * 5 and 5, nothing after.
    assert batch.returns[1] == pytest.approx([6.6, 8.5, 5.0])
    assert batch.discounts[1] == pytest.approx([0.81, 0.0, 0.0])
    # From step 4: the end, then two absorbing steps with value and reward zero.
    assert batch.returns[2] == pytest.approx([5.0, 0.0, 0.0]) and batch.discounts[2].tolist() == [
        0.0,
        0.0,
        0.0,
    ]
    assert batch.mask_step[2].tolist() == [1, 0, 0]
    assert batch.mask_value[2].tolist() == batch.mask_reward[2].tolist() == [1, 1, 1]
    assert batch.rewards[2].tolist() == [5, 0, 0]
    assert batch.observations[2, :, 1].tolist() == [4, 5, 5, 5]


@pytest.mark.parametrize("end", ["truncated", "hang", "running"])
def test_at_a_cut_the_last_state_bootstraps_and_nothing_is_absorbing(end):
    buffer = filled([Episode(0, [1.0, 2.0, 3.0], end)])
    batch = sample_at(buffer, [1])
    assert batch.returns[0] == pytest.approx([2 + 0.9 * 3, 3.0, 0.0])
    assert batch.discounts[0] == pytest.approx([0.81, 0.9, 0.0])
    at = batch.bootstrap_index[0]
    assert (
        batch.bootstrap_observations[0, at[0], 1] == batch.bootstrap_observations[0, at[1], 1] == 3
    )
    assert (
        batch.mask_step[0].tolist()
        == batch.mask_value[0].tolist()
        == batch.mask_reward[0].tolist()
        == [1, 1, 0]
    )


def test_an_unfinished_episodes_targets_grow_when_it_goes_on():
    cfg = settings()
    buffer, episode = (
        empty(cfg),
        Episode(0, [1.0, 2.0, 4.0, 8.0], "truncated", cuts=[2, 2]),
    )
    first, second = episode.segments()
    buffer.push_game_segments([first])
    before = sample_at(buffer, [1])
    assert before.returns[0, 0] == pytest.approx(2.0) and before.discounts[0, 0] == pytest.approx(
        0.9
    )
    assert before.mask_step[0].tolist() == [1, 0, 0]
    buffer.push_game_segments([second])
    after = sample_at(buffer, [1])
    assert after.returns[0, 0] == pytest.approx(2 + 0.9 * 4) and after.discounts[
        0, 0
    ] == pytest.approx(0.81)
    assert after.mask_step[0].tolist() == [1, 1, 1]


def test_policies_are_the_steps_targets_and_stand_at_the_ids():
    episode = Episode(3, [0.0, 0.0], "truncated")
    batch = sample_at(filled([episode]), [0])
    for k, step in enumerate(episode.steps):
        by_id = dict(zip(step.valid_ids.tolist(), step.target_policy.tolist(), strict=True))
        assert {i: p for i, p in enumerate(batch.policies[0, k]) if p} == pytest.approx(by_id)
    assert batch.policies[0, 2].sum() == 0


def test_segments_of_other_episodes_in_between_do_not_mix():
    cfg = settings()
    a, b = (
        Episode(0, [1.0] * 6, "terminated", cuts=[3, 3]),
        Episode(1, [10.0] * 6, "truncated", cuts=[2, 4]),
    )
    (a1, a2), (b1, b2) = a.segments(), b.segments()
    buffer = empty(cfg)
    buffer.push_game_segments([a1, b1])
    buffer.push_game_segments([b2, a2])
    order = [(a, t) for t in range(3)] + [(b, t) for t in range(6)] + [(a, t) for t in range(3, 6)]
    batch = sample_at(buffer, range(12))
    for row, (episode, start) in enumerate(order):
        check_row(batch, row, episode, start, 3, 2)
        real = batch.mask_step[row] > 0  # past the end of a terminated episode rewards are zero
        assert set(batch.rewards[row][real]) == {1.0 if episode is a else 10.0}


def test_a_window_is_exactly_as_long_as_asked():
    episode = Episode(0, [1.0] * 5, "terminated", cuts=[2, 1, 2])
    first, *others = episode.segments()
    empty(settings()).push_game_segments([first, *others])
    for start in range(2):
        for length in range(1, 8):
            view = window(first, start, length)
            assert [s.timestep for s in view.steps] == list(range(start, min(start + length, 5)))
            assert view.final_observation[1] == min(start + length, 5)
            assert view.end == ("terminated" if start + length >= 5 else "more")


# ---- random episodes against the reference -------------------------------------------------------


def random_episode(number: int, rng) -> Episode:
    length = int(rng.integers(1, 12))
    cuts, left = [], length
    while left:
        cuts.append(int(rng.integers(1, left + 1)))
        left -= cuts[-1]
    return Episode(
        number,
        rng.normal(size=length).tolist(),
        str(rng.choice(["terminated", "truncated", "hang", "running"])),
        cuts=cuts,
    )


@pytest.mark.parametrize("seed", range(8))
def test_random_episodes_equal_the_reference(seed):
    rng = np.random.default_rng(seed)
    unroll, td = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    cfg = settings(num_unroll_steps=unroll, td_steps=td, replay_buffer_size=60)
    buffer = empty(cfg)
    episodes = [random_episode(i, rng) for i in range(25)]
    queues = [[(e, s) for s in e.segments()] for e in episodes]
    place, held = (
        {},
        [],
    )  # global index -> (episode, timestep); segments in the buffer, oldest first
    pushed = 0
    while any(queues):
        queue = queues[int(rng.choice([i for i, q in enumerate(queues) if q]))]
        episode, segment = queue.pop(0)
        buffer.push_game_segments([segment])
        for step in segment.steps:
            place[pushed] = (episode, step.timestep)
            pushed += 1
        held.append(segment)
        if rng.random() < 0.3:
            dropped = buffer.remove_oldest_data_to_fit()
            count = 0
            while sum(len(s) for s in held) > 60:
                count += len(held.pop(0))
            assert dropped == count
    assert buffer.get_num_of_game_segments() == len(held)
    alive = sum(len(s) for s in held)
    assert buffer.get_num_of_transitions() == alive
    batch = sample_at(buffer, range(pushed - alive, pushed))
    for row in range(alive):
        episode, start = place[pushed - alive + row]
        check_row(batch, row, episode, start, unroll, td)
    drawn = buffer.sample(50)
    assert drawn.indices.min() >= pushed - alive and drawn.indices.max() < pushed
    for row, index in enumerate(drawn.indices):
        check_row(drawn, row, *place[int(index)], unroll, td)


# ---- burn-in -------------------------------------------------------------------------------------


def test_burn_in_by_hand():
    """Five steps in segments of 3 and 2; T = 3, n = 2, two steps of context: five states a row."""
    episode = Episode(0, [1.0, 2.0, 3.0, 4.0, 5.0], "terminated", cuts=[3, 2])
    buffer = filled([episode], context_steps=3, burn_in=2)
    batch, taken = sample_at(buffer, [0, 1, 3]), [s.action_id for s in episode.steps]

    # The oldest state stands first; the window begins behind the context there is.
    assert batch.starts.tolist() == [0, 1, 2] and batch.burn_in == 2
    assert batch.observations[:, :, 1].tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 1, 2, 3, 4, 5],
        [1, 2, 3, 4, 5, 5],
    ]
    assert batch.actions[0].tolist() == batch.actions[1].tolist() == taken
    assert batch.actions[2, :4].tolist() == taken[1:]
    # Only the window has targets.
    assert batch.rewards.tolist() == [[1, 2, 3], [2, 3, 4], [4, 5, 0]]
    assert batch.returns[1] == pytest.approx([2 + 0.9 * 3, 3 + 0.9 * 4, 4 + 0.9 * 5])

    # The state after each step's two rewards: in the row's own sequence (from 5 on) while it lasts.
    assert batch.bootstrap_index[0].tolist() == [5 + 2, 5 + 3, 5 + 4]
    assert batch.bootstrap_index[1].tolist() == [5 + 3, 5 + 4, 4]
    # s5 does not fit there; its bootstrap sequence begins two steps before the first of them, s3.
    assert batch.bootstrap_observations[1, :, 1].tolist() == [1, 2, 3, 4, 5]
    assert batch.bootstrap_actions[1, :4].tolist() == taken[1:]


@pytest.mark.parametrize("seed", range(8))
def test_random_burn_in_equals_the_reference(seed):
    """Context and bootstrap states from whole episodes; targets are those of cold windows."""
    rng = np.random.default_rng(seed)
    unroll, td, burn_in = (int(rng.integers(*span)) for span in ((2, 7), (1, 4), (1, 5)))
    sizes = dict(num_unroll_steps=unroll, td_steps=td, context_steps=burn_in + 1, burn_in=burn_in)
    buffer, place, pushed = empty(settings(replay_buffer_size=50, **sizes)), {}, 0
    for number in range(25):
        episode = random_episode(number, rng)
        for segment in episode.segments():
            buffer.push_game_segments([segment])
            place |= {pushed + i: (episode, s.timestep) for i, s in enumerate(segment.steps)}
            pushed += len(segment)
        buffer.remove_oldest_data_to_fit()  # what was dropped still is context of what was not
    indices = range(pushed - buffer.get_num_of_transitions(), pushed)
    batch, length, seen_own, seen_other = sample_at(buffer, indices), burn_in + unroll, 0, 0

    for row, index in enumerate(indices):
        episode, start = place[index]
        n, first = len(episode.steps), max(0, start - burn_in)
        assert batch.starts[row] == start - first
        window_end = min(n, start + unroll)
        states = [min(s, n) for s in range(first, window_end + 1)]
        own = batch.observations[row, :, :2].tolist()
        assert own[: len(states)] == [[episode.number, s] for s in states]
        for s in range(first, min(n, start + unroll)):
            assert batch.actions[row, s - first] == episode.steps[s].action_id

        want = expected_row(episode, start, unroll, td)
        np.testing.assert_allclose(batch.rewards[row], want["reward"], atol=1e-5)
        np.testing.assert_allclose(batch.returns[row], want["returns"], atol=1e-5)
        np.testing.assert_allclose(batch.discounts[row], want["discount"], atol=1e-5)
        np.testing.assert_allclose(batch.policies[row], want["policy"], atol=1e-5)
        np.testing.assert_array_equal(batch.mask_step[row], want["step"])
        np.testing.assert_array_equal(batch.mask_value[row], want["value"])

        # A bootstrap state is seen with the row's own history if that fits, else with burn-in steps
        # before the first bootstrap state; and all before it is the episode as it was played.
        base = min(start + td, n)
        for k, state in enumerate(want["bootstrap_state"]):
            if state is None:
                continue
            at = int(batch.bootstrap_index[row, k])
            fits = state < first + length
            assert (at >= length) == fits
            seen_own, seen_other = seen_own + fits, seen_other + (not fits)
            begin = first if fits else max(0, base - burn_in)
            side = batch.observations if fits else batch.bootstrap_observations
            taken = batch.actions if fits else batch.bootstrap_actions
            at %= length
            assert at == state - begin
            history = [[episode.number, s] for s in range(begin, state + 1)]
            assert side[row, : at + 1, :2].tolist() == history
            ids = [episode.steps[s].action_id for s in range(begin, state)]
            assert taken[row, :at].tolist() == ids
    assert seen_own > 20 and seen_other > 5


def test_burn_in_changes_no_target_and_no_draw():
    episodes = [random_episode(i, np.random.default_rng(i)) for i in range(9)]
    cold = filled(episodes, context_steps=3).sample(40)
    warm = filled(episodes, context_steps=3, burn_in=2).sample(40)
    for name in ("indices", "rewards", "policies", "returns", "discounts", "mask_step", "weights"):
        np.testing.assert_array_equal(getattr(cold, name), getattr(warm, name))
    window = np.stack([o[s : s + 4] for o, s in zip(warm.observations, warm.starts, strict=True)])
    np.testing.assert_array_equal(window, cold.observations)


def test_what_is_dropped_is_forgotten_but_for_its_last_steps():
    episode = Episode(0, [1.0] * 30, "truncated", cuts=[10, 10, 10])
    first, second, third = episode.segments()
    gone, kept = weakref.ref(first.steps[0]), weakref.ref(second)
    buffer = empty(settings(context_steps=4, burn_in=3, replay_buffer_size=10))
    buffer.push_game_segments([first, second, third])
    episode.steps.clear()
    del first, second
    buffer.remove_oldest_data_to_fit()
    assert gone() is None and kept() is None
    assert sample_at(buffer, [20]).observations[0, :4, 1].tolist() == [17, 18, 19, 20]


# ---- removal -------------------------------------------------------------------------------------


def test_removal_keeps_at_most_the_size_and_never_the_last_segment():
    buffer = filled([Episode(i, [1.0] * 4, "terminated") for i in range(5)], replay_buffer_size=9)
    assert buffer.remove_oldest_data_to_fit() == 12
    assert (buffer.get_num_of_game_segments(), buffer.get_num_of_transitions()) == (2, 8)
    assert buffer.remove_oldest_data_to_fit() == 0
    assert set(buffer.sample(200).observations[:, 0, 0]) == {3, 4}
    small = filled([Episode(0, [1.0] * 4, "terminated")], replay_buffer_size=1)
    assert small.remove_oldest_data_to_fit() == 0 and small.get_num_of_transitions() == 4


def test_an_episode_goes_on_although_its_beginning_was_dropped():
    cfg = settings(replay_buffer_size=5)
    buffer, episode = (
        empty(cfg),
        Episode(0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], "terminated", cuts=[3, 2, 2]),
    )
    first, second, third = episode.segments()
    buffer.push_game_segments([first])
    buffer.push_game_segments([second, Episode(1, [0.0], "truncated").segments()[0]])
    buffer.remove_oldest_data_to_fit()
    buffer.push_game_segments([third])
    batch = sample_at(buffer, [3, 4])
    check_row(batch, 0, episode, 3, 3, 2)
    check_row(batch, 1, episode, 4, 3, 2)
    assert batch.returns[1, 0] == pytest.approx(5 + 0.9 * 6)


def test_an_episode_whose_only_segment_was_dropped_starts_anew():
    cfg = settings(replay_buffer_size=3)
    buffer, episode = (
        empty(cfg),
        Episode(0, [1.0, 2.0, 3.0, 4.0], "terminated", cuts=[2, 2]),
    )
    first, second = episode.segments()
    buffer.push_game_segments([first, *Episode(1, [0.0] * 3, "truncated").segments()])
    assert buffer.remove_oldest_data_to_fit() == 2
    buffer.push_game_segments([second])
    assert first.successor is None
    check_row(sample_at(buffer, [5]), 0, episode, 2, 3, 2)


def test_priorities_stay_with_their_transitions_through_removal_and_compaction():
    cfg = settings(use_priority=True, replay_buffer_size=400, priority_prob_alpha=1.0)
    buffer, rng, truth, pushed = empty(cfg), np.random.default_rng(0), {}, 0
    largest = 1.0
    for number in range(
        300
    ):  # 3,000 transitions through an array of 1,024: it is moved several times
        buffer.push_game_segments(Episode(number, [0.0] * 10, "truncated").segments())
        truth |= {pushed + i: largest for i in range(10)}
        pushed += 10
        buffer.remove_oldest_data_to_fit()
        if number % 7 == 0:
            batch = buffer.sample(16)
            given = rng.random(16).astype(np.float32) * 3
            buffer.update_priority(batch.indices, given)
            for index, priority in zip(batch.indices.tolist(), given.tolist(), strict=True):
                truth[index] = priority + 1e-6
            largest = max(largest, max(truth[i] for i in batch.indices.tolist()))
    alive = range(pushed - 400, pushed)
    p = np.array([truth[i] for i in alive])
    drawn = buffer.draw(400_000)[0] - alive[0]
    assert drawn.min() >= 0 and drawn.max() < 400
    seen = np.bincount(drawn, minlength=400) / 400_000
    want = p / p.sum()
    # Five standard deviations of each count.
    assert (np.abs(seen - want) < 5 * np.sqrt(want / 400_000) + 1e-6).all()
    assert len(set(np.round(p, 6))) > 30  # there was something to mix up


# ---- prioritised sampling ------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "beta"), [(0.6, 0.4), (1.0, 1.0), (0.0, 0.4)])
def test_frequencies_and_weights_follow_the_formula(alpha, beta):
    buffer = filled(
        [Episode(0, [0.0] * 6, "truncated")],
        use_priority=True,
        priority_prob_alpha=alpha,
        priority_prob_beta=beta,
    )
    priorities = np.array([0.1, 0.5, 1.0, 2.0, 4.0, 8.0])
    buffer.update_priority(np.arange(6), -priorities.astype(np.float32))  # the sign is dropped
    probability = priorities**alpha / (priorities**alpha).sum()
    indices, weights = buffer.draw(60_000)
    seen = np.bincount(indices, minlength=6) / 60_000
    np.testing.assert_allclose(seen, probability, atol=0.01)
    by_hand = (6 * probability) ** -beta
    np.testing.assert_allclose(
        weights, (by_hand / by_hand[np.unique(indices)].max())[indices], rtol=1e-3
    )
    assert weights.max() == pytest.approx(1.0)


def test_an_update_takes_effect_in_later_draws_and_new_data_gets_the_largest_priority():
    cfg = settings(use_priority=True, priority_prob_alpha=1.0)
    buffer = empty(cfg)
    buffer.push_game_segments(Episode(0, [0.0] * 4, "truncated").segments())
    np.testing.assert_allclose(
        np.bincount(buffer.draw(20_000)[0], minlength=4) / 20_000, 0.25, atol=0.02
    )
    buffer.update_priority(np.arange(4), np.array([0.0, 0.0, 0.0, 3.0], dtype=np.float32))
    drawn = np.bincount(buffer.draw(20_000)[0], minlength=4)
    assert drawn[3] > 19_900
    buffer.push_game_segments(Episode(1, [0.0], "truncated").segments())
    np.testing.assert_allclose(
        np.bincount(buffer.draw(20_000)[0], minlength=5)[3:] / 20_000, 0.5, atol=0.02
    )


def test_priorities_of_dropped_transitions_are_skipped():
    cfg = settings(use_priority=True, replay_buffer_size=4, priority_prob_alpha=1.0)
    buffer = empty(cfg)
    buffer.push_game_segments(Episode(0, [0.0] * 3, "truncated").segments())
    buffer.push_game_segments(Episode(1, [0.0] * 3, "truncated").segments())
    assert buffer.remove_oldest_data_to_fit() == 3
    buffer.update_priority(np.arange(3), np.full(3, 100.0, dtype=np.float32))
    buffer.push_game_segments(Episode(2, [0.0], "truncated").segments())
    drawn = np.bincount(buffer.draw(8000)[0] - 3, minlength=4) / 8000
    np.testing.assert_allclose(
        drawn, 0.25, atol=0.03
    )  # new data does not start from a dropped row's priority either


def test_uniform_sampling_without_priorities():
    buffer = filled([Episode(i, [0.0] * 5, "truncated") for i in range(2)])
    batch = buffer.sample(4000)
    assert batch.weights.tolist() == [1.0] * 4000 and len(batch) == 4000
    np.testing.assert_allclose(np.bincount(batch.indices, minlength=10) / 4000, 0.1, atol=0.03)


def test_a_perfectly_predicted_transition_stays_reachable():
    buffer = filled([Episode(0, [0.0] * 2, "truncated")], use_priority=True)
    buffer.update_priority(np.arange(2), np.zeros(2, dtype=np.float32))
    assert set(buffer.draw(100)[0]) == {0, 1}


def test_misuse_fails():
    cfg = settings()
    buffer = empty(cfg)
    with pytest.raises(AssertionError, match="nothing was pushed"):
        buffer.sample(2)
    with pytest.raises(AssertionError, match="what it played"):
        buffer.push_game_segments([Segment(0, 0, 4)])


# ---- decisions for the LLM -----------------------------------------------------------------------


def decisions(buffer: PriorZeroGameBuffer) -> dict[int, object]:
    """All samples by time step."""
    return {s.request.body_ids[1]: s for s in buffer.sample_llm(1000)}


def with_choice(rewards: list[float], end: str, single: int = 0, **kwargs) -> Episode:
    """The first made-up episode in which exactly `single` decisions have one action."""
    candidates = (Episode(i, rewards, end, **kwargs) for i in range(999))
    return next(e for e in candidates if sum(len(s.valid_actions) == 1 for s in e.steps) == single)


def test_llm_samples_by_hand():
    episode = with_choice([1.0, 2.0, 4.0], "terminated", single=1)  # that one is left out
    v = [s.root_value for s in episode.steps]
    values = {0: 1 + 0.9 * 2 + 0.81 * v[2], 1: 2 + 0.9 * 4, 2: 4.0}
    expected = {t for t, s in enumerate(episode.steps) if len(s.valid_actions) > 1}

    samples = decisions(filled([episode]))
    assert samples.keys() == expected and len(expected) == 2
    for t, sample in samples.items():
        step = episode.steps[t]
        assert sample.value_target == pytest.approx(values[t])
        assert sample.advantage == pytest.approx(values[t] - step.predicted_value)
        assert sample.action_index == step.action_index
        assert sample.target_policy == pytest.approx(step.target_policy.tolist())
        assert sample.behaviour == pytest.approx(step.behaviour.tolist())
        assert (sample.collected_logprobs, sample.policy_version) == (step.scores.token_logprobs, 7)


def test_an_llm_sample_looks_on_across_segments():
    episode = with_choice([1.0, 2.0, 4.0, 8.0], "terminated", cuts=[2, 2])
    target = decisions(filled([episode]))[1].value_target
    assert target == pytest.approx(2 + 0.9 * 4 + 0.81 * episode.steps[3].root_value)


def test_steps_without_a_request_teach_the_llm_nothing():
    episode = with_choice([1.0, 2.0], "terminated")
    episode.steps[0] = replace(episode.steps[0], request=None, scores=None)
    assert decisions(filled([episode])).keys() == {1}


def test_llm_sampling_draws_without_repetition_and_from_the_newest():
    episodes = [Episode(i, [0.0] * 6, "truncated") for i in range(6)]
    buffer = filled(episodes)
    usable = {
        (e.number, t) for e in episodes for t, s in enumerate(e.steps) if len(s.valid_actions) > 1
    }

    def keys(samples):
        return [s.request.body_ids for s in samples]

    everything = keys(buffer.sample_llm(1000))
    assert len(everything) == len(set(everything)) and set(everything) == usable
    assert set(keys(buffer.sample_llm(1000, recent=12))) == {k for k in usable if k[0] >= 4}
    assert len(buffer.sample_llm(3)) == 3
    assert set(keys(buffer.sample_llm(1000, recent=10_000))) == usable


@pytest.mark.parametrize("count", [1, 5, 12, 1000])
def test_the_newest_decisions_that_the_llm_answered_for(count):
    buffer = empty(settings(replay_buffer_size=20))
    for number in range(4):
        episode = Episode(number, [1.0] * 8, "truncated", cuts=[5, 3])
        for t, changes in ((2, dict(scores=None)), (6, dict(visit_counts=np.zeros(1)))):
            old = episode.steps[t]
            if "visit_counts" in changes:
                changes = dict(visit_counts=np.zeros(len(old.valid_actions)))
            episode.steps[t] = replace(old, **changes)
        buffer.push_game_segments(episode.segments())
        buffer.remove_oldest_data_to_fit()

    held = [step for _, segment in buffer.numbered_segments() for step in segment.steps]
    assert len(held) < 32
    usable = [s for s in held if s.timestep not in (2, 6) and len(s.valid_actions) > 1]
    found = buffer.newest_scored(count)
    assert found == usable[::-1][:count] and 5 < len(usable) < 17


# ---- going on from a saved state -----------------------------------------------------------------


WORN = settings(use_priority=True, replay_buffer_size=24)


def worn() -> PriorZeroGameBuffer:
    """Episodes in parts, some dropped, with priorities of their own, two of them still running."""
    buffer = empty(WORN)
    for number, end in enumerate(["terminated", "truncated", "running", "terminated", "running"]):
        episode = Episode(number, [0.5 * t for t in range(8)], end, cuts=[3, 3, 2])
        buffer.push_game_segments(episode.segments())
        buffer.remove_oldest_data_to_fit()
    indices, _ = buffer.draw(30)
    buffer.update_priority(indices, np.linspace(0.1, 3.0, 30))
    return buffer


def resumed(buffer: PriorZeroGameBuffer, without: tuple[int, ...] = ()) -> PriorZeroGameBuffer:
    """Through arrays, as a checkpoint and an archive take it."""
    again = empty(WORN)
    held = dict(buffer.numbered_segments())
    copies = unpack(pack(list(held.values())))
    copied = {n: s for n, s in zip(held, copies, strict=True) if n not in without}
    missing = again.load_state_dict(buffer.state_dict(), copied)
    assert missing == sum(len(held[number]) for number in without)
    return again


def assert_same_draws(one: PriorZeroGameBuffer, two: PriorZeroGameBuffer) -> None:
    for _ in range(3):
        left, right = one.sample(16), two.sample(16)
        for name in vars(left):
            np.testing.assert_array_equal(getattr(left, name), getattr(right, name), name)
        for buffer in (one, two):
            buffer.update_priority(left.indices, np.linspace(0.5, 1.5, 16))
    assert one.sample_llm(9, recent=20) == two.sample_llm(9, recent=20) != []


def test_a_resumed_buffer_draws_what_the_other_draws():
    one = worn()
    two = resumed(one)
    assert_same_draws(one, two)

    # And goes on alike: the running episode's next part joins the one before it.
    more = Episode(4, [0.5 * t for t in range(12)], "terminated", cuts=[3, 3, 2, 4])
    for buffer in (one, two):
        buffer.push_game_segments(more.segments()[3:])
        buffer.remove_oldest_data_to_fit()
    assert [n for n, _ in one.numbered_segments()] == [n for n, _ in two.numbered_segments()]
    tail = [s for _, s in two.numbered_segments()][-2:]
    assert tail[0].successor is tail[1]
    assert_same_draws(one, two)


def test_missing_segments_are_left_out_and_nothing_is_joined_over_the_gap():
    one = worn()
    numbers = [n for n, _ in one.numbered_segments()]
    middle = numbers[-2]  # the second of three parts of the last episode
    two = resumed(one, without=(numbers[0], middle))
    assert [n for n, _ in two.numbered_segments()] == [
        n for n in numbers if n not in (numbers[0], middle)
    ]
    assert two.get_num_of_transitions() == one.get_num_of_transitions() - 6
    by_number = dict(two.numbered_segments())
    assert by_number[numbers[-3]].successor is None
    assert len(two.sample(16)) == 16
    # Numbers to come are the same as without the gap.
    for buffer in (one, two):
        buffer.push_game_segments(Episode(9, [1.0], "truncated").segments())
    assert list(one.numbered_segments())[-1][0] == list(two.numbered_segments())[-1][0]


def test_a_resumed_buffer_may_be_empty_or_smaller():
    assert resumed(empty(WORN)).get_num_of_transitions() == 0
    one = worn()
    two = resumed(one, without=tuple(n for n, _ in one.numbered_segments()))
    assert two.get_num_of_transitions() == 0
    two.push_game_segments(Episode(9, [1.0, 2.0], "truncated").segments())
    assert len(two.sample(4)) == 4


def test_a_push_waits_for_a_batch_that_is_being_made(monkeypatch):
    """Collection and training in two threads: the segments a batch was drawn from may not leave
    while it is made.
    """
    import threading

    import game_buffer_priorzero

    buffer = empty(settings(replay_buffer_size=4))
    episodes = [Episode(n, [1.0] * 4, "terminated") for n in range(2)]
    (first,), (second,) = (episode.segments() for episode in episodes)
    buffer.push_game_segments([first])
    inside, go = threading.Event(), threading.Event()
    real = game_buffer_priorzero.gather_batch

    def slow(*arguments, **settings):
        inside.set()
        assert go.wait(30)
        return real(*arguments, **settings)

    monkeypatch.setattr(game_buffer_priorzero, "gather_batch", slow)
    batches: list = []
    sampling = threading.Thread(target=lambda: batches.append(buffer.sample(3)))
    sampling.start()
    assert inside.wait(30)

    def push():
        buffer.push_game_segments([second])
        buffer.remove_oldest_data_to_fit()

    pushing = threading.Thread(target=push)
    pushing.start()
    pushing.join(0.2)
    assert pushing.is_alive()
    go.set()
    sampling.join(30)
    pushing.join(30)
    assert (batches[0].observations[:, 0, 0] == 0).all()
    assert (buffer.sample(3).observations[:, 0, 0] == 1).all()
