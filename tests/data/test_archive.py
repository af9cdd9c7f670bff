"""Chunk files of the replay buffer: written once, dropped when nothing needs them."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from priorzero.data import archive as module
from priorzero.data.archive import SegmentArchive
from tests.data.test_packing import assert_equal
from tests.test_buffer import Episode


def numbered(first: int, last: int) -> list:
    """Segments of two steps, an episode each, with their running numbers."""
    return [(n, Episode(n, [float(n), 1.0], "truncated").segments()[0]) for n in range(first, last)]


def save(archive, first: int, last: int) -> list[dict]:
    """Write and commit, as a checkpoint does."""
    index = archive.write(numbered(first, last))
    archive.commit()
    return index


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_held(found, first: int, last: int) -> None:
    assert sorted(found) == list(range(first, last))
    for number, segment in numbered(first, last):
        assert_equal(found[number], segment)


def test_only_what_is_new_is_written(tmp_path):
    archive = SegmentArchive(tmp_path, 2**30)
    save(archive, 0, 5)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in tmp_path.iterdir()}
    index = save(archive, 0, 8)
    assert [(c["first"], c["last"]) for c in index] == [(0, 4), (5, 7)]
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in before} == before
    assert save(archive, 0, 8) == index  # nothing new, nothing written
    assert_held(SegmentArchive(tmp_path, 2**30).read(index), 0, 8)


def test_a_file_goes_when_the_last_two_checkpoints_do_not_name_it(tmp_path):
    archive = SegmentArchive(tmp_path, 2**30)
    for first, last in [(0, 4), (2, 6), (4, 8)]:
        index = save(archive, first, last)
    # Numbers 0 to 3 have left the buffer, but the checkpoint before this one still names them.
    assert names(tmp_path) == [f"chunk_0000000{n}.npz" for n in (1, 2, 3)]
    assert [c["name"] for c in index] == ["chunk_00000002.npz", "chunk_00000003.npz"]
    save(archive, 5, 9)
    assert names(tmp_path) == [f"chunk_0000000{n}.npz" for n in (2, 3, 4)]


def test_without_a_commit_nothing_goes(tmp_path):
    archive = SegmentArchive(tmp_path, 2**30)
    old = save(archive, 0, 4)
    for first in (4, 8, 12):  # checkpoints that could not be written
        archive.write(numbered(first, first + 4))
    assert_held(SegmentArchive(tmp_path, 2**30).read(old), 0, 4)


def test_a_resumed_archive_goes_on_and_overwrites_nothing(tmp_path):
    archive = SegmentArchive(tmp_path, 2**30)
    index = save(archive, 0, 4)
    archive.write(numbered(0, 6))  # the run died before its checkpoint: nobody names this file
    stray = (tmp_path / "chunk_00000002.npz").read_bytes()

    again = SegmentArchive(tmp_path, 2**30)
    assert_held(again.read(index), 0, 4)
    index = again.write(numbered(0, 7))
    assert [c["name"] for c in index] == ["chunk_00000001.npz", "chunk_00000003.npz"]
    assert (tmp_path / "chunk_00000002.npz").read_bytes() == stray
    again.commit()
    assert names(tmp_path) == ["chunk_00000001.npz", "chunk_00000003.npz"]
    assert_held(SegmentArchive(tmp_path, 2**30).read(index), 0, 7)


def test_the_limit_keeps_the_newest(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "CHUNK_STEPS", 4)  # two segments
    size = SegmentArchive(tmp_path / "sized", 2**30).write(numbered(0, 2))[0]["size"]
    archive = SegmentArchive(tmp_path / "replay", int(2.5 * size))
    for last in (8, 9, 12):
        index = save(archive, 0, last)
    assert sum(c["size"] for c in index) <= 2.5 * size
    assert index[-1]["last"] == 11 and index[0]["first"] > 7
    assert caplog.text.count("its oldest segments are not kept there") == 1
    assert set(names(tmp_path / "replay")) >= {c["name"] for c in index}


def test_a_limit_of_zero_keeps_none(tmp_path):
    archive = SegmentArchive(tmp_path / "replay", 0)
    assert save(archive, 0, 5) == [] and not (tmp_path / "replay").exists()


@pytest.mark.parametrize("damage", ["gone", "truncated", "garbage", "flipped"])
def test_a_damaged_file_costs_its_segments_and_no_others(tmp_path, damage, caplog):
    archive = SegmentArchive(tmp_path, 2**30)
    for last in (3, 6, 9):
        index = save(archive, 0, last)
    path = tmp_path / index[1]["name"]
    whole = bytearray(path.read_bytes())
    if damage == "gone":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 99)
    else:
        at = whole.index(np.float64(4.0).tobytes())  # the reward of number 4
        whole[at] ^= 1
        path.write_bytes(whole)

    again = SegmentArchive(tmp_path, 2**30)
    found = again.read(index)
    assert sorted(found) == [0, 1, 2, 6, 7, 8]
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and index[1]["name"] in warnings[0]
    assert "numbers 3 to 5, are missing" in warnings[0]
    # What is left of the buffer is saved again without it.
    kept = [pair for pair in numbered(0, 12) if not 3 <= pair[0] <= 5]
    index = again.write(kept)
    assert sorted(SegmentArchive(tmp_path, 2**30).read(index)) == [0, 1, 2, *range(6, 12)]


def test_a_file_cannot_run_code(tmp_path):
    archive = SegmentArchive(tmp_path, 2**30)
    index = save(archive, 0, 1)
    np.savez(tmp_path / index[0]["name"], numbers=np.array([print], dtype=object))
    assert SegmentArchive(tmp_path, 2**30).read(index) == {}


def test_a_full_disk_leaves_what_there_was(tmp_path, monkeypatch):
    archive = SegmentArchive(tmp_path, 2**30)
    index = save(archive, 0, 4)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
        with pytest.raises(OSError, match="No space"):
            archive.write(numbered(0, 6))
    assert names(tmp_path) == ["chunk_00000001.npz"]
    assert_held(SegmentArchive(tmp_path, 2**30).read(index), 0, 4)
    assert_held(SegmentArchive(tmp_path, 2**30).read(save(archive, 0, 6)), 0, 6)
