"""The memory of visited states: weights by hand, the better way, its limit, a file and back."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from priorzero.play.place import Place
from priorzero.play.restarts import Ended, Restarts, VisitedStates
from priorzero.settings.policy import RestartSettings
from priorzero.types import HistoryItem
from tests.data.test_packing import rich_segments


def place(name: str, score: float, steps: int) -> Place:
    game = dict(commands=["go"] * steps, text=name, state_hash=name, score=score, episode_seed=7)
    return Place(game, (), ())


def remembered(*states, capacity: int = 100, factor: float = 0.5) -> VisitedStates:
    """states: (name, score, steps, visits)."""
    memory = VisitedStates(capacity, factor)
    for name, score, steps, visits in states:
        for _ in range(visits):
            memory.visit(name, score, steps, lambda a=(name, score, steps): place(*a))
    return memory


STATES = [("a", 0.0, 1, 3), ("b", 10.0, 5, 1), ("c", 0.0, 2, 8), ("d", 30.0, 9, 15)]


def test_weights_by_hand():
    """Higher scores in memory: two for 0 points, one for 10, none for 30."""
    by_hand = [0.25 / 2, 0.5 / np.sqrt(2), 0.25 / 3, 1 / 4]
    assert remembered(*STATES).weights() == pytest.approx(by_hand)
    without = [1 / 2, 1 / np.sqrt(2), 1 / 3, 1 / 4]
    assert remembered(*STATES, factor=1.0).weights() == pytest.approx(without)


def test_states_are_drawn_by_their_weights_and_a_draw_is_a_visit():
    memory, rng = remembered(("a", 0.0, 1, 1), ("b", 0.0, 1, 1)), np.random.default_rng(0)
    assert memory.weights() == pytest.approx([2**-0.5, 2**-0.5])
    first = memory.draw(rng)
    other = 1 if first.game["text"] == "a" else 0
    assert memory.weights()[other] == pytest.approx(2**-0.5)
    assert memory.weights()[1 - other] == pytest.approx(3**-0.5)

    counts = {name: 0 for name, *_ in STATES}
    for _ in range(4000):  # of a fresh memory each time
        counts[remembered(*STATES).draw(rng).game["text"]] += 1
    weights = remembered(*STATES).weights()
    np.testing.assert_allclose(
        [counts[name] / 4000 for name in "abcd"], weights / weights.sum(), atol=0.03
    )


def test_the_better_way_is_remembered():
    """More points, else fewer steps."""
    memory = remembered(("a", 5.0, 6, 1))

    def come(score, steps):
        memory.visit("a", score, steps, lambda: place(f"{score} in {steps}", score, steps))
        return memory.draw(np.random.default_rng(0)).game["text"]

    assert come(5.0, 7) == come(4.0, 1) == "a"
    assert come(5.0, 5) == "5.0 in 5"
    assert come(6.0, 9) == "6.0 in 9"
    assert len(memory) == 1 and memory.best_score == 6.0


def test_a_place_is_made_only_where_it_is_kept():
    memory = remembered(("a", 5.0, 6, 1))
    memory.visit("a", 5.0, 6, lambda: pytest.fail("the same way again"))
    assert len(memory) == 1 and memory.best_score == 5.0


def test_a_full_memory_drops_the_tenth_with_the_least_weight():
    memory = VisitedStates(capacity=20, score_factor=1.0)
    for number in range(21):
        for _ in range(1 + (number in (4, 9)) * 5 + (number == 13)):
            memory.visit(str(number), 0.0, 1, lambda n=number: place(str(n), 0.0, 1))
    assert len(memory) == 19
    left = set(memory.state_dict()["hashes"])
    assert left == {str(n) for n in range(21)} - {"4", "9"}


def test_forgotten_is_gone():
    memory = remembered(*STATES)
    memory.forget("d")
    memory.forget("nobody")
    assert len(memory) == 3 and memory.best_score == 10.0


def test_it_comes_back_through_a_checkpoint():
    opened = rich_segments()[-1]
    memory = remembered(*STATES)
    history = (HistoryItem("Où? \ud800", "go", 1 / 3),)
    way = Place(place("e", 0.1, 3).game, opened.before, history)
    memory.visit("e", 0.1, 3, lambda: way)

    def tensors(value):
        if isinstance(value, dict):
            return {k: tensors(v) for k, v in value.items()}
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    file = io.BytesIO()
    torch.save(tensors(memory.state_dict()), file)
    file.seek(0)
    again = VisitedStates(100, 0.5)
    again.load_state_dict(torch.load(file, weights_only=True))

    assert again.weights().tolist() == memory.weights().tolist()
    draws = [[m.draw(np.random.default_rng(s)).game for s in range(9)] for m in (memory, again)]
    assert draws[0] == draws[1]
    back = list(again._states.values())[-1].place
    assert back.history == history and back.game == way.game
    assert [s.timestep for s in back.before] == [s.timestep for s in opened.before] != []
    np.testing.assert_array_equal(back.before[0].observation, opened.before[0].observation)

    small = VisitedStates(2, 0.5)
    small.load_state_dict(memory.state_dict())
    assert len(small) == 2


def test_metrics_by_hand():
    restarts = Restarts(RestartSettings(share=0.5), 2, np.random.default_rng(0))
    empty = dict(restarts=0, restart_replayed=0, restart_states=0, restart_failures=0)
    whole = Ended(dict(score=9.0, eval_episode_return=9.0), None)
    assert restarts.metrics([], [whole]) == empty
    restarts.visited.visit("a", 4.0, 2, lambda: place("a", 4.0, 2))
    late = [
        Ended(dict(score=score, eval_episode_return=score - 1), (2, 4.0)) for score in (5.0, 9.0)
    ]
    assert restarts.metrics([2, 2, 3], [whole, *late]) == dict(
        restarts=3,
        restart_replayed=7,
        restart_states=1,
        restart_failures=0,
        restart_best_score=4.0,
        restart_gain_mean=3.0,
        restart_return_mean=6.0,
    )
