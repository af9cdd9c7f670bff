"""One action vocabulary for several processes: whichever meets an action first gives it its id.

Ids are numbered through in a store that all processes reach, so an id means the same action in
each of them. A process knows a prefix of all ids at any time, those it was not the first to meet
included: before it uses an id it takes in all below it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from priorzero.settings.policy import VocabularySettings
from priorzero.text.vocabulary import ActionVocabulary


class Store(Protocol):
    """A `torch.distributed.Store`."""

    def add(self, key: str, amount: int) -> int:
        """Add to a number that begins at 0; returns what it is then."""
        ...

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes:
        """Waits for a value that is not set yet."""
        ...


class SharedVocabulary(ActionVocabulary):
    """See the module.

    Args:
        settings: of the vocabulary.
        store: that of all processes. What all of them load from a checkpoint is not in it.
    """

    def __init__(self, settings: VocabularySettings, store: Store) -> None:
        super().__init__(settings.capacity, settings.overflow)
        self._store = store
        self._loaded = 0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `ActionVocabulary.load_state_dict`; all processes load the same, before they play."""
        super().load_state_dict(state)
        self._loaded = len(self._actions)

    def catch_up(self, used: np.ndarray) -> None:
        """Take in all ids that were given so far.

        Args:
            used: `[V]` bool, ids that are used in any process; of the overflow ids it counts.
        """
        with self._lock:
            self._take_in(self._loaded + self._store.add("given", 0))
            self._overflow_used |= used[self._ordinary :]

    def _ordinary_id(self, action: str) -> int | None:
        if action not in self._ids and len(self._actions) < self._ordinary:
            self._take_in(self._number(action) + 1)
        # Known now, unless all ids are used up.
        return super()._ordinary_id(action)

    def _number(self, action: str) -> int:
        """In the order of first sight by any process; from `_ordinary` on it is no id."""
        name = action.encode("utf-8", "surrogatepass").hex()
        if self._store.add(f"claimed {name}", 1) > 1:
            return int(self._store.get(f"number {name}"))
        number = self._loaded + self._store.add("given", 1) - 1
        self._store.set(f"action {number}", name)
        self._store.set(f"number {name}", str(number))
        return number

    def _take_in(self, count: int) -> None:
        """All actions of the first `count` numbers that are ids."""
        for number in range(len(self._actions), min(count, self._ordinary)):
            name = self._store.get(f"action {number}").decode()
            action = bytes.fromhex(name).decode("utf-8", "surrogatepass")
            self._ids[action] = number
            self._actions.append(action)
