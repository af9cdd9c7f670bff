"""Play without a search, on a scripted game and an LLM whose answers are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from priorzero.evidence.play import Episode, Player, play, play_figures
from priorzero.types import ActionScores

# A ring of rooms: "on" goes round, "stay" does not; the fourth step ends the episode. Each "on"
# earns a point.
ROOMS = 3


class Ring:
    """A `GameEnvGroup` of one room ring per environment."""

    def __init__(self, count: int) -> None:
        game = SimpleNamespace(goal="Walk.", env_id="ring")
        self.envs = [SimpleNamespace(game=game, episode_seed=0) for _ in range(count)]
        self.seeds: list[int] = []
        self.rounds = 0

    def __len__(self) -> int:
        return len(self.envs)

    def seed(self, seed: int) -> None:
        self.seeds.append(seed)

    def observe(self, i: int) -> dict:
        room = self.room[i] % ROOMS
        return {
            "text": f"Room {room}.",
            "valid_actions": ("on", "stay"),
            "score": float(self.room[i]),
            "state_hash": str(room),
        }

    def reset(self, ids):
        self.rounds += 1
        self.room, self.steps = dict.fromkeys(ids, 0), dict.fromkeys(ids, 0)
        return {i: self.observe(i) for i in ids}

    def step(self, actions):
        answers = {}
        for i, action in actions.items():
            self.room[i] += action == "on"
            self.steps[i] += 1
            done = self.steps[i] == 4
            info = {"eval_episode_return": float(self.room[i])} if done else {}
            answers[i] = SimpleNamespace(
                obs=self.observe(i), reward=float(action == "on"), done=done, info=info
            )
        return answers


class Llm:
    """An `Asker` that gives every state these token log-probabilities of "on" and "stay"."""

    history_length = 2

    def __init__(self, on: tuple[float, ...], stay: tuple[float, ...], alone=(0.0, 0.0)) -> None:
        self.tokens, self.alone = (on, stay), dict(zip(("on", "stay"), alone, strict=True))
        self.states = []

    async def ask(self, states):
        self.states += states
        return [ActionScores(self.tokens) for _ in states]

    async def unconditional(self, goal, commands):
        assert goal == "Walk."
        return {command: self.alone[command] for command in commands}


async def test_returns_and_revisits_by_hand():
    """Rooms 1, 2, 0, 1: the last two were seen. Standing still comes back four times."""
    walker, sitter = Llm((-1.0,), (-2.0,)), Llm((-2.0,), (-1.0,))
    on = await play(Player(walker, "bare", "sum", 0.0), Ring(1), 1, 0)
    stay = await play(Player(sitter, "bare", "sum", 0.0), Ring(1), 1, 0)
    assert on == [Episode(4.0, 4, 2)] and stay == [Episode(0.0, 4, 4)]
    found = play_figures(on + stay)
    assert found == {
        "episodes": 2,
        "return": 2.0,
        "return_std": 2.0,
        "return_best": 4.0,
        "length": 4.0,
        "revisits": 0.75,
    }


async def test_each_reduction_plays_its_own_favourite():
    """Sums -3 and -2, means -1 and -2, against -9 and -2 without a state: +6 and 0."""
    for reduction, total in {"sum": 0.0, "mean": 4.0, "pmi": 4.0}.items():
        llm = Llm((-1.0, -1.0, -1.0), (-2.0,), (-9.0, -2.0))
        (episode,) = await play(Player(llm, "bare", reduction, 0.0), Ring(1), 1, 0)
        assert episode.total == total, reduction


async def test_drawn_commands_follow_the_probabilities():
    """Three to one at temperature 1; temperature 0 never stays."""
    llm = Llm((-0.287682,), (-1.386294,))
    drawn = await play(Player(llm, "bare", "sum", 1.0), Ring(8), 100, 0)
    assert sum(e.total for e in drawn) / 400 == pytest.approx(0.75, abs=0.06)
    greedy = await play(Player(llm, "bare", "sum", 0.0), Ring(8), 8, 0)
    assert {e.total for e in greedy} == {4.0}
    uniform = await play(Player(), Ring(8), 100, 0)
    assert sum(e.total for e in uniform) / 400 == pytest.approx(0.5, abs=0.07)


async def test_histories_and_rounds():
    """Three episodes in two environments take two rounds, with one seed; the LLM sees two steps."""
    llm, envs = Llm((-1.0,), (-2.0,)), Ring(2)
    assert len(await play(Player(llm, "history", "sum", 0.0), envs, 3, 7)) == 3
    assert envs.rounds == 2 and envs.seeds == [7]
    assert [len(s.history) for s in llm.states[::2][:4]] == [0, 1, 2, 2]
    assert [h.action for h in llm.states[-1].history] == ["on", "on"]


async def test_a_seed_repeats_its_draws():
    first, again, other = [await play(Player(), Ring(2), 6, seed) for seed in (1, 1, 2)]
    assert first == again != other
