"""Which games are relatives: they share a world, puzzles or words, so that an LLM which has seen
one of them has not met the other for the first time.

A family is a name. Two games with the same one are relatives; a story that stands in no family here
is a family of its own, by its title. Games that TextWorld generates are relatives where the same
generator made them. Where it was in doubt whether two stories are relatives they count as such:
that costs training data, the opposite would cost an honest result.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from priorzero.games import tw_make
from priorzero.games.jericho_stories import STORIES
from priorzero.games.records import GameSpec

FAMILIES: dict[str, tuple[str, ...]] = {
    # One world: Infocom's Great Underground Empire, the Enchanter trilogy and Wishbringer in it
    # (hg101.kontek.net/zork, mobygames.com/game-group/zork-universe), Activision's text sequel, and
    # three tributes with Enchanter's spells (intfiction.org/t/54162 names two of them).
    "Zork and Enchanter": (
        "zork1",
        "zork2",
        "zork3",
        "ztuu",
        "enchanter",
        "sorcerer",
        "spellbrkr",
        "wishbringer",
        "spirit",
        "balances",
        "sherbet",
    ),
    # Colossal Cave, and two treasure hunts that were made in its image.
    "Adventure": ("advent", "adventureland", "murdac"),
    # Inhumane is a parody of Infidel: the same pyramid, the other way round.
    "Infidel": ("infidel", "inhumane"),
}
"""Family -> Jericho's names of its stories."""

_FAMILY_OF_TITLE = {
    STORIES[name].title: family
    for family, names in FAMILIES.items()
    for name in names
    if name in STORIES
}


@dataclass(frozen=True)
class Kinship:
    """What a game is, and whom it resembles; both independent of where its file lies.

    Attributes:
        game: of a story Jericho's title, of a generated game its id with every option spelled out,
            of another TextWorld story its file's name.
        family: see the module.
    """

    game: str
    family: str


def kinship(game: GameSpec) -> Kinship:
    """Identity and family of a game."""
    name = game.env_id.partition(":")[0]
    if name in tw_make.GAMES:
        return Kinship(tw_make.canonical_id(*tw_make.parse_id(game.env_id)), name)
    if game.kind == "textworld":
        return Kinship(Path(game.path).name, "textworld")
    return Kinship(game.title, _FAMILY_OF_TITLE.get(game.title, game.title))
