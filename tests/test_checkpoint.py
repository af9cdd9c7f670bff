"""Checkpoints are whole or not there, and nothing is lost by a failed save or a damaged file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from priorzero.run.checkpoint import CheckpointStore
from priorzero.types import PriorZeroError

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def store(tmp_path):
    return CheckpointStore(tmp_path / "ckpt")


def save(store, iteration, best=False, llm=True):
    state = {
        "weights": torch.full((3,), float(iteration)),
        "vocabulary": {"actions": ["go", "look"]},
        "n": iteration,
    }
    return store.save(
        iteration,
        state,
        {"w": torch.tensor([iteration])} if llm else None,
        {"iteration": iteration},
        best,
    )


def snapshot(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()
    }


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_round_trip(store, tmp_path):
    path = save(store, 40)
    assert path == tmp_path / "ckpt" / "iter_00000040" and names(path) == [
        "llm.pt",
        "meta.json",
        "state.pt",
    ]
    state, llm, meta = store.load()
    assert torch.equal(state["weights"], torch.full((3,), 40.0)) and state["vocabulary"] == {
        "actions": ["go", "look"]
    }
    assert llm["w"].item() == 40
    assert meta == {"iteration": 40, "checkpoint": "iter_00000040"}
    save(store, 41, llm=False)
    assert store.load()[1] is None


def test_latest_previous_and_best_are_kept_and_the_rest_dropped(store, tmp_path):
    for iteration, best in [(1, True), (2, False), (3, False), (4, False)]:
        save(store, iteration, best)
    kept = ["iter_00000001", "iter_00000003", "iter_00000004"]
    assert names(tmp_path / "ckpt") == ["best", *kept, "latest", "previous"]
    assert [store.load(p)[2]["iteration"] for p in ("best", "previous", "latest")] == [1, 3, 4]
    assert store.load("iter_00000001")[0]["n"] == 1
    save(store, 5, best=True)
    kept = ["iter_00000004", "iter_00000005"]
    assert names(tmp_path / "ckpt") == ["best", *kept, "latest", "previous"]


def test_arrays_come_back_as_tensors_with_every_bit(store):
    frozen = np.arange(3, dtype=np.float64) / 3
    frozen.setflags(write=False)
    arrays = {"flags": np.array([True, False]), "frozen": frozen, "none": np.zeros((0, 4))}
    store.save(1, {"deep": {"er": [arrays, "text", 2**80]}}, None, {})
    found, text, number = store.load()[0]["deep"]["er"]
    assert (text, number) == ("text", 2**80)
    for name, array in arrays.items():
        assert found[name].numpy().dtype == array.dtype and np.array_equal(found[name], array)


def test_the_same_iteration_again_replaces_it(store, tmp_path):
    save(store, 7)
    store.save(7, {"n": "newer"}, None, {"iteration": 7})
    # Under a name of its own, so that `latest` names a whole checkpoint at every moment.
    assert store.load()[0] == {"n": "newer"}
    assert store.load("previous")[0]["n"] == 7
    kept = ["iter_00000007", "iter_00000007_2"]
    assert names(tmp_path / "ckpt") == [*kept, "latest", "previous"]


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("iteration", [8, 7])
def test_a_save_that_dies_leaves_the_previous_checkpoint_untouched(
    store, tmp_path, monkeypatch, fails_at, iteration
):
    save(store, 7, best=True)
    before = snapshot(tmp_path / "ckpt")
    real, calls = torch.save, []

    def dies(obj, path):
        calls.append(path)
        if len(calls) == fails_at:
            path.write_bytes(b"half a ")
            raise OSError("no space left on device")
        real(obj, path)

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="no space"):
        save(store, iteration)
    after = snapshot(tmp_path / "ckpt")
    assert after == before  # what was half written is gone: the space is wanted
    assert store.load()[2]["iteration"] == 7 and store.load("best")[2]["iteration"] == 7
    assert store.saved_iteration == 7
    monkeypatch.undo()
    save(store, 9)
    kept = ["iter_00000007", "iter_00000009"]
    assert names(tmp_path / "ckpt") == ["best", *kept, "latest", "previous"]


def test_what_torch_says_of_a_disk_that_takes_no_more_is_an_os_error(tmp_path):
    """A real file system error: the process may not write files of more than 4 KB."""
    code = (
        "import resource, sys, pathlib, torch\n"
        "from priorzero.run.checkpoint import CheckpointStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    store = CheckpointStore(pathlib.Path(sys.argv[1]))\n"
        "    store.save(1, {'w': torch.ones(9999)}, None, {})\n"
        "except OSError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ckpt")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "state.pt could not be written" in done.stdout and "MiB are free" in done.stdout
    assert names(tmp_path / "ckpt") == []


def test_dying_before_the_pointer_moves_keeps_the_old_latest(store, monkeypatch):
    save(store, 1)

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        save(store, 2)
    assert store.load()[2]["iteration"] == 1
    assert store.load("iter_00000002")[2]["iteration"] == 2  # whole already, only not named yet


@pytest.mark.parametrize("file", ["state.pt", "llm.pt", "meta.json"])
@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_file_is_passed_over_or_one_clear_error_and_nothing_is_deleted(
    store, tmp_path, file, damage, caplog
):
    save(store, 1, best=True)
    paths = {n: save(store, n) / file for n in (2, 3)}

    def spoil(path):
        half = path.read_bytes()[: len(path.read_bytes()) // 2]
        path.write_bytes(half if damage == "truncated" else b"\x00garbage" * 9)

    # The latest: the one before takes its place, unless it was asked for by name.
    spoil(paths[3])
    before = snapshot(tmp_path / "ckpt")
    assert store.load()[2] == {"iteration": 2, "checkpoint": "iter_00000002"}
    assert "iter_00000003 is damaged" in caplog.text
    assert "the one before takes its place: iter_00000002" in caplog.text
    with pytest.raises(PriorZeroError, match="iter_00000003 is damaged"):
        store.load("iter_00000003")
    assert snapshot(tmp_path / "ckpt") == before

    # Both.
    spoil(paths[2])
    before = snapshot(tmp_path / "ckpt")
    with pytest.raises(PriorZeroError, match="iter_00000003 is damaged") as caught:
        store.load()
    assert "iter_00000002 is damaged" in str(caught.value)
    assert "here: iter_00000001; name one with --checkpoint" in str(caught.value)
    assert snapshot(tmp_path / "ckpt") == before
    assert store.load("best")[2]["iteration"] == 1


def test_what_a_run_goes_on_from_is_the_one_before_its_next(store, tmp_path):
    for iteration in (1, 2):
        save(store, iteration)
    (tmp_path / "ckpt" / "iter_00000002" / "state.pt").write_bytes(b"")
    again = CheckpointStore(tmp_path / "ckpt")
    again.go_on_from(again.load()[2]["checkpoint"])
    save(again, 2)
    kept = ["iter_00000001", "iter_00000002_2"]
    assert names(tmp_path / "ckpt") == [*kept, "latest", "previous"]
    assert again.load("previous")[2]["iteration"] == 1


def test_a_missing_file_is_damage_too(store):
    (save(store, 3) / "state.pt").unlink()
    with pytest.raises(PriorZeroError, match="damaged"):
        store.load()


@pytest.mark.parametrize("which", ["latest", "best", "iter_00000009"])
def test_where_there_is_none(store, which):
    with pytest.raises(PriorZeroError, match="no checkpoint"):
        store.load(which)


def test_a_checkpoint_cannot_run_code(store):
    """Loading is restricted to tensors and plain values."""
    path = save(store, 1)

    class Evil:
        def __reduce__(self):
            return (json.dumps, ("x",))

    torch.save({"state": Evil()}, path / "state.pt")
    with pytest.raises(PriorZeroError, match="damaged"):
        store.load()
