"""Action texts to integer ids, so that a policy logit means the same command everywhere.

`ActionVocabulary` gives each action text one id for the whole run. `PositionalVocabulary` keeps
LightZero's usual indexing available for comparison: id i is "the i-th valid action here", so a
logit means another command in each state, and nothing at all in the inner nodes of a search tree.

Called by the collector (ids of a state's valid actions), the policy (which ids exist) and the
checkpoint code.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from priorzero.settings.policy import VocabularySettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)


class Vocabulary(Protocol):
    """What both vocabularies offer. `V` is `capacity`, the width of the policy head."""

    capacity: int

    @property
    def size(self) -> int: ...

    @property
    def used_mask(self) -> np.ndarray: ...

    def ids(self, actions: Sequence[str]) -> list[int | None]: ...

    def id_of(self, action: str) -> int | None: ...

    def action_of(self, action_id: int) -> str | None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def stats(self) -> dict[str, int]: ...

    def copy(self) -> Vocabulary: ...


def make_vocabulary(settings: VocabularySettings) -> Vocabulary:
    """The empty vocabulary these settings name; `positional` has no overflow ids."""
    if settings.kind == "stable":
        return ActionVocabulary(settings.capacity, settings.overflow)
    assert settings.kind == "positional"
    return PositionalVocabulary(settings.capacity)


class ActionVocabulary:
    """One id per action text for the whole run, in order of first sight.

    Ids `[0, capacity - overflow)` are ordinary: each belongs to one action for ever. When they
    are used up, a warning is logged once and a further action falls among the `overflow` ids at
    the end: its home is `capacity - overflow + hash(action) mod overflow`, by a hash that is the
    same in every process. Two overflow actions of one state never share an id: every home goes to
    the first action that asks for it, the others take the next free overflow id (linear probing),
    so an overflow id can mean different commands in different states. If a state has more overflow
    actions than there are overflow ids, the last of them are dropped from the search in that state
    (`None`), counted and logged. Since `overflow >= 1`, a state with valid actions always keeps
    at least one.

    Thread-safe. Ids never change once given, also over `state_dict` and back.
    """

    def __init__(self, capacity: int, overflow: int) -> None:
        assert 1 <= overflow < capacity  # rules of `VocabularySettings`
        self.capacity = capacity
        self.overflow = overflow
        self._ordinary = capacity - overflow
        self._actions: list[str] = []
        self._ids: dict[str, int] = {}
        self._overflow_actions: set[str] = set()
        self._overflow_used = np.zeros(overflow, dtype=bool)
        self._probed = 0
        self._dropped = 0
        self._states_with_drops = 0
        self._lock = threading.Lock()

    def ids(self, actions: Sequence[str]) -> list[int | None]:
        """Ids of one state's valid actions, in their order; unseen actions are taken in.

        `actions` holds no duplicates (ValueError). `None` marks an action that this state's
        search must leave out.
        """
        if len(set(actions)) != len(actions):
            raise ValueError(f"valid actions of a state must be distinct, got {list(actions)!r}")
        with self._lock:
            result = [self._ordinary_id(action) for action in actions]
            if None in result:
                self._place_overflow(actions, result)
            return result

    def _ordinary_id(self, action: str) -> int | None:
        known = self._ids.get(action)
        if known is not None:
            return known
        if len(self._actions) < self._ordinary:
            self._ids[action] = len(self._actions)
            self._actions.append(action)
            return self._ids[action]
        if not self._overflow_actions:
            logger.warning(
                "The action vocabulary is full: %d actions have their own id. Further actions "
                "share %d overflow ids, so their policy logits mean different commands in "
                "different states. Raise the vocabulary's capacity (now %d) and start anew to "
                "avoid it. First action affected: %r.",
                self._ordinary,
                self.overflow,
                self.capacity,
                action,
            )
        self._overflow_actions.add(action)
        return None

    def _home(self, action: str) -> int:
        """Preferred overflow slot in `[0, overflow)`; Python's own hash differs from process to
        process.
        """
        digest = hashlib.blake2b(action.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "little") % self.overflow

    def _place_overflow(self, actions: Sequence[str], result: list[int | None]) -> None:
        """Fill the gaps of `result` in place. Homes first, so that as few actions as possible
        move from theirs.
        """
        taken: set[int] = set()
        homeless: list[int] = []
        for index in [i for i, given in enumerate(result) if given is None]:
            home = self._home(actions[index])
            if home in taken:
                homeless.append(index)
                continue
            taken.add(home)
            result[index] = self._ordinary + home

        # Linear probing for those whose home went to another action of this state.
        dropped: list[str] = []
        for index in homeless:
            home = self._home(actions[index])
            candidates = ((home + step) % self.overflow for step in range(self.overflow))
            slot = next((candidate for candidate in candidates if candidate not in taken), None)
            if slot is None:
                dropped.append(actions[index])
                continue
            taken.add(slot)
            self._probed += 1
            result[index] = self._ordinary + slot

        self._overflow_used[list(taken)] = True
        if dropped:
            self._report_drop(dropped)

    def _report_drop(self, dropped: list[str]) -> None:
        self._dropped += len(dropped)
        self._states_with_drops += 1
        # Warn at the 1st, 2nd, 4th, 8th ... such state: a run may meet it at every step.
        level = logging.WARNING if self._states_with_drops.bit_count() == 1 else logging.DEBUG
        logger.log(
            level,
            "A state has %d more unnumbered actions than the %d overflow ids: the search leaves "
            "out %s (%d states so far). Raise the vocabulary's capacity or overflow.",
            len(dropped),
            self.overflow,
            dropped,
            self._states_with_drops,
        )

    def id_of(self, action: str) -> int | None:
        """The action's id without taking it in; an overflow action's home id; None if it was never
        seen.
        """
        with self._lock:
            if action in self._ids:
                return self._ids[action]
            return self._ordinary + self._home(action) if action in self._overflow_actions else None

    def action_of(self, action_id: int) -> str | None:
        """Text of an ordinary id; None for an unused id and for an overflow id, which has no single
        meaning.
        """
        if not 0 <= action_id < self.capacity:
            raise ValueError(f"action id {action_id} is outside [0, {self.capacity})")
        return self._actions[action_id] if action_id < len(self._actions) else None

    @property
    def size(self) -> int:
        """Ordinary ids in use; they are `0 .. size-1`."""
        return len(self._actions)

    @property
    def used_mask(self) -> np.ndarray:
        """bool `[V]`: ids that were ever given to an action, overflow ids included."""
        mask = np.zeros(self.capacity, dtype=bool)
        mask[: len(self._actions)] = True
        mask[self._ordinary :] = self._overflow_used
        return mask

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        with self._lock:
            return {
                "kind": "stable",
                "capacity": self.capacity,
                "overflow": self.overflow,
                "actions": list(self._actions),
                "overflow_actions": sorted(self._overflow_actions),
                "overflow_used": np.flatnonzero(self._overflow_used).tolist(),
                "counters": [self._probed, self._dropped, self._states_with_drops],
            }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by a saved state.

        Raises:
            PriorZeroError: it was saved under other settings.
        """
        _check_saved(
            state, {"kind": "stable", "capacity": self.capacity, "overflow": self.overflow}
        )
        with self._lock:
            self._actions = list(state["actions"])
            self._ids = {action: i for i, action in enumerate(self._actions)}
            self._overflow_actions = set(state["overflow_actions"])
            self._overflow_used = np.zeros(self.overflow, dtype=bool)
            self._overflow_used[state["overflow_used"]] = True
            self._probed, self._dropped, self._states_with_drops = state["counters"]

    def copy(self) -> ActionVocabulary:
        """The same vocabulary; what is taken in by one is unknown to the other."""
        other = ActionVocabulary(self.capacity, self.overflow)
        other.load_state_dict(self.state_dict())
        return other

    def stats(self) -> dict[str, int]:
        """Counters: ids in use, overflow actions seen, moves from the home slot, actions left out,
        states hit.
        """
        return {
            "size": self.size,
            "overflow_actions": len(self._overflow_actions),
            "overflow_probed": self._probed,
            "dropped_actions": self._dropped,
            "states_with_drops": self._states_with_drops,
        }


class PositionalVocabulary:
    """LightZero's usual indexing: an action's id is its rank in the state's sorted valid actions.
    For comparison only.

    A state with more than `capacity` valid actions loses the last ones (`None`), counted and
    logged.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1
        self.capacity = capacity
        self.overflow = 0
        self._size = 0
        self._dropped = 0
        self._states_with_drops = 0

    def ids(self, actions: Sequence[str]) -> list[int | None]:
        """Rank of each action among `actions` sorted, in the order given; None from rank
        `capacity` on.
        """
        if len(set(actions)) != len(actions):
            raise ValueError(f"valid actions of a state must be distinct, got {list(actions)!r}")
        rank = {action: i for i, action in enumerate(sorted(actions))}
        self._size = max(self._size, min(len(actions), self.capacity))
        surplus = len(actions) - self.capacity
        if surplus > 0:
            self._dropped += surplus
            self._states_with_drops += 1
            level = logging.WARNING if self._states_with_drops.bit_count() == 1 else logging.DEBUG
            logger.log(
                level,
                "A state has %d valid actions but the vocabulary's capacity is %d: %d are left out "
                "of the search. Raise the capacity.",
                len(actions),
                self.capacity,
                surplus,
            )
        return [rank[action] if rank[action] < self.capacity else None for action in actions]

    def id_of(self, action: str) -> int | None:
        """Always None: an action has no id outside a state."""
        return None

    def action_of(self, action_id: int) -> str | None:
        """Always None: an id has no meaning outside a state."""
        if not 0 <= action_id < self.capacity:
            raise ValueError(f"action id {action_id} is outside [0, {self.capacity})")
        return None

    @property
    def size(self) -> int:
        """Most valid actions any state had so far (at most `capacity`)."""
        return self._size

    @property
    def used_mask(self) -> np.ndarray:
        """bool `[V]`: the first `size` ids."""
        return np.arange(self.capacity) < self._size

    def state_dict(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {
            "kind": "positional",
            "capacity": self.capacity,
            "overflow": 0,
            "size": self._size,
            "counters": [self._dropped, self._states_with_drops],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace everything by a saved state.

        Raises:
            PriorZeroError: it was saved under other settings.
        """
        _check_saved(state, {"kind": "positional", "capacity": self.capacity, "overflow": 0})
        self._size = state["size"]
        self._dropped, self._states_with_drops = state["counters"]

    def copy(self) -> PositionalVocabulary:
        """The same vocabulary; what is taken in by one is unknown to the other."""
        other = PositionalVocabulary(self.capacity)
        other.load_state_dict(self.state_dict())
        return other

    def stats(self) -> dict[str, int]:
        """Counters: ids in use, actions left out, states hit."""
        return {
            "size": self._size,
            "dropped_actions": self._dropped,
            "states_with_drops": self._states_with_drops,
        }


def _check_saved(state: dict[str, Any], expected: dict[str, Any]) -> None:
    differing = {
        key: (state.get(key), value) for key, value in expected.items() if state.get(key) != value
    }
    if differing:
        shown = ", ".join(
            f"{key}: saved {old!r}, now {new!r}" for key, (old, new) in differing.items()
        )
        raise PriorZeroError(
            f"the checkpoint's action vocabulary does not fit this run ({shown}). Ids decide what "
            "the policy's outputs mean, so they cannot be converted: resume with the saved "
            "settings or start a new experiment."
        )
