"""The learner's collector where workers play: hands out weights and work, takes in what was played.

A round is one call of `collect`: every worker gets its part of the segments and the newest weights,
and the round is over when all have answered. Nobody plays between two rounds, so that with workers
collection and training take turns as without them, and `off_policy_degree` lets them overlap in the
same way.

A worker whose process dies, that raises or does not answer in time is given up with its running
episodes; another one begins in its place and plays the same part.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import ray
import ray.exceptions

from priorzero.collectors.messages import Order, Reply, Share, unpack_played
from priorzero.collectors.vocabulary import ActionList
from priorzero.collectors.worker import CollectWorker
from priorzero.data.packing import Pool, pack, unpack
from priorzero.data.segment import Segment
from priorzero.play.played import Played
from priorzero.play.players import Player
from priorzero.play.results import CollectResult, Totals
from priorzero.ray_link import counted
from priorzero.run.metrics import Stopwatch
from priorzero.settings.collectors import CollectorSettings
from priorzero.text.vocabulary import ActionVocabulary
from priorzero.types import PriorZeroError

if TYPE_CHECKING:
    from priorzero.llm.build import LLMParts
    from priorzero.text.encoder import SentenceEncoder

logger = logging.getLogger(__name__)
T = TypeVar("T")

_ROOT = Path(__file__).resolve().parents[2]  # where the workers find this package
_CLOSE_S = 10.0  # for idle workers to end their interpreters
_LONGEST = 200  # characters of a line of a message
_POOLED = 200_000  # values that received steps share, before they are forgotten
_MEANS = ("_rate", "_spared")  # totals that are shares, of which a sum says nothing


@dataclass(eq=False)
class _Seat:
    """A worker's place, which the next one takes when it dies.

    Attributes:
        share: of the present worker.
        actor: Ray's handle; None before it is started.
        facts: host, process and node.
        world_model, llm: versions of the weights it has; -1: its own.
        numbers: of its running episodes in the run, by its own numbers.
        totals: it told last.
        seconds: of its last round.
        failures: of workers on this seat since one finished a round.
    """

    share: Share
    actor: Any = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    world_model: int = -1
    llm: int = -1
    numbers: dict[int, int] = field(default_factory=dict)
    totals: Totals | None = None
    seconds: float = 0.0
    failures: int = 0

    @property
    def name(self) -> str:
        """For messages."""
        where = "{host}, process {pid}".format(**self.facts) if self.facts else "not started"
        return f"collector worker {self.share.number} ({where})"


class RemoteCollector:
    """See the module. A collector as `priorzero.loop.parts` wants it; this process is in a Ray
    cluster already (`priorzero.ray_link`).

    Args:
        settings: the `collectors` group.
        make, plan: see `CollectWorker`.
        workers: how many.
        environments: of all together.
        policy: the learner's; its weights and its vocabulary are handed out.
        encoder: the learner's, whose totals are told with the workers'.
        llm: the learner's; None for pure UniZero.
        seed: the run's.
        watch: where the workers' seconds are added, as means over them.
        several_games: whether figures are told by game.

    Raises:
        PriorZeroError: the cluster has too little room.
    """

    def __init__(
        self,
        settings: CollectorSettings,
        make: str,
        plan: Mapping[str, Any],
        *,
        workers: int,
        environments: int,
        policy: Any,
        encoder: SentenceEncoder,
        llm: LLMParts | None,
        seed: int,
        watch: Stopwatch | None = None,
        several_games: bool = False,
    ) -> None:
        self._settings, self._make, self._plan = settings, make, plan
        self._policy, self._encoder, self._llm = policy, encoder, llm
        self.watch = watch or Stopwatch()
        self._several_games = several_games
        self._lives = 0
        self._seats = [
            _Seat(Share(number, first, count, environments, 0, settings.worker_gpus, seed))
            for number, (first, count) in enumerate(_parts(environments, workers))
        ]

        self._actions: Any = None  # the `ActionList`'s handle
        self._newest = (-1, None)  # version and reference of the world model's weights
        self._handed_out: dict[str, np.ndarray] = {}
        self._newest_llm = (-1, None)
        self._sent_bytes = 0
        self._pool: Pool = {}
        self._episodes = 0
        self._cut: list[Segment] = []  # of episodes that ran in this process; due next
        self._gone: list[Totals] = []  # of workers that died
        self._deaths = 0

        self._require_room()
        if llm is not None:
            llm.phase.follow(self._take_llm)

    def _require_room(self) -> None:
        resources = ray.cluster_resources()
        for name, each in (
            ("CPU", self._settings.worker_cpus),
            ("GPU", self._settings.worker_gpus),
        ):
            needed = each * len(self._seats)
            if needed > resources.get(name, 0.0):
                raise PriorZeroError(
                    f"{len(self._seats)} collector workers need {needed:g} of Ray's resource "
                    f"{name}, and the cluster has {counted(resources)}: take fewer workers, lower "
                    f"collectors.worker_{name.lower()}s, or join more machines"
                )

    @property
    def workers(self) -> list[Mapping[str, Any]]:
        """Where the workers are: host, pid and node of each."""
        return [seat.facts for seat in self._seats]

    # ---- a round ---------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start all workers that are not there, and wait until they can play.

        Raises:
            PriorZeroError: a game or model is missing where one lives, or there is no room.
        """
        missing = [seat for seat in self._seats if seat.actor is None]
        await _all(self._ready(seat) for seat in missing)
        if missing:
            places = ", ".join(f"{s.facts['host']} {s.facts['pid']}" for s in self._seats)
            logger.info("%d collector workers play (%s)", len(self._seats), places)

    async def collect(
        self,
        num_segments: int,
        env_steps: int,
        temperature: float,
        player: Player = "search",
        new_episodes: int | None = None,
    ) -> CollectResult:
        """As `PriorZeroCollector.collect`; segments and new episodes are split over the workers.

        Raises:
            PriorZeroError: a fault that another worker would have too, workers die again and
                again, or the list of actions is gone.
        """
        await self.start()
        version = await asyncio.to_thread(self._hand_out)
        n = len(self._seats)
        segments = [count for _, count in _parts(num_segments, n)]
        begin = [None] * n
        if new_episodes is not None:
            begin = [count for _, count in _parts(new_episodes, n)]
        replies = await _all(
            self._round(seat, Order(due, env_steps, temperature, player, new, version))
            for seat, due, new in zip(self._seats, segments, begin, strict=True)
        )

        played = Played(env_steps, self._cut)
        self._cut = []
        for seat, reply in zip(self._seats, replies, strict=True):
            played.join(self._received(seat, reply, env_steps))
        await self._take_in_actions(played.segments)

        running = sum(len(seat.numbers) for seat in self._seats)
        result = played.result(running=running, by_game=self._several_games)
        ages = [version - begun for reply in replies for begun in reply.versions]
        if ages:
            result.collect["staleness_mean"] = float(np.mean(ages))
            result.collect["staleness_max"] = float(max(ages))
        return result

    async def _round(self, seat: _Seat, order: Order) -> Reply:
        """What the worker on this seat plays; where it dies, what the next one does."""
        while True:
            await self._ready(seat)
            started = time.perf_counter()
            try:
                reply = await self._ask(seat, order)
            except _FAILURES as error:
                self._give_up(seat, error)
                continue
            seat.seconds, seat.failures = time.perf_counter() - started, 0
            return reply

    async def _ask(self, seat: _Seat, order: Order) -> Reply:
        (version, weights), (llm_version, llm_weights) = self._newest, self._newest_llm
        world_model = weights if seat.world_model != version else None
        llm = llm_weights if seat.llm != llm_version else None
        asked = seat.actor.play.remote(order, world_model, llm, self._actions)
        reply = await self._answer(seat, asked, self._settings.timeout_s)
        seat.world_model, seat.llm = version, llm_version
        return reply

    def _received(self, seat: _Seat, reply: Reply, env_steps: int) -> Played:
        """What a worker played, under the run's numbers of environments and episodes."""
        for level, name, message in reply.told:
            logger.log(level, "%s, %s: %s", seat.name, name, message)
        for stage, seconds in reply.seconds.items():
            self.watch.seconds[stage] += seconds / len(self._seats)
        seat.totals = reply.totals

        if len(self._pool) > _POOLED:
            self._pool.clear()
        played = unpack_played(reply.played, env_steps, self._pool)
        for segment in played.segments:
            segment.env_id += seat.share.first
            segment.episode_id = self._number(seat, segment.episode_id)
        seat.numbers = {own: self._number(seat, own) for own in reply.running}
        return played

    def _number(self, seat: _Seat, own: int) -> int:
        if own not in seat.numbers:
            seat.numbers[own] = self._episodes
            self._episodes += 1
        return seat.numbers[own]

    # ---- weights and ids -------------------------------------------------------------------------

    def _hand_out(self) -> int:
        """Put what workers need into Ray's memory: the world model's weights, where they are not
        those of the round before, and at first the list of actions.

        Returns:
            the weights' version.
        """
        vocabulary = self._policy.vocabulary
        if self._actions is None and isinstance(vocabulary, ActionVocabulary):
            known = [vocabulary.action_of(i) for i in range(vocabulary.size)]
            most = vocabulary.capacity - vocabulary.overflow
            self._actions = _beside(ActionList).remote(known, most)

        weights = self._policy.acting_weights()
        same = weights.keys() == self._handed_out.keys() and all(
            np.array_equal(value, self._handed_out[name]) for name, value in weights.items()
        )
        if not same:
            self._handed_out = weights
            self._newest = (self._newest[0] + 1, ray.put(weights))
            self._sent_bytes += sum(value.nbytes for value in weights.values())
        return self._newest[0]

    def _take_llm(self) -> None:
        """The LLM's trained weights as they are now, for workers to take over in the next round."""
        trainer = self._llm.trainer
        with trainer.lock:
            weights = {
                name: parameter.detach().cpu().numpy().copy()
                for name, parameter in trainer.weights().module.named_parameters()
                if parameter.requires_grad
            }
        self._newest_llm = (trainer.version, ray.put((trainer.version, weights)))
        self._sent_bytes += sum(value.nbytes for value in weights.values())

    async def _take_in_actions(self, segments: Sequence[Segment]) -> None:
        """Name in the learner's network what workers have named, before anything is trained on."""
        if self._actions is not None:
            known = self._policy.vocabulary.size
            try:
                news = await self._actions.extend.remote(known, [])
            except ray.exceptions.RayError as error:
                raise PriorZeroError(
                    f"the process that numbers actions for the collector workers is gone "
                    f"({_in_a_line(error)}); continue from the last checkpoint with --resume"
                ) from error
            if news:
                await asyncio.to_thread(self._policy.register_actions, news)

        for segment in segments:
            for step in segment.steps:
                ids = self._policy.register_actions(step.state.valid_actions)
                assert [i for i in ids if i is not None] == step.valid_ids.tolist()

    # ---- workers that come and go ----------------------------------------------------------------

    async def _ready(self, seat: _Seat) -> None:
        """Let this seat have a worker that can play."""
        while seat.actor is None:
            try:
                await self._start(seat)
            except _FAILURES as error:
                self._give_up(seat, error)

    async def _start(self, seat: _Seat) -> None:
        settings = self._settings
        variables = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")])),
            "OMP_NUM_THREADS": str(max(1, int(settings.worker_cpus))),
        }
        # Torch reads these when it is loaded.
        for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
            if name in os.environ:
                variables[name] = os.environ[name]
        seat.actor = (
            ray.remote(CollectWorker)
            .options(
                num_cpus=settings.worker_cpus,
                num_gpus=settings.worker_gpus,
                scheduling_strategy=settings.placement,
                max_restarts=0,
                max_concurrency=1,
                runtime_env={"env_vars": variables},
            )
            .remote(self._make, self._plan, seat.share)
        )
        seat.world_model = seat.llm = -1
        seat.facts, seat.numbers = {}, {}
        seat.facts = await self._answer(seat, seat.actor.open.remote(), settings.start_timeout_s)

    async def _answer(self, seat: _Seat, asked: Awaitable[T], timeout_s: float) -> T:
        """What an actor answers.

        Raises:
            PriorZeroError: a fault that the user can mend; another worker would have it too.
            WorkerFault: it raised something else, and nobody knows in what state it is.
            RayError, TimeoutError: it is gone, or does not answer.
        """
        try:
            return await asyncio.wait_for(_future(asked), timeout_s)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PriorZeroError):
                raise PriorZeroError(f"{seat.name}: {error.cause}") from error
            raise WorkerFault(f"{type(error.cause).__name__}: {error.cause}") from error
        except TimeoutError as error:
            free = counted(ray.available_resources())
            what = "answer" if seat.facts else f"start (of the cluster {free} are free)"
            raise TimeoutError(f"it did not {what} in {timeout_s:g} s") from error

    def _give_up(self, seat: _Seat, error: Exception) -> None:
        """End a worker, and make its seat ready for another one.

        Raises:
            PriorZeroError: too many died here in a row.
        """
        self._deaths += 1
        seat.failures += 1
        reason = _in_a_line(error)
        if seat.failures > self._settings.max_restarts:
            raise PriorZeroError(
                f"{seat.name} failed {seat.failures} times in a row without finishing its part "
                f"(last: {reason}). Continue from the last checkpoint with --resume; raise "
                "collectors.max_restarts or collectors.timeout_s, or take fewer workers"
            ) from error
        logger.warning(
            "%s is given up: %s. Its %d running episodes are lost; another worker begins in its "
            "place (death %d of this run)",
            seat.name,
            reason,
            len(seat.numbers),
            self._deaths,
        )
        ray.kill(seat.actor, no_restart=True)
        if seat.totals is not None:
            self._gone.append(seat.totals)
        self._lives += 1
        seat.share = replace(seat.share, life=self._lives)
        seat.actor, seat.totals = None, None

    def close(self) -> None:
        """End the workers."""
        actors = [seat.actor for seat in self._seats if seat.actor is not None]
        if actors:
            ended = [actor.close.remote() for actor in actors]
            ray.wait(ended, num_returns=len(ended), timeout=_CLOSE_S)
        for actor in [*actors, *([self._actions] if self._actions is not None else [])]:
            ray.kill(actor, no_restart=True)

    # ---- numbers and checkpoints -----------------------------------------------------------------

    def totals(self) -> Totals:
        """Of the workers together, those included that died, and of the learner."""
        told = [*self._gone, *(s.totals for s in self._seats if s.totals is not None)]
        own_llm = {} if self._llm is None else self._llm.prior.stats()
        clamped = {"positions_clamped": float(self._policy.positions_clamped)}
        seconds = [seat.seconds for seat in self._seats]
        return Totals(
            games=_joined([t.games for t in told]) if told else _NO_GAMES,
            encoder=_joined([self._encoder.stats(), *(t.encoder for t in told)]),
            llm=_joined([own_llm, *(t.llm for t in told)]),
            search=_joined([clamped, *(t.search for t in told)]),
            workers={
                "workers": float(len(self._seats)),
                "worker_deaths": float(self._deaths),
                "worker_seconds_mean": float(np.mean(seconds)),
                "worker_seconds_max": max(seconds),
                "worker_weights_mib": self._sent_bytes / 2**20,
            },
        )

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, in this process or with workers. Episodes that run in workers
        are not in it: they end with the run, and new ones begin.
        """
        return {
            "episodes": self._episodes,
            "slots": [],
            "segments": pack([]),
            "cut": pack(self._cut),
            "envs": [],
            "elsewhere": sum(len(seat.numbers) for seat in self._seats),
            "lives": self._lives,
        }

    async def resume(self, state: Mapping[str, Any]) -> int:
        """Go on from a `state_dict`, of this class or of `PriorZeroCollector`: all its running
        episodes are cut. What of them is in the checkpoint goes to the next call's segments.

        Returns:
            how many were cut.
        """
        assert all(seat.actor is None for seat in self._seats), "workers begin after a resume"
        self._episodes = state["episodes"]
        arrays = [{n: np.asarray(v) for n, v in state[k].items()} for k in ("cut", "segments")]
        self._cut = [s for packed in arrays for s in unpack(packed) if len(s)]

        # Their episodes have seeds of their own.
        self._lives = state.get("lives", 0) + 1
        for seat in self._seats:
            seat.share = replace(seat.share, life=self._lives)
        cut = len(state["slots"]) + state.get("elsewhere", 0)
        logger.info(
            "collector workers begin new episodes: the %d that ran when the checkpoint was written "
            "do not go on",
            cut,
        )
        return cut


_NO_GAMES = {"state_hits": 0.0, "state_misses": 0.0}  # before the first round


class WorkerFault(Exception):
    """A worker raised what no user can mend."""


_FAILURES = (ray.exceptions.RayError, TimeoutError, WorkerFault)  # that another worker may not have


def _parts(total: int, workers: int) -> list[tuple[int, int]]:
    """First and number of each worker's things, of so many that are split as evenly as can be."""
    each, left = divmod(total, workers)
    counts = [each + (number < left) for number in range(workers)]
    return [(sum(counts[:number]), count) for number, count in enumerate(counts)]


def _beside(actor: type) -> Any:
    """Ray's class of an actor on this machine that takes none of its CPUs."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    place = NodeAffinitySchedulingStrategy(here, soft=False)
    return ray.remote(actor).options(
        num_cpus=0,
        scheduling_strategy=place,
        runtime_env={"env_vars": {"PYTHONPATH": str(_ROOT)}},
    )


async def _future(asked: Awaitable[T]) -> T:
    return await asked


async def _all(work: Iterable[Awaitable[T]]) -> list[T]:
    """Results in order; where one fails the others are not waited for."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _joined(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Sums by name; means of those that are shares."""
    rows: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            rows.setdefault(name, []).append(float(value))
    return {
        name: float(np.mean(values) if name.endswith(_MEANS) else np.sum(values))
        for name, values in rows.items()
    }


def _in_a_line(error: BaseException) -> str:
    """What happened: first and last line, since Ray's messages go on for a page."""
    lines = [line.strip()[:_LONGEST] for line in str(error).splitlines() if line.strip()]
    ends = dict.fromkeys([*lines[:1], *lines[-1:]])
    return ": ".join([type(error).__name__, " … ".join(ends)])
