"""What an LLM's folder says of its training, and how it is told."""

from __future__ import annotations

import json

import pytest

from priorzero.llm.seen import FACTS, Seen, SeenGame, read_seen, seen_of
from priorzero.types import PriorZeroError

ZORK = SeenGame("Zork II", "Zork", "warm-up")
OTHER = SeenGame("Detective", "Detective", "/runs/a")


def test_the_game_itself_is_told_before_relatives():
    seen = Seen((OTHER, ZORK, SeenGame("Zork III", "Zork", "/runs/b")))
    assert "TRAINED ON THIS GAME, Detective (by /runs/a)" in seen.warning("Detective", "Detective")
    relatives = seen.warning("Zork I", "Zork")
    assert "2 RELATIVES" in relatives and "Zork II; Zork III" in relatives
    assert "THIS GAME, Zork II" in seen.warning("Zork II", "Zork")
    assert seen.warning("Curses", "Curses") == "" and Seen().warning("Zork I", "Zork") == ""


def test_records_are_joined_and_come_back(tmp_path):
    seen = Seen((ZORK,)) | Seen((OTHER, ZORK))
    assert seen.games == (OTHER, ZORK) and seen.families == ("Detective", "Zork")
    (tmp_path / FACTS).write_text(json.dumps({"seen": seen.as_list()}))
    assert read_seen(tmp_path) == seen == seen_of(seen.as_list())


def test_a_folder_without_a_record_says_nothing(tmp_path):
    assert not read_seen(tmp_path) and not read_seen("owner/model")
    (tmp_path / FACTS).write_text(json.dumps({"run": "an export of an early version"}))
    assert not read_seen(tmp_path)


@pytest.mark.parametrize("text", ["{", '{"seen": [{"game": "Zork I"}]}', "[]"])
def test_a_damaged_record_is_no_empty_one(tmp_path, text):
    (tmp_path / FACTS).write_text(text)
    with pytest.raises(PriorZeroError, match="damaged"):
        read_seen(tmp_path)
