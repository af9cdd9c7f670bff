"""Known states carried from one machine to another: the command, its file, and what it refuses."""

from __future__ import annotations

import gzip
import json
import random
import threading

import pytest

from priorzero.games import cache, cache_file
from priorzero.games.catalogue import resolve_game
from priorzero.games.records import StateDetails
from priorzero.games.valid_actions import ValidActionCache
from priorzero.types import PriorZeroError
from tests.games.test_env import play

KEY = "0123abcd/jericho-3.3.1/v2"
KNOWN = cache_file.KnownStates(
    KEY,
    "A Tale",
    {
        "b": StateDetails(("east", "öffne Tür"), "A hall.\nDark.", "Nothing."),
        "a": StateDetails((), "", ""),
    },
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "tale.gz"
    cache_file.write(path, KNOWN)
    return path


# --- the file -------------------------------------------------------------------------------------


def test_it_reads_as_it_was_written(file, tmp_path):
    assert cache_file.read(file) == KNOWN
    again = tmp_path / "elsewhere" / "again.gz"
    cache_file.write(again, cache_file.read(file))
    assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["again.gz"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "line", "row"])
def test_a_damaged_file_is_refused(file, damage):
    data = file.read_bytes()
    plain = gzip.decompress(data)
    file.write_bytes(
        {
            "cut": data[:-20],
            "flipped": data[:60] + bytes([data[60] ^ 4]) + data[61:],
            "empty": b"",
            "text": b"not a gzip file",
            "line": gzip.compress(plain[: plain.rstrip().rindex(b"\n") + 1]),
            "row": gzip.compress(plain.replace(b'["east"', b'["west"')),
        }[damage]
    )
    with pytest.raises(PriorZeroError, match="no whole file of known states.*Nothing was imported"):
        cache_file.read(file)


def test_other_files_and_newer_ones_are_refused(file, tmp_path):
    head, _, body = gzip.decompress(file.read_bytes()).partition(b"\n")
    for change, message in (
        ({"version": 2}, "another version"),
        ({"format": "x"}, "no whole"),
        ({"story": "x"}, "no whole"),
    ):
        new = json.dumps(json.loads(head) | change).encode()
        file.write_bytes(gzip.compress(new + b"\n" + body))
        with pytest.raises(PriorZeroError, match=message):
            cache_file.read(file)
    with pytest.raises(PriorZeroError, match="there is no file"):
        cache_file.read(tmp_path / "nowhere.gz")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("ffff/jericho-3.3.1/v2", "another story file 0123abcd, not ffff. Nothing"),
        ("0123abcd/jericho-3.4.0/v2", "another interpreter jericho-3.3.1, not jericho-3.4.0"),
        ("0123abcd/jericho-3.3.1/v3", "another version of the listing v2, not v3"),
    ],
)
def test_states_of_another_game_are_refused(file, other, message):
    KNOWN.check(KEY, file)
    with pytest.raises(PriorZeroError, match=message):
        KNOWN.check(other, file)


# --- the cache's side -----------------------------------------------------------------------------


def test_merging_adds_what_is_new_and_changes_nothing(tmp_path):
    own = ValidActionCache(tmp_path / "own.sqlite")
    mine = StateDetails(("mine",), "", "")
    own.put(KEY, "b", mine)
    assert own.merge(KEY, KNOWN.states) == 1
    assert own.stored(KEY) == {"a": KNOWN.states["a"], "b": mine}
    assert own.get(KEY, "a") == KNOWN.states["a"] and own.stored("another") == {}
    assert own.count() == {KEY: 2}


def test_several_may_merge_at_once(tmp_path):
    """Each with a connection of its own, as processes have; every state is new to one of them."""
    path, added = tmp_path / "shared.sqlite", []

    def work(first: int) -> None:
        states = {str(i): KNOWN.states["b"] for i in range(first, first + 200)}
        for _ in range(3):
            added.append(ValidActionCache(path).merge(f"{KEY}{first % 2}", states))

    threads = [threading.Thread(target=work, args=(first,)) for first in (0, 100, 1, 101)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(added) == 12
    assert ValidActionCache(path).count() == {f"{KEY}0": 300, f"{KEY}1": 300}


# --- the command ----------------------------------------------------------------------------------


def test_a_second_machine_starts_warm(make_env, zork1, tmp_path, capsys):
    here, there, file = (tmp_path / name for name in ("here.sqlite", "there.sqlite", "zork1.gz"))
    first = make_env(env_id=zork1, action_cache=str(here))
    trace = play(first, random.Random(2), 8)
    listed = first.stats()["state_misses"]
    assert listed > 1

    assert cache.main(["--cache", str(here), "export", zork1, str(file)]) == 0
    assert cache.main(["info", str(file)]) == 0
    assert cache.main(["--cache", str(there), "import", zork1, str(file)]) == 0
    assert cache.main(["--cache", str(there), "import", zork1, str(file)]) == 0
    assert cache.main(["--cache", str(there), "info"]) == 0
    told = capsys.readouterr().out
    assert f"{listed} of {listed} states of" in told and f"0 of {listed} states of" in told
    assert told.count(resolve_game(zork1).story_key) == 2

    second = make_env(env_id=zork1, action_cache=str(there))
    assert play(second, random.Random(2), 8) == trace
    assert second.stats()["state_misses"] == 0 and second.stats()["describe_s"] == 0


def test_what_cannot_be_done_is_said_in_one_line(detective, file, tmp_path, capsys):
    own = ["--cache", str(tmp_path / "own.sqlite")]
    assert cache.main([*own, "import", detective, str(file)]) == 2
    assert cache.main([*own, "export", detective, str(tmp_path / "out.gz")]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "another story file" in told[0] and "nothing is known" in told[1]
    assert not (tmp_path / "out.gz").exists()
    assert ValidActionCache(tmp_path / "own.sqlite").count() == {}
