"""An action's id means the same command in the learner and in every worker, at any time.

There is one list of commands, in an actor of its own beside the learner, and a command's id is its
place there. Lists only grow at their end, so that whoever has copied a beginning of it knows those
ids for good: learner and workers hold beginnings of different lengths that never contradict each
other. A worker that meets an unknown command asks the list for its place before it plans, and
learns of the others' commands with the answer. So nothing is ever renumbered: neither the segments
that a worker sends, nor those it still writes, nor its search's contexts.

Once the list is full, commands share the overflow ids by a rule that needs no list
(`ActionVocabulary`); it begins for a process when it knows the whole list.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from priorzero.text.vocabulary import ActionVocabulary

# (how many one knows, commands to take in) -> all that stand behind those in the list
Extend = Callable[[int, Sequence[str]], Sequence[str]]


class ActionList:
    """The list.

    Args:
        actions: it begins with.
        most: it may hold.
    """

    def __init__(self, actions: Sequence[str], most: int) -> None:
        assert len(set(actions)) == len(actions) <= most
        self._actions, self._known, self._most = list(actions), set(actions), most

    def extend(self, known: int, wanted: Sequence[str]) -> list[str]:
        """See `Extend`; commands for which there is no place are left out."""
        for action in wanted:
            if action not in self._known and len(self._actions) < self._most:
                self._actions.append(action)
                self._known.add(action)
        return self._actions[known:]


class SharedVocabulary(ActionVocabulary):
    """An `ActionVocabulary` that has its ordinary ids from an `ActionList`.

    Args:
        capacity, overflow: as of the learner's.
        extend: of the list.
    """

    def __init__(self, capacity: int, overflow: int, extend: Extend) -> None:
        super().__init__(capacity, overflow)
        self._extend = extend

    def ids(self, actions: Sequence[str]) -> list[int | None]:
        """As `ActionVocabulary.ids`; also takes in what others have named since."""
        unknown = [action for action in actions if action not in self._ids]
        if unknown and self.size < self._ordinary:
            news = self._extend(self.size, unknown)
            if news:
                super().ids(news)
        return super().ids(actions)
