"""PriorZeroCollector: plays all environments at once and writes what happened into segments.

Per step: all priors in one batch from the LLM engine, one batched search, all environments stepped
together. Nothing here blocks the event loop: network and search run in a thread, interpreters in
their processes.

LightZero's `MuZeroSegmentCollector` plans every step of a `collect` call with the action mask and
timestep of the call's first step (tests/test_stock_defects.py); here each decision is built from
the state it is taken in.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from priorzero.data.segment import Segment, StepRecord
from priorzero.games.group import GameEnvGroup
from priorzero.llm.prior import LLMPrior, reduced
from priorzero.play.slot import Decision, HistoryWindow, Seat, decisions, roots_of
from priorzero.quiet import quiet_base
from priorzero.run.metrics import Stopwatch
from priorzero.search.roots import SearchOutput
from priorzero.search.targets import visit_shares
from priorzero.text.encoder import SentenceEncoder
from priorzero.types import ActionScores, TokenisedRequest
from priorzero_policy import PriorZeroPolicy

with quiet_base():
    from ding.utils import SERIAL_COLLECTOR_REGISTRY
    from ding.worker.collector.base_serial_collector import ISerialCollector

logger = logging.getLogger(__name__)


@dataclass
class CollectResult:
    """Finished segments, and what to log: `collect` about episodes, `prior` about the LLM's effect
    on the search.
    """

    segments: list[Segment]
    collect: dict[str, float]
    prior: dict[str, float]
    transitions: int = field(init=False)

    def __post_init__(self) -> None:
        self.transitions = sum(len(s) for s in self.segments)


@SERIAL_COLLECTOR_REGISTRY.register("priorzero")
class PriorZeroCollector(ISerialCollector):
    """See the module.

    Args:
        cfg: compiled policy settings.
        policy: its collect mode plans; `register_actions` names actions.
        envs: the training environments.
        encoder: frozen sentence encoder.
        prior: the LLM, or None for pure UniZero.
        history: past steps the LLM may see; None: as many as by default.
    """

    config = dict(type="priorzero")

    def __init__(
        self,
        cfg,
        policy: PriorZeroPolicy,
        envs: GameEnvGroup,
        encoder: SentenceEncoder,
        prior: LLMPrior | None,
        history: HistoryWindow | None = None,
        watch: Stopwatch | None = None,
    ) -> None:
        self._cfg, self._policy, self._envs, self._encoder, self._prior = (
            cfg,
            policy,
            envs,
            encoder,
            prior,
        )
        self._history = history or HistoryWindow()
        self.watch = watch or Stopwatch()
        self._envstep = 0
        self._episodes = 0
        self._seats: dict[int, Seat] = {}
        self._segments: dict[int, Segment] = {}
        self._episode_ids: dict[int, int] = {}
        self._reduction = cfg.root_prior.get("reduction", "sum")
        self.counters: Counter[str] = Counter()

    # ISerialCollector's interface; the parts are given to the constructor and stay.
    def reset_env(self, _env: GameEnvGroup | None = None) -> None:
        """Forget the running episodes, and play in `_env` from now on if one is given."""
        self._envs = _env or self._envs
        self._seats.clear()
        self._segments.clear()

    def reset_policy(self, _policy: PriorZeroPolicy | None = None) -> None:
        """Plan with `_policy` from now on if one is given; contexts start anew."""
        self._policy = _policy or self._policy

    def reset(
        self, _policy: PriorZeroPolicy | None = None, _env: GameEnvGroup | None = None
    ) -> None:
        """`reset_env` and `reset_policy`."""
        self.reset_env(_env)
        self.reset_policy(_policy)

    @property
    def envstep(self) -> int:
        """Environment steps since the run's start."""
        return self._envstep

    @envstep.setter
    def envstep(self, value: int) -> None:
        self._envstep = value

    async def collect(self, num_segments: int) -> CollectResult:
        """Play until `num_segments` segments are finished; unfinished ones go on in the next call.

        Raises:
            PriorZeroError: an environment cannot be started, or a required LLM failed.
        """
        if not self._seats:
            await self._start(list(range(len(self._envs))))
        finished: list[Segment] = []
        episodes: list[dict] = []
        effects: list[dict[str, float]] = []
        while len(finished) < num_segments:
            env_ids = sorted(self._seats)
            with self.watch("encode"):
                due = await asyncio.to_thread(
                    decisions,
                    [self._seats[e] for e in env_ids],
                    self._encoder.encode,
                    self._policy.register_actions,
                )
            scores = await self._ask(due)
            with self.watch("search"):
                output = await asyncio.to_thread(
                    self._policy.collect_mode.forward,
                    roots_of(
                        [self._seats[e] for e in env_ids],
                        due,
                        [reduced(s, self._reduction) for s in scores],
                    ),
                    self._cfg.settings.fixed_temperature_value,
                    self._envstep,
                )
                output = dict(zip(env_ids, output, strict=True))
            chosen = {
                e: d.valid_actions[output[e].action_index]
                for e, d in zip(env_ids, due, strict=True)
            }
            with self.watch("env"):
                timesteps = await asyncio.to_thread(self._envs.step, chosen)
            effects += [prior_effect(output[e]) for e in env_ids]
            ended = await self._record(env_ids, due, scores, output, timesteps, finished, episodes)
            if ended:
                await self._start(ended)
        return CollectResult(finished, self._episode_metrics(episodes, finished), _means(effects))

    async def _ask(self, due: list[Decision]) -> list[ActionScores | None]:
        if self._prior is None:
            return [None] * len(due)
        with self.watch("llm_prior"):
            return await self._prior.ask([d.state for d in due], [d.valid_actions for d in due])

    async def _start(self, env_ids: list[int]) -> None:
        """New episodes in these environments."""
        with self.watch("env"):
            first = await asyncio.to_thread(self._envs.reset, env_ids)
        for env_id in env_ids:
            seat = self._seats.setdefault(
                env_id,
                Seat(
                    self._envs.envs[env_id].game.goal,
                    self._history,
                    self._cfg.settings.context_steps,
                ),
            )
            seat.start(first[env_id])
            self._episode_ids[env_id] = self._episodes
            self._episodes += 1
            self._segments[env_id] = Segment(
                env_id, self._episode_ids[env_id], self._cfg.settings.game_segment_length
            )

    async def _record(
        self,
        env_ids,
        due: list[Decision],
        scores: list[ActionScores | None],
        output: dict[int, SearchOutput],
        timesteps,
        finished: list[Segment],
        episodes: list[dict],
    ) -> list[int]:
        """Write the step into each environment's segment; returns the environments whose episode
        ended.
        """
        with self.watch("encode"):
            nexts = await asyncio.to_thread(
                self._encoder.encode, [timesteps[e].obs["text"] for e in env_ids]
            )
        ended = []
        for row, env_id in enumerate(env_ids):
            seat, plan, outcome = self._seats[env_id], output[env_id], timesteps[env_id]
            self._envstep += 1
            kind = outcome.info["done_kind"]
            if kind == "hang":
                # The next state is unknown: what was played before stands, this step does not enter
                # the data.
                self.counters["hangs"] += 1
                ended.append(env_id)
                self._close_cut(env_id, finished)
                episodes.append(outcome.info)
                continue
            request = None
            if self._prior is not None:
                asked = self._prior.request(due[row].state, due[row].valid_actions)
                request = self._prior.engine.text.tokenise(asked)
            step = _step_record(
                due[row], request, scores[row], plan, float(outcome.reward), kind, seat.timestep
            )
            self._segments[env_id].record(step, nexts[row])
            seat.context.act(step.action_id)
            seat.advance(step.action, step.reward, outcome.obs)
            if outcome.done:
                ended.append(env_id)
                episodes.append(outcome.info)
                finished.append(self._segments[env_id])
            elif self._segments[env_id].is_full():
                finished.append(self._segments[env_id])
                self._segments[env_id] = Segment(
                    env_id, self._episode_ids[env_id], self._cfg.settings.game_segment_length
                )
        return ended

    def _close_cut(self, env_id: int, finished: list[Segment]) -> None:
        """Finish the segment of an episode that a hang cut off before its present step."""
        if len(self._segments[env_id]):
            finished.append(self._segments[env_id])

    def _episode_metrics(self, episodes: list[dict], finished: list[Segment]) -> dict[str, float]:
        steps = [s for segment in finished for s in segment.steps]
        metrics = {
            "segments": float(len(finished)),
            "transitions": float(len(steps)),
            "episodes": float(len(episodes)),
            "reward_per_step": float(np.mean([s.reward for s in steps])),
            "valid_actions": float(np.mean([len(s.valid_actions) for s in steps])),
            "root_value": float(np.mean([s.root_value for s in steps])),
            "visit_entropy": float(
                np.mean([_entropy(visit_shares(s.visit_counts)) for s in steps])
            ),
        }
        if episodes:
            metrics["episode_return_mean"] = float(
                np.mean([e["eval_episode_return"] for e in episodes])
            )
            metrics["episode_return_max"] = float(
                np.max([e["eval_episode_return"] for e in episodes])
            )
            metrics["episode_length"] = float(np.mean([e["steps"] for e in episodes]))
            for kind in ("terminated", "truncated", "hang"):
                metrics[f"episodes_{kind}"] = float(sum(e["done_kind"] == kind for e in episodes))
        return metrics


def _step_record(
    due: Decision,
    request: TokenisedRequest | None,
    scores: ActionScores | None,
    plan: SearchOutput,
    reward: float,
    kind: str,
    timestep: int,
) -> StepRecord:
    return StepRecord(
        state=due.state,
        observation=due.observation,
        valid_actions=due.valid_actions,
        valid_ids=due.valid_ids,
        action_index=plan.action_index,
        visit_counts=plan.visit_counts,
        behaviour=plan.behaviour,
        target_policy=plan.target_policy,
        root_value=plan.root_value,
        predicted_value=plan.predicted_value,
        reward=reward,
        done_kind=kind,
        timestep=timestep,
        request=request,
        scores=scores,
        prior_weight=plan.prior.weight,
    )


def prior_effect(plan: SearchOutput) -> dict[str, float]:
    """How the LLM's prior bore on one decision.

    kl_from_wm: KL(mixed || world model). entropy: of the mixture. overridden: 1 where the search's
    most visited action is not the mixture's favourite; llm_overridden: nor the LLM's own. weight:
    the LLM's share.
    """
    best = int(np.argmax(plan.visit_counts))
    effect = {
        "kl_from_wm": plan.prior.kl_from_wm,
        "entropy": plan.prior.entropy,
        "weight": plan.prior.weight,
        "overridden": float(best != int(np.argmax(plan.prior.log_mixed))),
    }
    if plan.prior.log_llm is not None:
        effect["llm_overridden"] = float(best != int(np.argmax(plan.prior.log_llm)))
        effect["llm_entropy"] = _entropy(np.exp(plan.prior.log_llm))
    return effect


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _means(rows: list[dict[str, float]]) -> dict[str, float]:
    names = {name for row in rows for name in row}
    return {
        name: float(np.mean([row[name] for row in rows if name in row])) for name in sorted(names)
    }
