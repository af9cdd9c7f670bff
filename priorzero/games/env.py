"""A text adventure as a DI-engine environment, registered as `priorzero_text_game`.

Observations are dicts (see `TextGameEnv.reset`), actions are the command strings themselves. The
interpreter runs in a worker process: a hang or crash ends the episode as truncated, never the run.
"""

from __future__ import annotations

import copy
import logging
import time
from typing import Any

import numpy as np
from ding.envs import BaseEnv, BaseEnvTimestep
from ding.utils import ENV_REGISTRY
from easydict import EasyDict

from priorzero.games.ahead import ListingAhead, default_workers
from priorzero.games.catalogue import resolve_game
from priorzero.games.process import GameProcess
from priorzero.games.records import (
    GameSpec,
    GameState,
    StateDetails,
    WorkerFault,
    WorkerTimeout,
)
from priorzero.games.valid_actions import ValidActionCache, default_cache_path, shared_cache
from priorzero.settings.env import OBSERVATION_PARTS, EnvSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

SPLITS = ("train", "eval")
FIRST_SEED = 1_000  # Frotz treats smaller ones specially, and every walkthrough's seed is smaller
_COUNTERS = (
    "episodes",
    "steps",
    "hangs",
    "deaths",
    "state_hits",
    "state_misses",
    "state_shared",
    "fallback_states",
    "step_s",
    "describe_s",
    "wait_s",
    "reset_s",
)


def episode_seed(seed: int, env_index: int, episode: int, split: str) -> int:
    """The interpreter's seed of one episode, in [1000, 2**31): a pure function of its arguments.

    Evaluation seeds are odd and training seeds even, so the two never share an episode, whatever
    the run's seed. No seed equals a walkthrough's, which are all below 1,000; in particular run
    seed 0 does not mean the walkthrough.
    """
    words = np.random.SeedSequence((seed, env_index, episode)).generate_state(1, np.uint32)
    pair = (int(words[0]) % ((2**31 - FIRST_SEED) // 2)) * 2
    return FIRST_SEED + pair + (split == "eval")


@ENV_REGISTRY.register("priorzero_text_game")
class TextGameEnv(BaseEnv):
    """One game, one interpreter process. Nothing is started before the first `reset`.

    What a seed changes is the kind of game's matter: the random numbers of a Jericho game (fights,
    thieves), nothing in detective or in a game that TextWorld generated.

    If no valid action is known in a state that does not end the game (darkness, a scripted scene),
    `fallback_actions` are offered, counted in `stats()["fallback_states"]`.
    """

    config = {
        **EnvSettings().as_dict(),
        "split": "train",  # "train" or "eval": two disjoint sets of episode seeds
        "seed": 0,  # the run's seed, unless seed() is called
        "env_index": 0,  # tells environments of one run apart
        "extra_actions": [],  # commands offered in every state besides the valid ones
        "fallback_actions": ["look", "wait"],  # commands offered where there would be none
        "reset_attempts": 3,  # episodes tried, each with its own seed, before reset gives up
    }

    @classmethod
    def default_config(cls) -> EasyDict:
        """The settings as DI-engine asks for them."""
        return EasyDict({**copy.deepcopy(cls.config), "cfg_type": cls.__name__ + "Dict"})

    @staticmethod
    def create_collector_env_cfg(cfg: dict) -> list[dict]:
        """`collector_env_num` configs of split "train", told apart by `env_index`."""
        cfg = dict(cfg)
        return [
            EasyDict({**cfg, "split": "train", "env_index": i})
            for i in range(cfg.pop("collector_env_num"))
        ]

    @staticmethod
    def create_evaluator_env_cfg(cfg: dict) -> list[dict]:
        """`evaluator_env_num` configs of split "eval", told apart by `env_index`."""
        cfg = dict(cfg)
        return [
            EasyDict({**cfg, "split": "eval", "env_index": i})
            for i in range(cfg.pop("evaluator_env_num"))
        ]

    def __init__(self, cfg: dict | None = None) -> None:
        """Resolves the game; one that is generated is built here.

        Args:
            cfg: settings that differ from `config`.

        Raises:
            PriorZeroError: there is no such game, or it cannot be played.
        """
        self._cfg = EasyDict({**copy.deepcopy(self.config), **(cfg or {})})
        # What a user may set is checked by EnvSettings.
        assert set(self._cfg.observation_parts) <= set(OBSERVATION_PARTS), self._cfg
        assert self._cfg.split in SPLITS and self._cfg.fallback_actions, self._cfg

        assert isinstance(self._cfg.env_id, str), "an environment plays one game at a time"
        self._game = resolve_game(self._cfg.env_id, self._cfg.games_dir)
        self._max_steps = int(self._cfg.max_steps or self._game.max_steps)

        self._process = GameProcess(self._game.kind, self._game.path)
        self._ended_respawns, self._ended_spawn_s = 0, 0.0  # of other games' processes
        self._cache: ValidActionCache | None = None
        self._ahead: ListingAhead | None = None
        self._counts: dict[str, float] = dict.fromkeys(_COUNTERS, 0)

        # Text spaces have no gym equivalent that DI-engine understands; its managers accept None.
        self._observation_space = self._action_space = self._reward_space = None

        self.seed(int(self._cfg.seed), env_index=int(self._cfg.env_index))
        self._obs: dict[str, Any] | None = None

    observation_space = property(lambda self: self._observation_space)
    action_space = property(lambda self: self._action_space)
    reward_space = property(lambda self: self._reward_space)

    @property
    def game(self) -> GameSpec:
        """The game's settings; `game.goal` and `game.max_score` among them."""
        return self._game

    @property
    def max_steps(self) -> int:
        """Actions before an episode is truncated."""
        return self._max_steps

    @property
    def episode_seed(self) -> int:
        """The interpreter's seed of the current episode."""
        return self._episode_seed

    @property
    def next_episode(self) -> int:
        """The number of the episode that the next `reset` starts, from 0 since `seed`."""
        return self._episode + 1

    @property
    def ahead(self) -> ListingAhead | None:
        """What lists the states behind the present one; None where nothing does."""
        return self._ahead

    def use_state_cache(self, cache: ValidActionCache) -> None:
        """Take known states from `cache` instead of this process's shared one."""
        self._leave_ahead()
        self._cache = cache

    def play(self, game: GameSpec) -> None:
        """Play this game from the next `reset` on; episode seeds do not depend on it. Where it is
        another one, the present episode is over and its interpreter ends.
        """
        if game == self._game:
            return
        self._leave_ahead()
        self._ended_respawns += max(0, self._process.spawns - 1)
        self._ended_spawn_s += self._process.spawn_s
        self._process.close()

        self._game = game
        self._max_steps = int(self._cfg.max_steps or game.max_steps)
        self._process = GameProcess(game.kind, game.path)
        self._obs, self._running = None, False

    def seed(self, seed: int, dynamic_seed: bool = True, env_index: int | None = None) -> None:
        """Set the run's seed and start counting episodes anew; takes effect at the next `reset`.

        Args:
            seed: the run's. (DI-engine's managers pass `seed + index`.)
            dynamic_seed: False gives every episode the seed of the first.
            env_index: this environment's, apart from the seed so that run 0's second environment
                is not run 1's first; None: as in the settings.
        """
        self._seed = int(seed)
        self._dynamic_seed = dynamic_seed
        self._env_index = self._cfg.env_index if env_index is None else env_index
        self._episode = -1
        self._episode_seed = -1
        self._typed: list[str] = []

    def reset(self) -> dict[str, Any]:
        """Start the next episode; returns its first observation.

        Keys: `text` (str), `valid_actions` (sorted tuple of str, never empty unless the episode
        is over), `timestep` (int, actions taken so far), `score` (float, the game's),
        `state_hash` (str, of the world state).

        Raises:
            PriorZeroError: two fresh workers in a row failed the same way, or `reset_attempts`
                workers in a row hung or died.
        """
        self._obs = None
        last_way = ""
        for attempt in range(1, self._cfg.reset_attempts + 1):
            # A worker that has played before may be worn out; a fresh one tells about the game.
            fresh = self._process.pid is None
            try:
                return self._start_episode()
            except WorkerFault as fault:
                self._count_fault(fault, f"reset, attempt {attempt} of {self._cfg.reset_attempts}")
                last_fault = fault

            if fresh and last_fault.way and last_fault.way == last_way:
                raise PriorZeroError(
                    f"{self._game.env_id} cannot be played: its interpreter failed at the start,"
                    f" twice in a row by {last_way}. As a rule this is a fault of the"
                    f" {self._game.kind} interpreter with {self._game.path}, which no setting"
                    " mends: choose another game"
                ) from last_fault
            last_way = last_fault.way if fresh else ""

        raise PriorZeroError(
            f"{self._game.env_id} could not be started in {self._cfg.reset_attempts} attempts,"
            f" last: {last_fault}. Try a larger step_timeout_s ({self._cfg.step_timeout_s:g}) or"
            f" describe_timeout_s ({self._cfg.describe_timeout_s:g}), or another game"
        )

    def _start_episode(self) -> dict[str, Any]:
        """One attempt of `reset`, with a seed of its own. Raises WorkerFault."""
        start = time.perf_counter()
        self._episode += 1
        self._episode_seed = episode_seed(
            self._seed,
            self._env_index,
            self._episode if self._dynamic_seed else 0,
            self._cfg.split,
        )
        self._timestep, self._typed = 0, []
        self._running = True

        try:
            state = self._process.call(
                "reset", self._episode_seed, timeout_s=self._cfg.step_timeout_s
            )
            self._first_score = self._score = state.score
            self._obs = self._observe(state)
            self._look_ahead(state, self._obs["valid_actions"])
        finally:
            self._counts["reset_s"] += time.perf_counter() - start

        self._counts["episodes"] += 1
        return self._obs

    def step(self, action: str, listed_only: bool = True) -> BaseEnvTimestep:
        """Type `action`. Reward: the change of the game's score (float).

        Args:
            action: a command.
            listed_only: False types it whether or not it is among the present valid actions, as a
                person may.

        `info`: terminated, truncated (bool), done_kind ("running", "terminated", "truncated",
        "hang"), score, max_score, won, steps, fault (text or ""), and when done eval_episode_return
        (float, sum of the episode's rewards). After a fault of the worker (done_kind "hang",
        truncated) the observation is the previous one, since the next state is unknown, and the
        reward is 0.

        Raises:
            ValueError: `action` is not among the present valid actions; the game is untouched.
            RuntimeError: there is no episode under way.
        """
        if self._obs is None or not self._running:
            raise RuntimeError("step() outside an episode: call reset() first")
        if listed_only and action not in self._obs["valid_actions"]:
            raise ValueError(
                f"action {action!r} is not valid in the present state of {self._game.env_id} (step"
                f" {self._timestep}); valid are {list(self._obs['valid_actions'])}"
            )

        start = time.perf_counter()
        self._timestep += 1
        self._typed.append(action)
        if (ahead := self._ahead) is not None:
            ahead.typed(action)
        self._counts["steps"] += 1
        state: GameState | None = None
        fault_text = ""

        try:
            state = self._process.call("step", action, timeout_s=self._cfg.step_timeout_s)
            self._counts["step_s"] += time.perf_counter() - start
            obs = self._observe(state)
            self._look_ahead(state, obs["valid_actions"])
        except WorkerFault as fault:
            self._count_fault(fault, f"action {action!r} at step {self._timestep}")
            fault_text = str(fault)
            obs = {**self._obs, "timestep": self._timestep}
            state = None

        return self._timestep_record(obs, state, fault_text)

    def state_dict(self) -> dict[str, Any]:
        """The running episode as its seed and its commands, and what they led to; plain values.

        Interpreters cannot be written down, but the same commands from the same seed bring them
        back (`GameKind` promises it).
        """
        running = self._obs is not None and self._running
        return {
            "game": self._game.env_id,
            "episode": self._episode,
            "episode_seed": self._episode_seed,
            "commands": list(self._typed) if running else None,
            "text": self._obs["text"] if running else "",
            "state_hash": self._obs["state_hash"] if running else "",
            "score": self._obs["score"] if running else 0.0,
        }

    def replay(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """Bring the episode of a `state_dict` back by typing its commands again.

        Later episodes get the seeds they would have had, whether or not it comes back.

        Returns:
            the present observation; None where no episode was running, or where the commands led
            elsewhere, and the log says so.
        """
        self._episode, self._episode_seed = state["episode"], state["episode_seed"]
        self._obs, self._running = None, False
        if state["commands"] is None:
            return None

        try:
            obs, why = self._retype(state)
        except WorkerFault as fault:
            self._count_fault(fault, "the replay of a saved episode")
            obs, why = None, str(fault)
        if obs is None:
            logger.warning(
                "%s: the saved episode (seed %d, %d steps) did not come back and ends here, as "
                "truncated: %s",
                self._game.env_id,
                self._episode_seed,
                len(state["commands"]),
                why,
            )
            return None

        self._obs, self._running = obs, True
        return obs

    def _retype(self, state: dict[str, Any]) -> tuple[dict[str, Any] | None, str]:
        """The observation after the saved commands, or None and why. Raises WorkerFault."""
        limit = self._cfg.step_timeout_s
        game = self._process.call("reset", state["episode_seed"], timeout_s=limit)
        self._first_score = game.score
        self._typed = list(state["commands"])
        for number, command in enumerate(self._typed):
            if game.terminated:
                return None, f"the game ended after {number} steps"
            game = self._process.call("step", command, timeout_s=limit)
        if game.state_hash != state["state_hash"]:
            return None, "the same commands lead to another state of the game"

        self._timestep, self._score = len(self._typed), game.score
        if self._timestep >= self._max_steps:
            return None, f"env.max_steps is {self._max_steps} now"
        obs = self._observe(game)
        if (obs["text"], obs["score"]) != (state["text"], state["score"]):
            return None, "the same commands lead to another text"
        return obs, ""

    def _timestep_record(
        self, obs: dict[str, Any], state: GameState | None, fault: str
    ) -> BaseEnvTimestep:
        """Reward and info of one step; `state` is None after a fault."""
        if state is None:
            done_kind = "hang"
        elif state.terminated:
            done_kind = "terminated"
        else:
            done_kind = "truncated" if self._timestep >= self._max_steps else "running"

        reward = obs["score"] - self._score
        self._score = obs["score"]
        self._obs = obs
        self._running = done_kind == "running"

        info = {
            "terminated": done_kind == "terminated",
            "truncated": done_kind in ("truncated", "hang"),
            "done_kind": done_kind,
            "score": self._score,
            "max_score": self._game.max_score,
            "won": state is not None and state.won,
            "steps": self._timestep,
            "fault": fault,
        }
        if not self._running:
            info["eval_episode_return"] = float(self._score - self._first_score)
        return BaseEnvTimestep(obs, float(reward), not self._running, info)

    def _observe(self, state: GameState) -> dict[str, Any]:
        details = state.details if state.details is not None else self._details(state.state_hash)
        actions = details.valid_actions

        if not state.terminated:
            if not actions:
                self._counts["fallback_states"] += 1
                actions = tuple(sorted(set(self._cfg.fallback_actions)))
            if self._cfg.extra_actions:
                actions = tuple(sorted({*actions, *self._cfg.extra_actions}))

        return {
            "text": compose_text(state, details, self._cfg.observation_parts),
            "valid_actions": actions,
            "timestep": self._timestep,
            "score": state.score,
            "state_hash": state.state_hash,
        }

    def _details(self, state_hash: str) -> StateDetails:
        """From the cache, else from the worker; only a miss costs a round trip."""
        start = time.perf_counter()
        details, how = self._states().get_or_list(
            self._game.story_key, state_hash, self._list_present
        )

        if how == "listed":
            self._counts["state_misses"] += 1
            return details
        self._counts["state_hits"] += 1
        if how == "shared":
            self._counts["state_shared"] += 1
            self._counts["wait_s"] += time.perf_counter() - start
        if (ahead := self._ahead) is not None:
            ahead.asked_for(state_hash)
        return details

    def _list_present(self) -> StateDetails:
        start = time.perf_counter()
        try:
            return self._process.call("describe", timeout_s=self._cfg.describe_timeout_s)
        finally:
            self._counts["describe_s"] += time.perf_counter() - start

    def _states(self) -> ValidActionCache:
        """The cache of known states."""
        if self._cache is None:
            path = self._cfg.action_cache
            self._cache = shared_cache(default_cache_path() if path == "auto" else path)
        return self._cache

    def _look_ahead(self, state: GameState, actions: tuple[str, ...]) -> None:
        """Offer the states that `actions` lead to for listing. Raises WorkerFault."""
        workers = self._cfg.listing_workers
        workers = default_workers() if workers is None else workers
        # States that come with their details, or that nothing comes behind, need no listing.
        if not workers or state.details is not None or self._timestep >= self._max_steps:
            return

        if (ahead := self._ahead) is None:
            ahead = self._ahead = ListingAhead.join(
                self._game,
                self._states(),
                workers,
                step_timeout_s=self._cfg.step_timeout_s,
                describe_timeout_s=self._cfg.describe_timeout_s,
            )
        if not ahead.wants(state.state_hash):
            return
        snapshot = self._process.call("snapshot", timeout_s=self._cfg.step_timeout_s)
        if snapshot is not None:
            ahead.offer(id(self), state.state_hash, snapshot, actions)

    def _leave_ahead(self) -> None:
        # Another thread may be in `step`: it goes on with what it has in hand.
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.leave()

    def _count_fault(self, fault: WorkerFault, where: str) -> None:
        self._counts["hangs" if isinstance(fault, WorkerTimeout) else "deaths"] += 1
        logger.warning(
            "%s: the interpreter failed at %s (seed %d); its worker is replaced: %s",
            self._game.env_id,
            where,
            self._episode_seed,
            fault,
        )

    def stats(self) -> dict[str, float]:
        """Counters since construction: episodes, steps, hangs (time limit), deaths (crashes),
        respawns, state_hits and state_misses (lookups of valid actions), state_shared (the hits
        that waited for a list that was being made, `wait_s` seconds), fallback_states, and seconds
        spent in step_s, describe_s, reset_s and spawn_s.
        """
        return {
            **self._counts,
            "respawns": self._ended_respawns + max(0, self._process.spawns - 1),
            "spawn_s": self._ended_spawn_s + self._process.spawn_s,
        }

    def interrupt(self) -> None:
        """From another thread: end a `step` or `reset` under way, as if the worker had died."""
        self._process.interrupt()
        self._leave_ahead()

    def close(self) -> None:
        """End the interpreter process; `reset` would start a new one."""
        self._leave_ahead()
        self._process.close()
        self._obs = None

    def __repr__(self) -> str:
        return (
            f"TextGameEnv({self._game.env_id}, {self._game.kind}, split={self._cfg.split},"
            f" env_index={self._cfg.env_index})"
        )


def compose_text(
    state: GameState, details: StateDetails, parts: list[str] | tuple[str, ...]
) -> str:
    """The observation's text, without saying anything twice.

    What the game answered, then room and inventory unless the answer already says them. After the
    end of a game there is the answer only.

    Args:
        parts: which of `OBSERVATION_PARTS` to use.
    """
    if state.terminated:
        return state.feedback

    sources = {
        "feedback": state.feedback,
        "look": details.look,
        "inventory": details.inventory,
    }
    texts: list[str] = []
    for name in OBSERVATION_PARTS:
        text = sources[name].strip()
        if name not in parts or not text or any(_flat(text) in _flat(seen) for seen in texts):
            continue

        # A visited room answers with its name alone, with which the full description starts.
        texts = [seen for seen in texts if not _flat(text).startswith(_flat(seen))]
        texts.append(text)
    return "\n".join(texts)


def _flat(text: str) -> str:
    return " ".join(text.split())
