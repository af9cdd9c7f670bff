"""Settings of the games that are played."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from priorzero.settings.record import Rule, Settings, positive

OBSERVATION_PARTS = ("feedback", "look", "inventory")
SUITE = "jericho-suite"
"""The `env_id` of all story files that are found, but for the judging games."""


def plain_name(env_id: str) -> str:
    """A game's name in metrics, folders and texts: `detective` of games/detective.z5,
    `tw-coin-level-5-seed-3` of tw-coin:level=5,seed=3.
    """
    stem = env_id.replace("\\", "/").rsplit("/", 1)[-1].rsplit(".z", 1)[0]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem)


def split_games(text: str) -> list[str]:
    """The games of a text with commas between them. The commas between a generated game's options
    are its own: `tw-coin:level=5,seed=3,zork1.z5` names two games.
    """
    games: list[str] = []
    for part in text.split(","):
        if games and ":" in games[-1] and ":" not in part and "=" in part:
            games[-1] += f",{part}"
        else:
            games.append(part.strip())
    return games


def one_or_several(games: Sequence[str]) -> str | list[str]:
    """Games as `env.env_id` takes them: a single one by itself."""
    return games[0] if len(games) == 1 else list(games)


def in_words(games: Sequence[str]) -> str:
    """Games under one heading: up to three by name, more by their number."""
    return " + ".join(games) if len(games) <= 3 else f"{len(games)} games"


def run_name(env_id: str | Sequence[str]) -> str:
    """Games as part of a folder's name: the first three, and how many more."""
    names = [plain_name(one) for one in ([env_id] if isinstance(env_id, str) else env_id)]
    more = [f"{len(names) - 3}-more"] if len(names) > 3 else []
    return "-and-".join([*names[:3], *more])


@dataclass(kw_only=True)
class EnvSettings(Settings):
    """The game, its limits, and how many copies of it run."""

    env_id: str | list[str] = "auto"
    """A story file's name (zork1.z5, detective.z5, …), a path, tw-simple, tw-cooking, tw-coin
    (options and seed after a colon: tw-coin:level=5,seed=3), or auto: zork1.z5 if it is found, else
    a TextWorld game. A list trains one agent on several games; jericho-suite stands for all story
    files that are found, but for the six games that results are judged on."""
    game_weights: list[float] | None = None
    """Of several games, one each: an episode's game is drawn in proportion to them. None: each
    environment plays the games in turn, so that all get the same number of episodes."""
    eval_env_id: str | list[str] | None = None
    """Games that evaluation plays, named like env_id, also such as are not trained on. None: those
    that are. Which checkpoint is best is told by those among them that are trained on; without any
    no checkpoint is marked as the best."""
    max_steps: int | None = None
    """Steps after which an episode is truncated; None: as the game's catalogue entry says."""
    observation_parts: list[str] = field(default_factory=lambda: list(OBSERVATION_PARTS))
    """What an observation text is made of: feedback, look, inventory (the last two cost no game
    turn)."""
    step_timeout_s: float = 20.0
    """Seconds one step of the interpreter may take before its process is killed and the episode
    truncated."""
    describe_timeout_s: float = 120.0
    """The same for listing the valid actions of a state never seen before."""
    action_cache: str | None = "auto"
    """SQLite file of the valid actions of all states met, which runs share; auto: in the cache
    folder ($PRIORZERO_CACHE); None: in memory only. `python -m priorzero.games.cache` carries it
    from machine to machine."""
    listing_workers: int | None = None
    """Processes that list the valid actions of states one step ahead while environments wait for
    their turn; None: half the cores, at most 16, and 0 on a machine of fewer than 8. What is
    played does not depend on it."""
    collector_env_num: int = 8
    """Environments stepped together by the collector."""
    evaluator_env_num: int = 3
    """Environments stepped together by the evaluator."""
    n_evaluator_episode: int = 3
    """Evaluation episodes per mode."""
    games_dir: str | None = None
    """Folder of story files looked into before $PRIORZERO_GAMES and ./games."""

    @property
    def several(self) -> bool:
        """Whether training plays several games, so that they have to be told apart."""
        return self.env_id == SUITE or (isinstance(self.env_id, list) and len(self.env_id) > 1)

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        for name in ("env_id", "eval_env_id"):
            games = getattr(self, name)
            if isinstance(games, list):
                text = "it must name at least one game, and none twice by the same plain name"
                names = [plain_name(one) for one in games]
                yield Rule(name, 0 < len(set(names)) == len(names), text)

        if self.game_weights is not None:
            games = self.env_id if isinstance(self.env_id, list) else [self.env_id]
            fits = SUITE not in games and len(games) == len(self.game_weights)
            yield Rule(
                "game_weights",
                fits and all(weight > 0 for weight in self.game_weights),
                f"it must be None or one positive weight for each game of env_id {self.env_id} "
                f"(and {SUITE} does not say how many it is)",
            )

        yield from positive(
            self,
            "step_timeout_s",
            "describe_timeout_s",
            "collector_env_num",
            "evaluator_env_num",
            "n_evaluator_episode",
        )

        yield Rule(
            "listing_workers",
            self.listing_workers is None or self.listing_workers >= 0,
            "it must not be negative, or None",
        )
        yield Rule(
            "max_steps",
            self.max_steps is None or self.max_steps > 0,
            "it must be positive or None",
        )
        yield Rule(
            "observation_parts",
            bool(self.observation_parts) and set(self.observation_parts) <= set(OBSERVATION_PARTS),
            f"it must name at least one of {', '.join(OBSERVATION_PARTS)}",
        )
