"""Which games an LLM was trained on, as its folder says; and how that is told to whoever uses it on
one of them or on a relative.

A folder of ours holds `priorzero.json` with an entry `seen`: the games of a warm-up, of runs it was
exported from, and what their own base model had seen. A folder of others has none, and what its LLM
read nobody knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from priorzero.types import PriorZeroError

FACTS = "priorzero.json"


@dataclass(frozen=True, order=True)
class SeenGame:
    """One game of a training.

    Attributes:
        game: its identity, see `priorzero.games.families.Kinship`.
        family: its relatives' common name.
        by: what trained on it: "warm-up", or a run's folder.
    """

    game: str
    family: str
    by: str


@dataclass(frozen=True)
class Seen:
    """All games an LLM was trained on by this project; falsy where there is none."""

    games: tuple[SeenGame, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.games)

    def __or__(self, other: Seen) -> Seen:
        return Seen(tuple(sorted({*self.games, *other.games})))

    @property
    def families(self) -> tuple[str, ...]:
        """Sorted names."""
        return tuple(sorted({one.family for one in self.games}))

    def warning(self, game: str, family: str) -> str:
        """What has to be said where this LLM plays or is judged on a game.

        Args:
            game, family: of the game, see `priorzero.games.families.Kinship`.

        Returns:
            one sentence; "" where the LLM saw neither the game nor a relative.
        """
        same = [one for one in self.games if one.game == game]
        if same:
            by = ", ".join(sorted({one.by for one in same}))
            return f"THE LLM WAS TRAINED ON THIS GAME, {game} (by {by}): no result of an unseen one"
        relatives = sorted({one.game for one in self.games if one.family == family})
        if not relatives:
            return ""
        shown = "; ".join(relatives[:3]) + "; ..." * (len(relatives) > 3)
        return (
            f"THE LLM WAS TRAINED ON {len(relatives)} RELATIVES OF THIS GAME (family {family}: "
            f"{shown}), not on the game itself"
        )

    def as_list(self) -> list[dict[str, str]]:
        """For priorzero.json."""
        return [vars(one).copy() for one in self.games]


def seen_of(rows: Iterable[Mapping[str, Any]]) -> Seen:
    """Undo `Seen.as_list`."""
    return Seen(tuple(sorted({SeenGame(r["game"], r["family"], r["by"]) for r in rows})))


def read_seen(folder: str | Path) -> Seen:
    """What the LLM in a folder was trained on; nothing where the folder says nothing, or is the
    name of a hub's model.

    Raises:
        PriorZeroError: `priorzero.json` is damaged, so that it is not known.
    """
    path = Path(folder) / FACTS
    if not path.is_file():
        return Seen()
    try:
        return seen_of(json.loads(path.read_text(encoding="utf-8")).get("seen", ()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PriorZeroError(
            f"{path} is damaged ({error!r}), so it is not known which games this LLM was trained "
            "on; write the folder again (export or warm-up), or remove the file if you know"
        ) from error
