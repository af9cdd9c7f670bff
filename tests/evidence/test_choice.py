"""What is chosen, and that nothing is chosen on the judging games."""

from __future__ import annotations

import pytest

from priorzero.evidence.choice import best_settings, held_out


def rows(game: str, variant: str = "bare", judging: bool = False, **mrr: float) -> list[dict]:
    """A game's lines: each reduction's MRR as given, best log loss at temperature 2."""
    return [
        {
            "llm": "m",
            "game": game,
            "family": "jericho",
            "judging_only": judging,
            "variant": variant,
            "reduction": reduction,
            "temperature": temperature,
            "decisions": 4,
            "mrr": value,
            "mrr_error": 0.3 if game == "a" else 0.4,
            "top1": value / 2,
            "log_loss": abs(temperature - 2.0) + value,
        }
        for reduction, value in mrr.items()
        for temperature in (1.0, 2.0, 4.0)
    ]


A, B = rows("a", sum=0.5, mean=0.2), rows("b", sum=0.3, mean=0.4)
JUDGED = rows("pentari", judging=True, sum=0.0, mean=1.0)


def test_the_best_mean_over_games_is_chosen():
    (found,) = best_settings(A + B)
    assert (found["reduction"], found["temperature"]) == ("sum", 2.0)
    assert found["mrr"] == pytest.approx(0.4) and found["top1"] == pytest.approx(0.2)
    assert found["log_loss"] == pytest.approx(0.4)
    # Errors of 0.3 and 0.4 make one of 0.5 in the sum, so half of it in the mean.
    assert found["decisions"] == 8 and found["mrr_error"] == pytest.approx(0.25)
    assert found["all"] == pytest.approx({"sum": 0.4, "mean": 0.3})
    assert found["games"] == ["a", "b"] and found["best"]


def test_judging_games_take_no_part_in_a_choice():
    assert best_settings(A + B + JUDGED) == best_settings(A + B)
    assert best_settings(JUDGED) == []


def test_the_best_prompt_is_marked():
    found = best_settings(A + rows("a", variant="list", sum=0.1, mean=0.9))
    assert [(r["variant"], r["reduction"], r["best"]) for r in found] == [
        ("bare", "sum", False),
        ("list", "mean", True),
    ]


def test_a_choice_is_tried_on_the_game_held_out():
    """On b alone means are best, and they give a 0.2; on a alone sums are, and give b 0.3. The
    judging game is judged by the choice on the others, and gives nothing to theirs.
    """
    found = {row["game"]: row for row in held_out(A + B + JUDGED)}
    assert (found["a"]["reduction"], found["a"]["mrr"]) == ("mean", 0.2)
    assert (found["a"]["hindsight_reduction"], found["a"]["hindsight_mrr"]) == ("sum", 0.5)
    assert (found["b"]["reduction"], found["b"]["mrr"]) == ("sum", 0.3)
    assert (found["pentari"]["reduction"], found["pentari"]["mrr"]) == ("sum", 0.0)
    assert held_out(A + JUDGED)[0]["game"] == "pentari" and len(held_out(A + JUDGED)) == 1
