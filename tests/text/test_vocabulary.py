"""Action ids: stable over states and restarts, unique in a state, and explicit about every loss."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import threading

import numpy as np
import pytest

from priorzero.settings.policy import VocabularySettings
from priorzero.text.vocabulary import ActionVocabulary, PositionalVocabulary, make_vocabulary
from priorzero.types import PriorZeroError


def test_an_action_keeps_its_id_in_every_state_where_positional_ids_change():
    stable, positional = (
        make_vocabulary(VocabularySettings(kind=kind, capacity=10, overflow=2))
        for kind in ("stable", "positional")
    )
    first, second = ["east", "open door"], ["close door", "east"]
    assert stable.ids(first) == [0, 1]
    assert stable.ids(second) == [2, 0]
    assert positional.ids(first)[0] != positional.ids(second)[1]
    assert [stable.action_of(i) for i in range(3)] == ["east", "open door", "close door"]
    assert stable.id_of("close door") == 2 and stable.id_of("never seen") is None
    assert stable.size == 3 and stable.used_mask.tolist() == [True] * 3 + [False] * 7


def test_overflow_warns_once_and_keeps_ordinary_ids(caplog):
    vocabulary = ActionVocabulary(capacity=6, overflow=3)
    with caplog.at_level(logging.WARNING, logger="priorzero"):
        ids = vocabulary.ids(["a", "b", "c", "d", "e"])
        vocabulary.ids(["f", "a"])
    assert ids[:3] == [0, 1, 2]
    assert set(ids[3:]) <= {3, 4, 5} and ids[3] != ids[4]
    warnings = [r.message for r in caplog.records if "vocabulary is full" in r.message]
    assert len(warnings) == 1 and "Raise" in warnings[0]
    assert vocabulary.stats()["overflow_actions"] == 3
    assert vocabulary.size == 3 and vocabulary.used_mask[:3].all()
    assert vocabulary.action_of(4) is None


def test_random_states_have_unique_ids_within_capacity_and_account_for_drops():
    rng = random.Random(3)
    vocabulary = ActionVocabulary(capacity=30, overflow=5)
    words = [f"take thing {i}" for i in range(80)]
    fixed: dict[str, int] = {}
    dropped = used_overflow = 0
    handed_out: set[int] = set()
    for _ in range(400):
        state = sorted(rng.sample(words, rng.randint(1, 25)))
        ids = vocabulary.ids(state)
        given = [i for i in ids if i is not None]
        assert len(given) == len(set(given)) and given and all(0 <= i < 30 for i in given)
        handed_out.update(given)
        in_overflow = 0
        for action, action_id in zip(state, ids, strict=True):
            if action_id is None:
                dropped += 1
            elif action_id < 25:
                assert fixed.setdefault(action, action_id) == action_id
            else:
                in_overflow += 1
                assert action not in fixed
        # Nothing is dropped while an overflow id is free.
        assert None not in ids or in_overflow == 5
        used_overflow += in_overflow
        assert vocabulary.ids(state) == ids or len(fixed) < 25
    assert used_overflow and dropped
    # Each state was asked twice, so every drop counted above was reported twice once the vocabulary
    # was full.
    assert vocabulary.stats()["dropped_actions"] == 2 * dropped
    assert set(np.flatnonzero(vocabulary.used_mask)) == handed_out
    assert sorted(fixed.values()) == list(range(25))


def test_an_overflow_action_alone_gets_its_home_and_a_displaced_one_probes():
    vocabulary = ActionVocabulary(capacity=5, overflow=4)
    vocabulary.ids(["the only ordinary one"])
    words = [f"word {i}" for i in range(40)]
    homes = {word: vocabulary.ids([word])[0] for word in words}
    assert {vocabulary.id_of(word) for word in words} == {1, 2, 3, 4}
    clash = [word for word in words if homes[word] == homes[words[0]]][:2]
    first, second = vocabulary.ids(clash)
    assert first == homes[clash[0]]
    assert second == 1 + (homes[clash[1]] - 1 + 1) % 4
    assert vocabulary.stats()["overflow_probed"] == 1


def test_overflow_ids_are_the_same_in_another_process():
    code = (
        "from priorzero.text.vocabulary import ActionVocabulary\n"
        "v = ActionVocabulary(60, 50); v.ids([str(i) for i in range(10)])\n"
        "print([v.ids([w])[0] for w in ('go north', 'ouvre la fenêtre', '開ける')])"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and "None" not in runs.pop()


def test_saved_state_survives_json_and_refuses_other_settings():
    vocabulary = ActionVocabulary(capacity=6, overflow=2)
    states = [["a", "b"], ["c", "d", "e", "f", "g"], ["h", "b"]]
    for state in states:
        vocabulary.ids(state)
    copy = ActionVocabulary(capacity=6, overflow=2)
    copy.load_state_dict(json.loads(json.dumps(vocabulary.state_dict())))
    assert copy.stats() == vocabulary.stats()
    assert (copy.used_mask == vocabulary.used_mask).all()
    assert [copy.ids(s) for s in states] == [vocabulary.ids(s) for s in states]
    for other in (ActionVocabulary(7, 2), ActionVocabulary(6, 3), PositionalVocabulary(6)):
        with pytest.raises(PriorZeroError, match="saved"):
            other.load_state_dict(vocabulary.state_dict())


def test_positional_ids_are_ranks_whatever_the_order_given_and_the_surplus_is_dropped(caplog):
    vocabulary = PositionalVocabulary(3)
    assert vocabulary.ids(["b", "a"]) == [1, 0]
    assert vocabulary.size == 2
    with caplog.at_level(logging.WARNING, logger="priorzero"):
        assert vocabulary.ids(["d", "c", "b", "a"]) == [None, 2, 1, 0]
    assert "left out" in caplog.text
    assert vocabulary.stats() == {"size": 3, "dropped_actions": 1, "states_with_drops": 1}
    copy = PositionalVocabulary(3)
    copy.load_state_dict(vocabulary.state_dict())
    assert copy.stats() == vocabulary.stats()


@pytest.mark.parametrize(
    "arguments", [("stable", 5, 0), ("stable", 5, 5), ("positional", 0, 1), ("other", 5, 1)]
)
def test_impossible_settings_are_refused(arguments):
    with pytest.raises(PriorZeroError):
        VocabularySettings(**dict(zip(("kind", "capacity", "overflow"), arguments, strict=True)))


@pytest.mark.parametrize("vocabulary", [ActionVocabulary(5, 1), PositionalVocabulary(5)])
def test_duplicates_are_an_error_and_no_actions_are_fine(vocabulary):
    assert vocabulary.ids([]) == []
    with pytest.raises(ValueError, match="distinct"):
        vocabulary.ids(["a", "a"])
    with pytest.raises(ValueError, match="outside"):
        vocabulary.action_of(5)


# ---- shared by processes -------------------------------------------------------------------------


def test_processes_that_meet_actions_at_once_give_them_the_same_ids():
    """Threads stand for the processes; the store is torch's."""
    from torch.distributed import HashStore

    from priorzero.text.shared import SharedVocabulary

    store, texts = HashStore(), [f"action {i}" for i in range(40)] + ["na\udce9ve"]
    settings = VocabularySettings(capacity=48, overflow=4)
    ours = [SharedVocabulary(settings, store) for _ in range(3)]
    start, given = threading.Barrier(3), [{} for _ in ours]

    def play(number: int) -> None:
        rng = np.random.default_rng(number)
        start.wait()
        for _ in range(60):
            chosen = [texts[i] for i in rng.choice(len(texts), size=4, replace=False)]
            for text, action_id in zip(chosen, ours[number].ids(chosen), strict=True):
                assert given[number].setdefault(text, action_id) == action_id
            known = ours[number]
            assert [known.id_of(known.action_of(i)) for i in range(known.size)] == [
                *range(known.size)
            ]

    threads = [threading.Thread(target=play, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for vocabulary in ours:
        vocabulary.catch_up(np.zeros(48, dtype=bool))

    assert len(given[0]) == len(texts) and given[0] == given[1] == given[2]
    assert sorted(given[0].values()) == list(range(len(texts)))
    states = [vocabulary.state_dict() for vocabulary in ours]
    assert states[0] == states[1] == states[2]

    # It is an ordinary vocabulary's state, from which others go on together.
    store = HashStore()
    later = [SharedVocabulary(settings, store) for _ in range(2)]
    for vocabulary in later:
        vocabulary.load_state_dict(states[0])
    assert later[1].ids(["new"]) == [41] and later[0].ids(["newer", "new"]) == [42, 41]
    more = [f"more {i}" for i in range(4)]
    assert max(later[0].ids(more)) >= 44  # the fourth found no id of its own
    used = later[0].used_mask
    later[1].catch_up(used)
    assert (later[1].used_mask == used).all()
    assert isinstance(later[1].copy(), ActionVocabulary)
    assert not isinstance(later[1].copy(), SharedVocabulary)
