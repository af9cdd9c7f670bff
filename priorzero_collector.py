"""PriorZeroCollector: plays all environments at once and writes what happened into segments.

Per step: all priors in one batch from the LLM engine, one batched search (or a draw from the LLM,
where it plays alone), all environments stepped together. Nothing here blocks the event loop:
network and search run in a thread, interpreters in their processes.

LightZero's `MuZeroSegmentCollector` plans every step of a `collect` call with the action mask and
timestep of the call's first step (tests/test_stock_defects.py); here each decision is built from
the state it is taken in.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from easydict import EasyDict

from priorzero.data.packing import pack, unpack
from priorzero.data.segment import Segment, StepRecord
from priorzero.decisions.recorder import Recorder
from priorzero.games.group import GameEnvGroup
from priorzero.llm.prior import LLMPrior
from priorzero.play.played import Played, entropy, prior_effect
from priorzero.play.players import Move, Player, llm_move, llm_policy, search_move
from priorzero.play.restarts import Beginning, Ended, Restarts
from priorzero.play.results import CollectResult, Totals
from priorzero.play.slot import Decision, Slot, decide
from priorzero.quiet import quiet_base
from priorzero.run.metrics import Stopwatch
from priorzero.run.randomness import generator_state, set_generator_state
from priorzero.settings.env import plain_name
from priorzero.settings.policy import PolicySettings
from priorzero.text.encoder import SentenceEncoder
from priorzero.types import PriorZeroError, world_text
from priorzero_policy import PriorZeroPolicy

with quiet_base():
    from ding.utils import SERIAL_COLLECTOR_REGISTRY


@SERIAL_COLLECTOR_REGISTRY.register("priorzero")
class PriorZeroCollector:
    """See the module.

    Args:
        settings: the policy's settings.
        policy: its collect mode plans; `register_actions` names actions.
        envs: the training environments.
        encoder: frozen sentence encoder.
        prior: the LLM, or None for pure UniZero.
        history_length: past steps the LLM may see.
        seed: of what is drawn from the LLM where it plays alone, and of restarts.
        llm_target_prior: the prior in the targets that the LLM learns from.
        watch: where the seconds of each stage are added up.
        recorder: of decisions; None records none.
        several_games: whether episodes are of several games, which are then told apart.
    """

    config = dict(type="priorzero")

    @classmethod
    def default_config(cls) -> EasyDict:
        """For DI-engine's config compile; the settings that matter are the policy's."""
        return EasyDict(copy.deepcopy(cls.config), cfg_type=cls.__name__ + "Dict")

    def __init__(
        self,
        settings: PolicySettings,
        policy: PriorZeroPolicy,
        envs: GameEnvGroup,
        encoder: SentenceEncoder,
        prior: LLMPrior | None,
        *,
        history_length: int,
        seed: int,
        llm_target_prior: str = "mixture",
        watch: Stopwatch | None = None,
        recorder: Recorder | None = None,
        several_games: bool = False,
    ) -> None:
        self._settings, self._policy, self._envs = settings, policy, envs
        self._encoder, self._prior = encoder, prior
        self._history_length = history_length
        self._llm_target_prior = llm_target_prior
        self._rng = np.random.default_rng(seed)
        self.watch = watch or Stopwatch()
        self._recorder = recorder
        self._several_games = several_games
        self.counters: Counter[str] = Counter()
        self._slots: dict[int, Slot] = {}  # by environment
        self._episodes = 0
        self._restart_rng = np.random.default_rng([seed, 1])
        self._restarts = None
        if settings.restarts.share:
            reach = settings.context_steps - 1
            self._restarts = Restarts(settings.restarts, reach, self._restart_rng)
        self._cut: list[Segment] = []  # of episodes that a resume lost; due with the next call

    async def collect(
        self,
        num_segments: int,
        env_steps: int,
        temperature: float,
        player: Player = "search",
        new_episodes: int | None = None,
    ) -> CollectResult:
        """Play until `num_segments` segments are finished; unfinished ones go on in the next call.

        Args:
            env_steps: played before this call, for the mixture's schedule.
            temperature: actions are drawn from visit counts ** (1 / temperature), and from the LLM
                alone as softmax(log p / temperature).
            player: who plays. What the LLM would have been asked is written down where it is not
                asked too, so that it can learn from these decisions.
            new_episodes: how many episodes may begin; where none runs any more, the call is over.
                None: one in every environment that is free.

        Raises:
            PriorZeroError: an environment cannot be started, a required LLM failed, or one that
                plays alone.
        """
        played = await self.play(num_segments, env_steps, temperature, player, new_episodes)
        result = played.result(running=self.running, by_game=self._several_games)
        if self._restarts is not None:
            result.collect.update(self._restarts.metrics(played.depths, played.episodes))
        return result

    async def play(
        self,
        num_segments: int,
        env_steps: int,
        temperature: float,
        player: Player = "search",
        new_episodes: int | None = None,
    ) -> Played:
        """`collect` before its figures are made of it."""
        played = Played(env_steps, self._cut)
        idle = [env_id for env_id in range(len(self._envs)) if env_id not in self._slots]
        await self._begin(idle, played, new_episodes)
        self._cut = []

        while self._slots and len(played.segments) < num_segments:
            slots = [self._slots[env_id] for env_id in sorted(self._slots)]

            due = await self._decide(slots, player)
            if player == "llm":
                moves = self._draw(due, temperature, played)
            else:
                moves = await self._plan(slots, due, temperature, env_steps, played)

            ended = await self._step(slots, due, moves, played)
            await self._begin(ended, played, new_episodes)

        return played

    @property
    def running(self) -> int:
        """Episodes that go on."""
        return len(self._slots)

    @property
    def open_segments(self) -> list[Segment]:
        """Of those episodes: what the next call of `play` goes on writing."""
        return [slot.segment for slot in self._slots.values()]

    def totals(self) -> Totals:
        """Totals of what it plays with."""
        return Totals(
            games=self._envs.stats(),
            encoder=self._encoder.stats(),
            llm={} if self._prior is None else self._prior.stats(),
            search={"positions_clamped": float(self._policy.positions_clamped)},
        )

    def state_dict(self) -> dict[str, Any]:
        """The running episodes between two calls of `collect`, as plain values and arrays."""
        if self._recorder is not None:
            self._recorder.flush()  # records reach as far as the checkpoint does
        slots = [self._slots[env_id] for env_id in sorted(self._slots)]
        restarts = {}
        if self._restarts is not None:
            restarts["visited"] = self._restarts.visited.state_dict()
            restarts["restart_rng"] = generator_state(self._restart_rng)
        return restarts | {
            "episodes": self._episodes,
            "slots": [slot.state_dict() for slot in slots],
            "segments": pack([slot.segment for slot in slots]),
            "cut": pack(self._cut),
            "envs": self._envs.state_dict(),
            "rng": generator_state(self._rng),
        }

    async def resume(self, state: Mapping[str, Any]) -> int:
        """Go on with the episodes of a `state_dict`: their games are played again up to where they
        were.

        An episode that does not come back so is cut: what was played of it goes to the next call's
        segments, and a new one begins in its place.

        Returns:
            how many were cut.
        """
        assert not self._slots, "a state is loaded into a new collector"
        self._episodes = state["episodes"]
        if "rng" in state:  # older checkpoints have none
            set_generator_state(self._rng, state["rng"])
        if self._restarts is not None and "visited" in state:  # else the run begins with it now
            self._restarts.visited.load_state_dict(state["visited"])
            set_generator_state(self._restart_rng, state["restart_rng"])
        self._cut = unpack(_arrays(state["cut"]))
        segments = unpack(_arrays(state["segments"]))
        present = await asyncio.to_thread(self._envs.replay, state["envs"])

        cut = state.get("elsewhere", 0)  # played in processes that are gone
        for saved, segment in zip(state["slots"], segments, strict=True):
            env_id = saved["env_id"]
            if env_id in present:
                slot = self._new_slot(env_id, saved["episode_id"], present[env_id])
                slot.load_state_dict(saved)
                slot.segment = segment
                if slot.began is not None:
                    slot.tape = None
                self._slots[env_id] = slot
            else:
                cut += 1
                self._cut += [segment] if len(segment) else []
        return cut

    def _new_slot(self, env_id: int, episode_id: int, observation: dict[str, Any]) -> Slot:
        env = self._envs.envs[env_id]
        slot = Slot(
            env_id,
            episode_id,
            observation,
            goal=env.game.goal,
            history_length=self._history_length,
            context_steps=self._settings.context_steps,
            game=plain_name(env.game.env_id) if self._several_games else "",
        )
        if self._recorder is not None:
            slot.tape = self._recorder.collection(
                episode_id, game=env.game.env_id, seed=env.episode_seed
            )
        return slot

    async def _begin(
        self, env_ids: Sequence[int], played: Played, new_episodes: int | None
    ) -> None:
        """New episodes in these environments, as far as so many may begin in this call."""
        if new_episodes is not None:
            env_ids = env_ids[: max(0, new_episodes - played.begun)]
        if env_ids:
            await self._start(env_ids, played)
            played.begun += len(env_ids)

    async def _start(self, env_ids: Sequence[int], played: Played) -> None:
        """New episodes in these environments, at the game's start or at a visited state."""
        begun: dict[int, Beginning] = {}
        with self.watch("env"):
            if self._restarts is not None:
                begun = await self._restarts.begin({i: self._envs.envs[i] for i in env_ids})
            first = {env_id: beginning.observation for env_id, beginning in begun.items()}
            fresh = [env_id for env_id in env_ids if env_id not in begun]
            if fresh:
                first |= await asyncio.to_thread(self._envs.reset, fresh)
        slots = [
            self._new_slot(env_id, self._episodes + number, first[env_id])
            for number, env_id in enumerate(env_ids)
        ]
        self._episodes += len(slots)
        texts = [slot.world_text for slot in slots]
        vectors = await asyncio.to_thread(self._encoder.encode, texts)

        for slot, vector in zip(slots, vectors, strict=True):
            if slot.env_id in begun:
                slot.begin_at(begun[slot.env_id].place, vector)
                slot.tape = None  # a record tells an episode from its first step on
                played.depths.append(slot.timestep)
            else:
                slot.see(vector)
            slot.segment = self._new_segment(slot)
            self._slots[slot.env_id] = slot

    def _new_segment(self, slot: Slot) -> Segment:
        last, reach = slot.segment, self._settings.context_steps - 1
        before = last.history(len(last), reach) if last is not None else slot.before
        length = self._settings.game_segment_length
        return Segment(slot.env_id, slot.episode_id, length, before, slot.game)

    async def _decide(self, slots: Sequence[Slot], player: Player) -> list[Decision]:
        """Decisions with what the LLM is asked and, where it is asked, its scores."""
        with self.watch("encode"):  # new actions have texts too
            due = await asyncio.to_thread(decide, slots, self._policy.register_actions)
        if self._prior is None:
            assert player != "llm", "an LLM that plays must be there"
            return due

        with self.watch("llm_prior"):
            requests = await asyncio.to_thread(
                self._prior.requests, [d.state for d in due], [d.valid_actions for d in due]
            )
            asked = player != "search_alone"
            scores = await self._prior.ask(requests) if asked else [None] * len(requests)
        for decision, request, answer in zip(due, requests, scores, strict=True):
            decision.request, decision.scores = request, answer
        return due

    async def _plan(
        self,
        slots: Sequence[Slot],
        due: Sequence[Decision],
        temperature: float,
        env_steps: int,
        played: Played,
    ) -> list[Move]:
        """What the search plays in these slots."""
        reduction = self._settings.root_prior.reduction
        roots = [
            d.root(slot, reduction, self._llm_target_prior)
            for slot, d in zip(slots, due, strict=True)
        ]
        with self.watch("search"):
            plans = await asyncio.to_thread(
                self._policy.collect_mode.forward, roots, temperature, env_steps + played.steps
            )
        played.effects += [prior_effect(plan) for plan in plans]
        return [search_move(plan) for plan in plans]

    def _draw(self, due: Sequence[Decision], temperature: float, played: Played) -> list[Move]:
        """What the LLM plays alone.

        Raises:
            PriorZeroError: it gave no answer: there is nobody else to play.
        """
        logprobs = [decision.llm_logprobs(self._settings.root_prior.reduction) for decision in due]
        if any(own is None for own in logprobs):
            raise PriorZeroError(
                "the LLM engine failed while the LLM played alone, and nobody else is there to "
                "play; the log above has the reason. The last checkpoint stands: continue it with "
                "--resume, or use --engine transformers"
            )
        played.effects += [{"llm_entropy": entropy(llm_policy(own, 1.0))} for own in logprobs]
        return [llm_move(own, temperature, self._rng) for own in logprobs]

    async def _step(
        self,
        slots: Sequence[Slot],
        due: Sequence[Decision],
        moves: Sequence[Move],
        played: Played,
    ) -> list[int]:
        """Play the chosen actions and write down what came of them.

        Returns:
            the environments whose episode ended.
        """
        chosen = {
            slot.env_id: decision.valid_actions[move.action_index]
            for slot, decision, move in zip(slots, due, moves, strict=True)
        }
        with self.watch("env"):
            timesteps = await asyncio.to_thread(self._envs.step, chosen)
        with self.watch("encode"):
            texts = [world_text(timesteps[s.env_id].obs["text"], s.game) for s in slots]
            vectors = await asyncio.to_thread(self._encoder.encode, texts)

        ended = []
        for slot, decision, move, vector in zip(slots, due, moves, vectors, strict=True):
            outcome = timesteps[slot.env_id]
            now, names = played.before + played.steps, self._policy.vocabulary.action_of
            decision.record(slot, chosen[slot.env_id], outcome, names, move.plan, env_steps=now)
            played.steps += 1
            played.steps_of[slot.game] += 1
            if outcome.info["done_kind"] == "hang":
                # The next state is unknown: what was played before stands, this step does not enter
                # the data.
                self.counters["hangs"] += 1
            else:
                self._record(slot, decision, move, outcome, vector)

            if outcome.done:
                ended.append(slot.env_id)
                del self._slots[slot.env_id]
                played.episodes.append(Ended(outcome.info, slot.began))
                played.games.append(slot.game)
            elif self._restarts is not None:
                self._restarts.remember(slot, self._envs.envs[slot.env_id])
            if len(slot.segment) and (outcome.done or slot.segment.is_full()):
                played.segments.append(slot.segment)
                if not outcome.done:
                    slot.segment = self._new_segment(slot)
        return ended

    def _record(
        self,
        slot: Slot,
        decision: Decision,
        move: Move,
        outcome,
        next_vector: np.ndarray,
    ) -> None:
        """Write the step into the slot's segment and move the slot on."""
        step = StepRecord(
            state=decision.state,
            observation=slot.vector,
            valid_actions=decision.valid_actions,
            valid_ids=decision.valid_ids,
            action_index=move.action_index,
            visit_counts=move.visit_counts,
            target_policy=move.target_policy,
            behaviour=move.behaviour,
            root_value=move.root_value,
            predicted_value=move.predicted_value,
            reward=float(outcome.reward),
            done_kind=outcome.info["done_kind"],
            timestep=slot.timestep,
            request=decision.request,
            scores=decision.scores,
            prior_weight=move.prior_weight,
            llm_target=move.llm_target,
        )

        slot.segment.record(step, next_vector)
        slot.advance(step.action, step.reward, outcome.obs, step.action_id)
        slot.see(next_vector)


def _arrays(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What a checkpoint made tensors of, as arrays again."""
    return {name: np.asarray(value) for name, value in tensors.items()}
