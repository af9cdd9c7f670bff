"""Which games a warm-up uses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from priorzero.games import tw_make
from priorzero.games.catalogue import resolve_game
from priorzero.games.families import FAMILIES, kinship
from priorzero.games.jericho_stories import STORIES
from priorzero.games.judging import JUDGING_GAMES, judging_only
from priorzero.games.records import GameSpec
from priorzero.games.story_files import list_stories
from priorzero.settings.warmup import WarmupSettings
from priorzero.types import PriorZeroError

FIRST_SEED = 1_000_000
"""Of generated games: seeds from here on are for training, those below for runs and reports."""


@dataclass(frozen=True)
class Choice:
    """What is used, and what is not.

    Attributes:
        games: in a fixed order, each once.
        left_out: name -> why.
    """

    games: tuple[GameSpec, ...]
    left_out: dict[str, str]


def choose_games(settings: WarmupSettings) -> Choice:
    """Everything that is named, less what results are judged on.

    Raises:
        PriorZeroError: a name is unknown, a game for judging was named, or nothing remains.
    """
    excluded = _excluded_families(settings.exclude)
    left_out: dict[str, str] = {}
    found: dict[str, GameSpec] = {}

    # Generators first: a game of an excluded one need not be built.
    wanted = list(_named(settings.games, left_out))
    kinds = [kind for kind in settings.textworld_kinds if kind not in excluded]
    left_out |= {
        kind: f"relative of {excluded[kind]}"
        for kind in settings.textworld_kinds
        if kind in excluded
    }
    wanted += generated_ids(settings.textworld, kinds, settings.seed) if kinds else []

    for name in wanted:
        game = resolve_game(name)
        kin = kinship(game)
        if judging_only(game):
            left_out[game.title] = "results are judged on it"
        elif kin.family in excluded:
            left_out[kin.game] = f"relative of {excluded[kin.family]}"
        elif not game.walkthrough:
            left_out[kin.game] = "no walkthrough"
        else:
            found.setdefault(kin.game, game)
    if not found:
        told = "; ".join(f"{name}: {why}" for name, why in left_out.items())
        raise PriorZeroError(
            f"no game is left to train on ({told or 'none was named'}); name other --games, or "
            "raise --textworld"
        )
    return Choice(tuple(found.values()), left_out)


def generated_ids(count: int, kinds: Sequence[str], seed: int) -> list[str]:
    """Ids of generated games, the kinds in turns, with options drawn from what each kind offers.

    Cooking games are of TextWorld's training split, whose ingredients its test split has not.
    """
    rng = np.random.default_rng(seed)
    ids = []
    for i in range(count):
        kind, number = kinds[i % len(kinds)], FIRST_SEED + 1000 * seed + i
        if kind == "tw-simple":
            rewards = rng.choice(["dense", "balanced", "sparse"])
            goal = rng.choice(["brief", "brief", "detailed", "none"])
            options = f"rewards={rewards},goal={goal}"
        elif kind == "tw-coin":
            options = f"level={rng.integers(3, 16)}"
        else:
            recipe = int(rng.integers(1, 4))
            rooms = rng.choice(["1", "6", "9"])
            options = (
                f"recipe={recipe},take={recipe},go={rooms},open={_flag(rng)},cook={_flag(rng)}"
            )
            options += f",cut={_flag(rng)},split=train"
        ids.append(f"{kind}:{options},seed={number}")
    return ids


def _flag(rng: np.random.Generator) -> str:
    return "true" if rng.random() < 0.5 else "false"


def _named(games: Iterable[str], left_out: dict[str, str]) -> Iterable[str]:
    """Ids of what the user named; of folders the story files in them.

    Raises:
        PriorZeroError: a game for judging was named, or a folder holds no story.
    """
    for name in games:
        folder = Path(name).expanduser()
        if not folder.is_dir():
            if judging_only(resolve_game(name)):
                raise PriorZeroError(
                    f"{name} is for judging only ({', '.join(JUDGING_GAMES)} are): no LLM is "
                    "trained on it. Leave it out of --games"
                )
            yield name
            continue

        stories = list(list_stories([folder]))
        if not stories:
            raise PriorZeroError(f"the folder {name} of --games holds no story file")
        for story in stories:
            try:
                resolve_game(str(story))
            except PriorZeroError as error:
                left_out[story.name] = str(error).splitlines()[0]
                continue
            yield str(story)


def _excluded_families(names: Iterable[str]) -> dict[str, str]:
    """Family -> the excluded game it comes from. Story files need not be at hand.

    Raises:
        PriorZeroError: nothing is known by a name.
    """
    families = {}
    titles = {settings.title: name for name, settings in STORIES.items()}
    for name in names:
        stem = Path(name).stem
        if name.partition(":")[0] in tw_make.GAMES:
            families[name.partition(":")[0]] = name
        elif stem in STORIES or name in titles:
            families[_family_of_story(titles.get(name, stem))] = name
        else:
            families[kinship(resolve_game(name)).family] = name
    return families


def _family_of_story(name: str) -> str:
    for family, names in FAMILIES.items():
        if name in names:
            return family
    return STORIES[name].title
