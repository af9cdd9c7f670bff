"""Checkpoints are whole or not there, and nothing is lost by a failed save or a damaged file."""

from __future__ import annotations

import json

import pytest
import torch

from priorzero.run.checkpoint import CheckpointStore
from priorzero.types import PriorZeroError


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
    assert llm["w"].item() == 40 and meta == {"iteration": 40}
    save(store, 41, llm=False)
    assert store.load()[1] is None


def test_latest_and_best_are_kept_and_the_rest_dropped(store, tmp_path):
    for iteration, best in [(1, False), (2, True), (3, False), (4, False)]:
        save(store, iteration, best)
    assert names(tmp_path / "ckpt") == ["best", "iter_00000002", "iter_00000004", "latest"]
    assert store.load("best")[2]["iteration"] == 2 and store.load("latest")[2]["iteration"] == 4
    assert store.load("iter_00000002")[0]["n"] == 2
    save(store, 5, best=True)
    assert names(tmp_path / "ckpt") == ["best", "iter_00000005", "latest"]


def test_the_same_iteration_again_replaces_it(store, tmp_path):
    save(store, 7)
    store.save(7, {"n": "newer"}, None, {"iteration": 7})
    # Under a name of its own, so that `latest` names a whole checkpoint at every moment.
    assert store.load()[0] == {"n": "newer"} and names(tmp_path / "ckpt") == [
        "iter_00000007_2",
        "latest",
    ]


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
    assert {k: v for k, v in after.items() if not k.startswith(".tmp-")} == before
    assert store.load()[2]["iteration"] == 7 and store.load("best")[2]["iteration"] == 7
    assert store.saved_iteration == 7
    monkeypatch.undo()
    save(store, 9)  # and the rubbish goes with the next save
    assert names(tmp_path / "ckpt") == ["best", "iter_00000007", "iter_00000009", "latest"]


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
def test_a_damaged_file_is_one_clear_error_and_nothing_is_deleted(store, tmp_path, file, damage):
    save(store, 1, best=True)
    path = save(store, 2) / file
    path.write_bytes(
        path.read_bytes()[: len(path.read_bytes()) // 2]
        if damage == "truncated"
        else b"\x00garbage" * 9
    )
    before = snapshot(tmp_path / "ckpt")
    with pytest.raises(PriorZeroError, match="iter_00000002 is damaged") as caught:
        store.load()
    assert "iter_00000001" in str(caught.value) and "--checkpoint" in str(caught.value)
    assert snapshot(tmp_path / "ckpt") == before
    assert store.load("best")[2]["iteration"] == 1


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
