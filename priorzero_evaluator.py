"""PriorZeroEvaluator: plays whole episodes without learning from them, in up to four ways, and
keeps what was said.

Modes: world_model (search, its own policy at the root), world_model_llm (search with the LLM's
prior as the settings mix it), llm (the LLM's favourite action, no search), random (a uniformly
drawn valid action). Environments, contexts and episode seeds are the evaluator's own, and actions
met only here are guests of the vocabulary: an evaluation leaves no trace in what is trained.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from priorzero.decisions.recorder import Recorder
from priorzero.games.group import GameEnvGroup
from priorzero.games.records import GameSpec
from priorzero.llm.prior import LLMPrior
from priorzero.play.players import llm_policy
from priorzero.play.results import EvalResult, joined
from priorzero.play.slot import Decision, Slot, decide
from priorzero.run.metrics import Stopwatch
from priorzero.search.roots import SearchOutput
from priorzero.settings.env import plain_name
from priorzero.settings.evaluation import LLM_MODES, MODES
from priorzero.settings.policy import PolicySettings
from priorzero.text.encoder import SentenceEncoder
from priorzero.types import PriorZeroError
from priorzero_policy import PriorZeroPolicy


@dataclass(frozen=True)
class _Choice:
    """What is played in a slot.

    action_id: None without a search. remark: for the transcript. decision, plan: what led to it;
    without a search the plan is None, and the decision has no ids.
    """

    action: str
    decision: Decision
    action_id: int | None = None
    remark: str = ""
    plan: SearchOutput | None = None


@dataclass(frozen=True)
class _Episode:
    """A finished one: the environment's last `info`, and its transcript."""

    info: dict
    transcript: list[str]


class PriorZeroEvaluator:
    """See the module.

    Args:
        settings, policy, envs, encoder, prior, history_length, watch: as the collector's; `envs`
            with evaluation seeds.
        seed: of episodes and of every draw.
        temperature: 0 plays the most visited action (LLM alone: the likeliest), a higher one draws
            from visit counts ** (1 / temperature) (LLM alone: from softmax(log p / temperature)).
        transcripts: folder the episodes are written to, or None.
        recorder: of decisions; None records none.
        games: what is played, one after the other; None: the one that the environments have, which
            is the one that training has.
        judged_by: plain names of those of `games` whose results are told together, and tell which
            checkpoint is best.
        several_games: whether training is of several games, which are then told apart.
    """

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
        temperature: float,
        transcripts: Path | None,
        watch: Stopwatch | None = None,
        recorder: Recorder | None = None,
        games: Sequence[GameSpec] | None = None,
        judged_by: Collection[str] = (),
        several_games: bool = False,
    ) -> None:
        self._settings, self._policy, self._envs = settings, policy, envs
        self._encoder, self._prior = encoder, prior
        self._history_length = history_length
        self._seed, self._temperature = seed, temperature
        self._transcripts = transcripts
        self._recorder = recorder
        self._games, self._judged_by = games, frozenset(judged_by)
        self._several_games = several_games
        self.watch = watch or Stopwatch()

    def playing(self, policy: PriorZeroPolicy) -> PriorZeroEvaluator:
        """The same evaluator for another policy, such as a snapshot. Environments are shared: only
        one of the two plays at a time.
        """
        other = copy.copy(self)
        other._policy = policy
        return other

    async def evaluate(
        self, mode: str, episodes: int, env_steps: int, label: str = ""
    ) -> EvalResult:
        """Play `episodes` episodes of each game in `mode`. Every call plays the same episode seeds,
        so calls can be compared; so can those of a run of one game and of one that has more.

        Args:
            env_steps: of the training so far, for the mixture's schedule.
            label: part of the names of transcripts and records.

        Raises:
            PriorZeroError: the LLM failed while it was to play alone, or while it is required.
        """
        assert mode in MODES, f"evaluation mode {mode!r} is unknown; there are {MODES}"
        assert mode not in LLM_MODES or self._prior is not None, f"{mode} needs an LLM"

        if self._games is None:
            return await self._one_game(mode, episodes, env_steps, label)

        results = {}
        for game in self._games:
            await asyncio.to_thread(self._envs.play, game)
            name = plain_name(game.env_id)
            results[name] = await self._one_game(mode, episodes, env_steps, label, name)
        return joined(mode, results, self._judged_by)

    async def _one_game(
        self, mode: str, episodes: int, env_steps: int, label: str, part: str = ""
    ) -> EvalResult:
        """See `evaluate`.

        Args:
            part: plain name of the game, where several are played.
        """
        self._envs.seed(self._seed)
        rng = np.random.default_rng((self._seed, env_steps))

        with self._policy.guests():
            done = await self._play(mode, episodes, env_steps, rng, label, part)

        if self._recorder is not None:
            self._recorder.flush()
        self._write_transcripts("_".join(filter(None, (label, mode, part))), done)
        return _result(mode, [episode.info for episode in done])

    async def _play(
        self,
        mode: str,
        episodes: int,
        env_steps: int,
        rng: np.random.Generator,
        label: str,
        part: str,
    ) -> list[_Episode]:
        """Whole episodes of the game that the environments have, in the order in which they end."""
        slots: dict[int, Slot] = {}  # by environment
        done: list[_Episode] = []
        started = 0
        while len(done) < episodes:
            idle = [e for e in range(len(self._envs)) if e not in slots][: episodes - started]
            if idle:
                new = await self._start(idle)
                if self._recorder is not None:
                    for number, slot in enumerate(new.values(), started):
                        slot.tape = self._recorder.evaluation(
                            label,
                            mode,
                            number,
                            game=self._envs.envs[slot.env_id].game.env_id,
                            seed=slot.episode_id,
                            env_steps=env_steps,
                            part=part,
                        )
                slots |= new
                started += len(idle)

            running = [slots[env_id] for env_id in sorted(slots)]
            choices = await self._choose(mode, running, env_steps, rng)
            with self.watch("eval_env"):
                timesteps = await asyncio.to_thread(
                    self._envs.step,
                    {s.env_id: c.action for s, c in zip(running, choices, strict=True)},
                )

            action_of = self._policy.vocabulary.action_of
            for slot, choice in zip(running, choices, strict=True):
                outcome = timesteps[slot.env_id]
                choice.decision.record(slot, choice.action, outcome, action_of, choice.plan)
                reward = float(outcome.reward)
                slot.transcript += _script(slot, choice, reward)
                slot.advance(choice.action, reward, outcome.obs, choice.action_id)
                if outcome.done:
                    ending = f"[{outcome.info['done_kind']}, score {outcome.info['score']}]"
                    slot.transcript += [outcome.obs["text"], "", ending]
                    done.append(_Episode(outcome.info, slot.transcript))
                    del slots[slot.env_id]
        return done

    async def _start(self, env_ids: Sequence[int]) -> dict[int, Slot]:
        first = await asyncio.to_thread(self._envs.reset, env_ids)
        slots = {}
        for env_id in env_ids:
            env = self._envs.envs[env_id]
            slot = Slot(
                env_id,
                env.episode_seed,
                first[env_id],
                goal=env.game.goal,
                history_length=self._history_length,
                context_steps=self._settings.context_steps,
                game=plain_name(env.game.env_id) if self._several_games else "",
            )
            slot.transcript = [f"[{env.game.env_id}, episode seed {env.episode_seed}]", ""]
            slots[env_id] = slot
        return slots

    async def _choose(
        self, mode: str, slots: Sequence[Slot], env_steps: int, rng: np.random.Generator
    ) -> list[_Choice]:
        """What to play in each slot."""
        if mode == "random":
            due = [Decision(slot.state, slot.state.valid_actions) for slot in slots]
            return [_Choice(str(rng.choice(d.valid_actions)), d) for d in due]
        if mode == "llm":
            return await self._ask_llm_alone(slots, rng)

        due = await asyncio.to_thread(self._decide, slots)
        if mode == "world_model_llm":
            with self.watch("eval_llm_prior"):
                requests = await asyncio.to_thread(
                    self._prior.requests, [d.state for d in due], [d.valid_actions for d in due]
                )
                scores = await self._prior.ask(requests)
            for decision, request, answer in zip(due, requests, scores, strict=True):
                decision.request, decision.scores = request, answer

        reduction = self._settings.root_prior.reduction
        roots = [d.root(slot, reduction) for slot, d in zip(slots, due, strict=True)]
        prior_mode = "wm_logits" if mode == "world_model" else None
        with self.watch("eval_search"):
            plans = await asyncio.to_thread(
                self._policy.eval_mode.forward,
                roots,
                env_steps,
                prior_mode,
                self._temperature,
                rng,
            )
        return [_planned(decision, plan) for decision, plan in zip(due, plans, strict=True)]

    def _decide(self, slots: Sequence[Slot]) -> list[Decision]:
        vectors = self._encoder.encode([slot.world_text for slot in slots])
        for slot, vector in zip(slots, vectors, strict=True):
            slot.see(vector)
        return decide(slots, self._policy.register_actions)

    async def _ask_llm_alone(
        self, slots: Sequence[Slot], rng: np.random.Generator
    ) -> list[_Choice]:
        """The LLM chooses among all valid actions, those without an id in the vocabulary too."""
        states = [slot.state for slot in slots]
        with self.watch("eval_llm_prior"):
            requests = await asyncio.to_thread(
                self._prior.requests, states, [state.valid_actions for state in states]
            )
            scores = await self._prior.ask(requests)
        if any(answer is None for answer in scores):
            raise PriorZeroError(
                "the LLM engine failed while the LLM alone was evaluated; see the log above"
            )

        choices = []
        for state, request, answer in zip(states, requests, scores, strict=True):
            logprobs = np.asarray(answer.totals(self._settings.root_prior.reduction))
            action = state.valid_actions[self._pick(logprobs, rng)]
            top = np.argsort(-logprobs)[:4]
            remark = ", ".join(f"{state.valid_actions[i]}: {logprobs[i]:.2f}" for i in top)
            decision = Decision(state, state.valid_actions, request=request, scores=answer)
            choices.append(_Choice(action, decision, remark=remark))
        return choices

    def _pick(self, logprobs: np.ndarray, rng: np.random.Generator) -> int:
        if not self._temperature:
            return int(np.argmax(logprobs))
        return int(rng.choice(len(logprobs), p=llm_policy(logprobs, self._temperature)))

    def _write_transcripts(self, label: str, done: Sequence[_Episode]) -> None:
        if self._transcripts is None:
            return
        self._transcripts.mkdir(parents=True, exist_ok=True)
        for number, episode in enumerate(done):
            name = f"{label}_{number}_return{episode.info['eval_episode_return']:g}.txt"
            text = "\n".join(episode.transcript) + "\n"
            (self._transcripts / name).write_text(text, encoding="utf-8")


def _planned(decision: Decision, plan: SearchOutput) -> _Choice:
    """The search's choice, with its favourites as a remark."""
    top = np.argsort(-plan.visit_counts)[:4]
    prior = np.exp(plan.prior.log_mixed)
    favourites = ", ".join(
        f"{decision.valid_actions[i]}: {int(plan.visit_counts[i])} visits, prior {prior[i]:.2f}"
        for i in top
    )
    return _Choice(
        decision.valid_actions[plan.action_index],
        decision,
        int(decision.valid_ids[plan.action_index]),
        f"value {plan.root_value:.2f}; {favourites}",
        plan,
    )


def _script(slot: Slot, choice: _Choice, reward: float) -> list[str]:
    """One step as the transcript tells it."""
    lines = [slot.observation["text"], "", f"> {choice.action}"]
    if choice.remark:
        lines.append(f"  ({choice.remark})")
    if reward:
        lines.append(f"  [reward {reward:g}]")
    return [*lines, ""]


def _result(mode: str, infos: Sequence[dict]) -> EvalResult:
    top = infos[0]["max_score"]
    return EvalResult(
        mode,
        tuple(float(info["eval_episode_return"]) for info in infos),
        tuple(float(info["score"]) for info in infos),
        tuple(int(info["steps"]) for info in infos),
        tuple(info["done_kind"] for info in infos),
        float(top) if top is not None else float("nan"),
    )
