"""A worker: a collector with its share of the environments, in a process of its own.

It plays when it is asked to, with the weights it was sent last, and keeps its running episodes from
one call to the next. It is asked one thing at a time.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch

from priorzero.collectors.messages import Order, Reply, Share, pack_played
from priorzero.collectors.vocabulary import SharedVocabulary
from priorzero.data.segment import Segment
from priorzero.llm.build import LLMParts
from priorzero.llm.weights.trained import lay_over
from priorzero.play.played import Played
from priorzero.play.results import Totals
from priorzero.run.logs import setup_logging
from priorzero.run.metrics import Stopwatch
from priorzero.text.vocabulary import ActionVocabulary

Arrays = Mapping[str, np.ndarray]


class Collector(Protocol):
    """What is needed of a `PriorZeroCollector`."""

    open_segments: list[Segment]

    async def play(self, *arguments: Any) -> Played: ...

    def totals(self) -> Totals: ...


class Policy(Protocol):
    """What is needed of a `PriorZeroPolicy`."""

    vocabulary: Any

    def take_weights(self, weights: Arrays) -> None: ...


@dataclass(frozen=True)
class WorkerParts:
    """What a worker works with. llm: None for pure UniZero."""

    collector: Collector
    policy: Policy
    llm: LLMParts | None
    watch: Stopwatch
    closing: AsyncExitStack


# (settings and class names of the run, share) -> parts
Make = Callable[[Mapping[str, Any], Share], Any]


class CollectWorker:
    """See the module.

    Args:
        make: `module:function` of a `Make`.
        plan: what it is given.
        share: of the environments.
    """

    def __init__(self, make: str, plan: Mapping[str, Any], share: Share) -> None:
        self._make, self._plan, self._share = make, plan, share
        self._versions: dict[tuple[int, int], int] = {}  # of open segments, by `_key`

    async def open(self) -> dict[str, Any]:
        """Make the parts.

        Returns:
            host, process and node, for messages.

        Raises:
            PriorZeroError: a game or a model cannot be had on this machine.
        """
        import ray

        setup_logging(None)
        self._log = _Kept()
        logging.getLogger().addHandler(self._log)

        module, _, name = self._make.partition(":")
        make: Make = getattr(import_module(module), name)
        self._parts: WorkerParts = await make(self._plan, self._share)
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "node": ray.get_runtime_context().get_node_id(),
        }

    async def play(
        self,
        order: Order,
        world_model: Arrays | None,
        llm: tuple[int, Arrays] | None,
        actions: Any | None,
    ) -> Reply:
        """Go on with the running episodes until the ordered segments are finished.

        Args:
            world_model: parameters to plan with from here on; None: those it has.
            llm: version and trained weights; None: those it has.
            actions: the `ActionList`'s handle; None where ids are positions, the same everywhere.
        """
        parts = self._parts
        own = parts.policy.vocabulary
        if actions is not None and not isinstance(own, SharedVocabulary):
            assert isinstance(own, ActionVocabulary) and not own.size, "ids come from the list"
            extend = partial(_extend, actions)
            parts.policy.vocabulary = SharedVocabulary(own.capacity, own.overflow, extend)
        if world_model is not None:
            parts.policy.take_weights(world_model)
        if llm is not None:
            await self._take_llm(*llm)

        played = await parts.collector.play(
            order.num_segments,
            order.env_steps,
            order.temperature,
            order.player,
            order.new_episodes,
        )
        return Reply(
            played=pack_played(played),
            versions=self._versions_of(played.segments, order.version),
            running=tuple(segment.episode_id for segment in parts.collector.open_segments),
            totals=parts.collector.totals(),
            seconds=parts.watch.lap(),
            told=self._log.take(),
        )

    async def _take_llm(self, version: int, weights: Arrays) -> None:
        llm = self._parts.llm
        assert llm is not None, "there is no LLM here"
        with llm.trainer.lock:
            tensors = {name: torch.tensor(value) for name, value in weights.items()}
            odd = lay_over(llm.trainer.weights().module, tensors)
        assert not odd, f"the learner trains other weights: {odd[:3]}"
        llm.trainer.version = version
        await llm.phase.publish()

    def _versions_of(self, segments: Sequence[Segment], version: int) -> tuple[int, ...]:
        """The versions that these finished segments began with; open ones that began in this call
        get `version`.
        """
        before = self._versions
        found = tuple(before.get(_key(segment), version) for segment in segments)
        begun = [s for s in self._parts.collector.open_segments if len(s)]
        self._versions = {_key(s): before.get(_key(s), version) for s in begun}
        return found

    async def close(self) -> None:
        """End the interpreters and the engine."""
        await self._parts.closing.aclose()


def _key(segment: Segment) -> tuple[int, int]:
    return segment.episode_id, segment.steps[0].timestep


def _extend(handle: Any, known: int, wanted: Sequence[str]) -> Sequence[str]:
    import ray

    return ray.get(handle.extend.remote(known, list(wanted)))


class _Kept(logging.Handler):
    """Keeps warnings for the learner's log: a worker's own is read by nobody."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._records: list[tuple[int, str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append((record.levelno, record.name, record.getMessage()))

    def take(self) -> tuple[tuple[int, str, str], ...]:
        """What came since the last call."""
        taken, self._records = tuple(self._records), []
        return taken
