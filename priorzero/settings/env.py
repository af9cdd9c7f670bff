"""Settings of the games that are played."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.record import Rule, Settings, positive

OBSERVATION_PARTS = ("feedback", "look", "inventory")


@dataclass(kw_only=True)
class EnvSettings(Settings):
    """The game, its limits, and how many copies of it run."""

    env_id: str = "auto"
    """A story file's name (zork1.z5, detective.z5, …), a path, tw-simple, tw-cooking, tw-coin
    (options and seed after a colon: tw-coin:level=5,seed=3), or auto: zork1.z5 if it is found, else
    a TextWorld game."""
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

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
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
