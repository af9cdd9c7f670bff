"""The parts of a run, as the loop sees them. `build` in `priorzero_orz_entry.py` makes them.

Who talks to whom: the collector plays (environments, the policy's collect mode, the LLM's prior)
and fills the buffer; `policy.learn_mode` trains the world model from the buffer; the LLM's phase
trains the LLM from the same buffer and publishes its weights to the engine behind the prior; the
evaluator plays with what both have learned.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from priorzero.data.archive import SegmentArchive
from priorzero.data.batch import WorldModelBatch
from priorzero.data.segment import Segment, StepRecord
from priorzero.decisions.recorder import Recorder
from priorzero.games.catalogue import GameSpec
from priorzero.games.families import kinship
from priorzero.games.group import GameEnvGroup
from priorzero.llm.build import LLMParts
from priorzero.llm.seen import Seen, SeenGame
from priorzero.llm.update.groups import Rate
from priorzero.llm.update.samples import LLMSample
from priorzero.loop.background import Background
from priorzero.loop.progress import History, Progress
from priorzero.play.players import Player
from priorzero.play.results import CollectResult, EvalResult, Totals
from priorzero.ranks import ALONE, Ranks
from priorzero.run.checkpoint import CheckpointStore
from priorzero.run.metrics import MetricsWriter, NoMetrics, PeakMemory, Stopwatch
from priorzero.settings.experiment import ExperimentSettings
from priorzero.text.encoder import SentenceEncoder


class Schedule(Protocol):
    """`HybridTrainingConfig`: how long, how often, in which order."""

    wm_training_mode: str
    wm_train_freq: int
    llm_train_freq: int
    sequential_wm_updates: int
    sequential_llm_phases: int
    sequential_repeat: bool
    alternating_wm_updates: int
    alternating_llm_phases: int
    alternating_first: str
    alternating_llm_collect: str
    off_policy_degree: int
    async_eval: bool
    llm_only_episodes: int
    iterations: int
    eval_freq: int
    save_freq: int
    sample_prompt_freq: int

    def as_dict(self) -> dict[str, Any]: ...


class Policy(Protocol):
    """`PriorZeroPolicy`: the world model, its training and its search."""

    learn_mode: Any
    vocabulary: Any
    acting_version: int

    def calibrate(self, steps: Sequence[StepRecord]) -> dict[str, float]: ...

    def snapshot(self) -> Policy: ...

    def act_apart(self, version: int) -> None: ...

    def offer_weights(self, version: int) -> None: ...

    def meet(self, ranks: Ranks) -> None: ...

    def reanalyse(
        self, batch: WorldModelBatch, env_steps: int
    ) -> tuple[WorldModelBatch, dict[str, float]]: ...


class Buffer(Protocol):
    """`PriorZeroGameBuffer`: segments in; world-model batches and LLM samples out."""

    def push_game_segments(self, segments: Sequence[Segment]) -> None: ...

    def remove_oldest_data_to_fit(self) -> int: ...

    def get_num_of_transitions(self) -> int: ...

    def sample(self, batch_size: int) -> WorldModelBatch: ...

    def update_priority(self, indices: np.ndarray, priorities: np.ndarray) -> None: ...

    def sample_llm(self, count: int, recent: int | None = None) -> list[LLMSample]: ...

    def newest_scored(self, count: int) -> list[StepRecord]: ...

    def sample_episodes(self, count: int, recent: int, rate: Rate) -> list[LLMSample]: ...

    def numbered_segments(self) -> Iterable[tuple[int, Segment]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any], segments: Mapping[int, Segment]) -> int: ...


class Collector(Protocol):
    """`PriorZeroCollector`, or `RemoteCollector` (`priorzero/collectors/remote.py`)."""

    async def collect(
        self,
        num_segments: int,
        env_steps: int,
        temperature: float,
        player: Player = "search",
        new_episodes: int | None = None,
    ) -> CollectResult: ...

    def totals(self) -> Totals: ...

    def state_dict(self) -> dict[str, Any]: ...

    async def resume(self, state: Mapping[str, Any]) -> int: ...


class Evaluator(Protocol):
    """`PriorZeroEvaluator`."""

    def playing(self, policy: Policy) -> Evaluator: ...

    async def evaluate(
        self, mode: str, episodes: int, env_steps: int, label: str = ""
    ) -> EvalResult: ...


@dataclass
class Parts:
    """Everything a loop works with.

    config: the schedule. settings: of all parts. folder: where everything of the run is written.
    eval_only: the run evaluates a checkpoint and leaves the training run's files alone. device: of
    the world model. games, eval_games: that are trained on, and evaluated. llm: None for pure
    UniZero. collect_envs: None where collectors in other processes have them. ranks: the processes
    of a data-parallel run.
    """

    config: Schedule
    settings: ExperimentSettings
    folder: Path
    eval_only: bool
    device: str
    games: tuple[GameSpec, ...]
    eval_games: tuple[GameSpec, ...]

    encoder: SentenceEncoder
    policy: Policy
    buffer: Buffer
    llm: LLMParts | None
    collect_envs: GameEnvGroup | None
    collector: Collector
    evaluator: Evaluator
    recorder: Recorder

    metrics: MetricsWriter | NoMetrics
    watch: Stopwatch
    checkpoints: CheckpointStore
    archive: SegmentArchive
    closing: AsyncExitStack

    progress: Progress = field(default_factory=Progress)
    history: History = field(default_factory=History)
    background: Background = field(default_factory=Background)
    ranks: Ranks = ALONE
    memory: PeakMemory = field(default_factory=PeakMemory)
    started: float = field(default_factory=time.time)

    @property
    def game(self) -> GameSpec:
        """The first of the games; in most runs the only one."""
        return self.games[0]

    @property
    def game_names(self) -> list[str]:
        """What the games are asked for by."""
        return [game.env_id for game in self.games]

    @property
    def llm_name(self) -> str:
        """Model and engine in words."""
        return self.llm.name if self.llm is not None else "none (pure UniZero)"

    @property
    def llm_warning(self) -> str:
        """That the LLM had been trained on these games or relatives before the run; else ""."""
        games = self.games + self.eval_games
        return seen_warning(games, self.llm.seen) if self.llm is not None else ""

    @property
    def llm_seen(self) -> Seen:
        """Games the LLM has been trained on by now."""
        if self.llm is None:
            return Seen()
        if not self.progress.llm_version:
            return self.llm.seen
        kin, source = map(kinship, self.games), str(self.folder.resolve())
        return self.llm.seen | Seen(tuple(SeenGame(k.game, k.family, source) for k in kin))

    async def close(self) -> None:
        """End engine, interpreters and writers, newest first."""
        await self.closing.aclose()

    async def __aenter__(self) -> Parts:
        return self

    async def __aexit__(self, *_) -> None:
        await self.close()


def seen_warning(games: Iterable[GameSpec], seen: Seen) -> str:
    """See `Seen.warning`: what it says of these games, each thing once."""
    kin = map(kinship, games)
    told = dict.fromkeys(seen.warning(k.game, k.family) for k in kin)
    return "; ".join(warning for warning in told if warning)
