"""The cache of known states: memory, disk, several processes, damage, a disk that cannot be
written.
"""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from priorzero.games.records import StateDetails, WorkerDied
from priorzero.games.valid_actions import ValidActionCache

ROOM = StateDetails(("north", "öffne Tür"), "A room.", "Nothing.")
_WRITER = """
import sys
from priorzero.games.records import StateDetails
from priorzero.games.valid_actions import ValidActionCache
path, name = sys.argv[1], sys.argv[2]
cache = ValidActionCache(path)
for i in range(150):
    cache.put("story", f"shared-{i}", StateDetails((name,), "look", "inventory"))
    cache.put("story", f"{name}-{i}", StateDetails((name,), "look", "inventory"))
assert cache.stats()["store_errors"] == 0, cache.stats()
"""


def test_memory_then_disk_then_miss(tmp_path):
    first = ValidActionCache(tmp_path / "states.sqlite")
    assert first.get("s", "a") is None
    first.put("s", "a", ROOM)
    assert first.get("s", "a") == ROOM and first.get("other story", "a") is None
    second = ValidActionCache(tmp_path / "states.sqlite")
    assert second.get("s", "a") == ROOM and second.get("s", "a") == ROOM
    assert {k: second.stats()[k] for k in ("memory_hits", "disk_hits", "misses")} == {
        "memory_hits": 1,
        "disk_hits": 1,
        "misses": 0,
    }
    assert first.stats()["misses"] == 2 and first.stats()["hits"] == 1


def test_the_first_writer_wins(tmp_path):
    one, two = ValidActionCache(tmp_path / "c.sqlite"), ValidActionCache(tmp_path / "c.sqlite")
    one.put("s", "a", ROOM)
    assert two.put("s", "a", StateDetails(("other",), "", "")) == ROOM == two.get("s", "a")


def test_memory_is_bounded_and_disk_remembers(tmp_path):
    cache = ValidActionCache(tmp_path / "c.sqlite", memory_entries=3)
    for i in range(10):
        cache.put("s", str(i), ROOM)
    assert cache.stats()["entries"] == 3
    assert cache.get("s", "0") == ROOM and cache.stats()["disk_hits"] == 1
    in_memory = ValidActionCache(None, memory_entries=3)
    for i in range(10):
        in_memory.put("s", str(i), ROOM)
    assert in_memory.get("s", "0") is None and in_memory.get("s", "9") == ROOM


def test_concurrent_processes_lose_nothing(tmp_path):
    path = tmp_path / "c.sqlite"
    names = ["p0", "p1", "p2"]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(path), name],
            cwd=Path(__file__).resolve().parents[2],
            stderr=subprocess.PIPE,
        )
        for name in names
    ]
    for process in running:
        assert process.wait(60) == 0, process.stderr.read().decode()
        process.stderr.close()
    cache = ValidActionCache(path)
    for i in range(150):
        assert cache.get("story", f"shared-{i}").valid_actions[0] in names
        assert [cache.get("story", f"{name}-{i}").valid_actions for name in names] == [
            (name,) for name in names
        ]


def test_concurrent_threads(tmp_path):
    cache = ValidActionCache(tmp_path / "c.sqlite", memory_entries=5)
    wrong = []

    def work(name):
        for i in range(100):
            details = cache.put("s", str(i), StateDetails((f"act {i}",), name, ""))
            if details.valid_actions != (f"act {i}",) or cache.get("s", str(i)) != details:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(f"t{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and cache.stats()["store_errors"] == 0


def test_a_state_met_by_several_at_once_is_listed_once():
    """Also by a cache that remembers nothing: those who wait are handed the list."""
    for entries in (50, 0):
        cache = ValidActionCache(None, memory_entries=entries)
        listing, go_on = threading.Event(), threading.Event()
        calls, answers = [], []

        def list_slowly(calls=calls, listing=listing, go_on=go_on):
            calls.append(threading.get_ident())
            listing.set()
            assert go_on.wait(20)
            return ROOM

        def ask(cache=cache, answers=answers, list_slowly=list_slowly):
            answers.append(cache.get_or_list("s", "a", list_slowly))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        threads[0].start()
        assert listing.wait(20) and cache.is_known("s", "a") and not cache.is_known("s", "b")
        for thread in threads[1:]:
            thread.start()
        while cache.stats()["misses"] < 4:
            time.sleep(0.01)
        go_on.set()
        for thread in threads:
            thread.join()

        assert len(calls) == 1 and cache.is_known("s", "a") == (entries > 0)
        assert sorted(how for _, how in answers) == ["listed", *["shared"] * 3]
        assert {details for details, _ in answers} == {ROOM}


def test_where_one_fails_to_list_the_next_one_tries():
    cache = ValidActionCache(None)
    listing, fail = threading.Event(), threading.Event()

    def break_down():
        listing.set()
        assert fail.wait(20)
        raise WorkerDied("gone")

    def ask_first():
        with pytest.raises(WorkerDied):
            cache.get_or_list("s", "a", break_down)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(ask_first)
        assert listing.wait(20)
        second = pool.submit(cache.get_or_list, "s", "a", lambda: ROOM)
        while cache.stats()["misses"] < 2:
            time.sleep(0.01)
        fail.set()
        first.result(20)
        assert second.result(20) == (ROOM, "listed")
    assert cache.get_or_list("s", "a", break_down) == (ROOM, "known")


def test_damaged_file_is_set_aside_and_rebuilt(tmp_path, caplog):
    path = tmp_path / "c.sqlite"
    for number in (1, 2):
        path.write_bytes(b"this is not a database" * 400)
        with caplog.at_level(logging.WARNING, logger="priorzero"):
            cache = ValidActionCache(path)
        assert cache.stats()["damaged_files"] == 1
        assert (tmp_path / f"c.sqlite.damaged-{number}").read_bytes().startswith(b"this is not")
        assert "set aside" in caplog.text
        cache.put("s", "a", ROOM)
        cache.close()
    assert ValidActionCache(path).get("s", "a") == ROOM


def test_damage_in_the_middle_of_a_run(tmp_path):
    path = tmp_path / "c.sqlite"
    cache = ValidActionCache(path, memory_entries=1)
    for i in range(400):
        cache.put("s", str(i), ROOM)
    cache.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)  # the header page survives, the rows do not
    path.write_bytes(data)
    cache = ValidActionCache(path)
    assert cache.get("s", "7") is None
    cache.put("s", "7", ROOM)
    assert cache.stats()["damaged_files"] == 1 and ValidActionCache(path).get("s", "7") == ROOM


def test_unwritable_place_costs_persistence_only(tmp_path, caplog):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with caplog.at_level(logging.WARNING, logger="priorzero"):
        cache = ValidActionCache(blocker / "c.sqlite")
        cache.put("s", "a", ROOM)
    assert cache.get("s", "a") == ROOM and cache.stats()["store_errors"] >= 1
    assert len([r for r in caplog.records if "cannot be used" in r.getMessage()]) == 1


def test_unreadable_entry_is_a_miss(tmp_path):
    import sqlite3

    path = tmp_path / "c.sqlite"
    cache = ValidActionCache(path)
    with sqlite3.connect(path) as db:
        db.execute("INSERT INTO details VALUES ('s', 'a', '{broken')")
    assert cache.get("s", "a") is None and cache.stats()["store_errors"] == 1
