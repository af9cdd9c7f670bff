"""PriorZeroEvaluator: plays whole episodes without learning from them, in up to four ways, and
keeps what was said.

Modes: world_model (search, its own policy at the root), world_model_llm (search with the LLM's
prior as the settings mix it), llm (the LLM's favourite action, no search), random (a uniformly
drawn valid action). Environments, contexts and episode seeds are the evaluator's own.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from priorzero.games.group import GameEnvGroup
from priorzero.llm.prior import LLMPrior, reduced
from priorzero.play.slot import Decision, HistoryWindow, Seat, decisions, roots_of
from priorzero.run.metrics import Stopwatch
from priorzero.search.root_prior import log_softmax
from priorzero.text.encoder import SentenceEncoder
from priorzero.types import PriorZeroError
from priorzero_policy import PriorZeroPolicy

logger = logging.getLogger(__name__)
MODES = ("world_model", "world_model_llm", "llm", "random")


@dataclass(frozen=True)
class EvalResult:
    """Episodes of one mode. returns, lengths, kinds `[n]`; max_score of the game, or nan where it
    is unknown.
    """

    mode: str
    returns: tuple[float, ...]
    scores: tuple[float, ...]
    lengths: tuple[int, ...]
    kinds: tuple[str, ...]
    max_score: float

    def metrics(self) -> dict[str, float]:
        """mean, std, best, worst, length, share of the maximal score, and episodes per way of
        ending.
        """
        values = {
            "return_mean": float(np.mean(self.returns)),
            "return_std": float(np.std(self.returns)),
            "return_best": float(np.max(self.returns)),
            "return_worst": float(np.min(self.returns)),
            "length": float(np.mean(self.lengths)),
            "episodes": float(len(self.returns)),
            "terminated": float(sum(k == "terminated" for k in self.kinds)),
            "hangs": float(sum(k == "hang" for k in self.kinds)),
        }
        if np.isfinite(self.max_score) and self.max_score > 0:
            values["score_share"] = float(np.mean(self.scores)) / self.max_score
        return {f"{self.mode}/{name}": value for name, value in values.items()}


class PriorZeroEvaluator:
    """See the module.

    Args:
        policy, envs, encoder, prior, history: as the collector's; `envs` with evaluation seeds.
        reduction: how an action's token log-probabilities become one number.
        transcripts: folder the episodes are written to, or None.
        seed: of episodes and of every draw. temperature: 0 plays the most visited action (LLM
            alone: the likeliest), a higher one draws from visit counts ** (1 / temperature) (LLM
            alone: from softmax(log p / temperature)).
    """

    def __init__(
        self,
        policy: PriorZeroPolicy,
        envs: GameEnvGroup,
        encoder: SentenceEncoder,
        prior: LLMPrior | None,
        history: HistoryWindow | None = None,
        reduction: str = "sum",
        transcripts: Path | None = None,
        seed: int = 0,
        watch: Stopwatch | None = None,
        temperature: float = 0.0,
        context_steps: int = 1,
    ) -> None:
        self._context_steps = context_steps
        self._policy, self._envs, self._encoder, self._prior = policy, envs, encoder, prior
        self._history, self._reduction, self._transcripts = (
            history or HistoryWindow(),
            reduction,
            transcripts,
        )
        self._seed, self._temperature = seed, temperature
        self.watch = watch or Stopwatch()

    async def evaluate(
        self, mode: str, episodes: int, env_steps: int, label: str = ""
    ) -> EvalResult:
        """Play `episodes` episodes in `mode`. Every call plays the same episode seeds, so calls can
        be compared.

        Args:
            env_steps: of the training so far, for the mixture's schedule. label: part of the
                transcripts' names.
        Raises:
            PriorZeroError: an unknown mode, or a mode that needs an LLM where there is none.
        """
        if mode not in MODES:
            raise PriorZeroError(
                f"evaluation mode {mode!r} is unknown; there are {', '.join(MODES)}"
            )
        if mode in ("world_model_llm", "llm") and self._prior is None:
            raise PriorZeroError(
                f"evaluation mode {mode!r} needs an LLM, and this run has none (llm.enable)"
            )
        self._envs.seed(self._seed)
        self._rng = np.random.default_rng((self._seed, env_steps))
        done: list[tuple[dict, list[str]]] = []
        seats: dict[int, Seat] = {}
        scripts: dict[int, list[str]] = {}
        started = 0
        while len(done) < episodes:
            idle = [e for e in range(len(self._envs)) if e not in seats][: episodes - started]
            if idle:
                await self._start(idle, seats, scripts)
                started += len(idle)
            env_ids = sorted(seats)
            actions, remarks = await self._choose(mode, env_ids, seats, env_steps)
            with self.watch("eval_env"):
                timesteps = await asyncio.to_thread(self._envs.step, actions)
            for env_id in env_ids:
                outcome, seat = timesteps[env_id], seats[env_id]
                scripts[env_id] += _script(
                    seat, actions[env_id], float(outcome.reward), remarks[env_id]
                )
                seat.advance(actions[env_id], float(outcome.reward), outcome.obs)
                if outcome.done:
                    ending = f"[{outcome.info['done_kind']}, score {outcome.info['score']}]"
                    scripts[env_id] += [outcome.obs["text"], "", ending]
                    done.append((outcome.info, scripts.pop(env_id)))
                    del seats[env_id]
        return self._result(mode, done, label)

    async def _start(
        self, idle: list[int], seats: dict[int, Seat], scripts: dict[int, list[str]]
    ) -> None:
        first = await asyncio.to_thread(self._envs.reset, idle)
        for env_id in idle:
            game = self._envs.envs[env_id].game
            seats[env_id] = Seat(game.goal, self._history, self._context_steps)
            seats[env_id].start(first[env_id])
            scripts[env_id] = [
                f"[{game.env_id}, episode seed {self._envs.envs[env_id].episode_seed}]",
                "",
            ]

    async def _choose(
        self, mode: str, env_ids: list[int], seats: dict[int, Seat], env_steps: int
    ) -> tuple[dict[int, str], dict[int, str]]:
        """An action per environment, and a remark for the transcript."""
        if mode == "random":
            picks = {e: str(self._rng.choice(seats[e].state.valid_actions)) for e in env_ids}
            return picks, {e: "" for e in env_ids}
        due: list[Decision] = await asyncio.to_thread(
            decisions,
            [seats[e] for e in env_ids],
            self._encoder.encode,
            self._policy.register_actions,
        )
        scores = [None] * len(due)
        if mode != "world_model":
            with self.watch("eval_llm_prior"):
                scores = await self._prior.ask(
                    [d.state for d in due], [d.valid_actions for d in due]
                )
        logprobs = [reduced(s, self._reduction) for s in scores]
        if mode == "llm":
            return self._llm_alone(env_ids, due, logprobs)
        prior_mode = "wm_logits" if mode == "world_model" else None
        with self.watch("eval_search"):
            output = await asyncio.to_thread(
                self._policy.eval_mode.forward,
                roots_of([seats[e] for e in env_ids], due, logprobs),
                env_steps,
                prior_mode,
                self._temperature,
                self._rng,
            )
        picks, remarks = {}, {}
        for env_id, d, plan in zip(env_ids, due, output, strict=True):
            seats[env_id].context.act(int(d.valid_ids[plan.action_index]))
            picks[env_id] = d.valid_actions[plan.action_index]
            top = np.argsort(-plan.visit_counts)[:4]
            prior = np.exp(plan.prior.log_mixed)
            remarks[env_id] = f"value {plan.root_value:.2f}; " + ", ".join(
                f"{d.valid_actions[i]}: {int(plan.visit_counts[i])} visits, prior {prior[i]:.2f}"
                for i in top
            )
        return picks, remarks

    def _llm_alone(
        self, env_ids: list[int], due: list[Decision], logprobs
    ) -> tuple[dict[int, str], dict[int, str]]:
        if any(values is None for values in logprobs):
            raise PriorZeroError(
                "the LLM engine failed while the LLM alone was evaluated; see the log above"
            )
        picks = {
            e: d.valid_actions[self._pick(v)]
            for e, d, v in zip(env_ids, due, logprobs, strict=True)
        }
        remarks = {
            e: ", ".join(f"{d.valid_actions[i]}: {v[i]:.2f}" for i in np.argsort(-v)[:4])
            for e, d, v in zip(env_ids, due, logprobs, strict=True)
        }
        return picks, remarks

    def _pick(self, logprobs: np.ndarray) -> int:
        if not self._temperature:
            return int(np.argmax(logprobs))
        return int(
            self._rng.choice(len(logprobs), p=np.exp(log_softmax(logprobs / self._temperature)))
        )

    def _result(self, mode: str, done: list[tuple[dict, list[str]]], label: str) -> EvalResult:
        infos = [info for info, _ in done]
        if self._transcripts is not None:
            self._transcripts.mkdir(parents=True, exist_ok=True)
            for number, (info, lines) in enumerate(done):
                path = (
                    self._transcripts
                    / f"{label}_{mode}_{number}_return{info['eval_episode_return']:g}.txt"
                )
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        top = infos[0]["max_score"]
        return EvalResult(
            mode,
            tuple(float(i["eval_episode_return"]) for i in infos),
            tuple(float(i["score"]) for i in infos),
            tuple(int(i["steps"]) for i in infos),
            tuple(i["done_kind"] for i in infos),
            float(top) if top is not None else float("nan"),
        )


def _script(seat: Seat, action: str, reward: float, remark: str) -> list[str]:
    lines = [seat.observation["text"], "", f"> {action}"]
    if remark:
        lines.append(f"  ({remark})")
    if reward:
        lines.append(f"  [reward {reward:g}]")
    return lines + [""]
