"""A scripted game whose every answer is known, and an LLM prior for it: for the tests of collector
and evaluator.
"""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import torch
from ding.envs import BaseEnvTimestep

from priorzero.types import ActionScores, TokenisedRequest
from priorzero_policy import PriorZeroPolicy


def told_actions(env: int, t: int) -> tuple[str, ...]:
    """Valid actions of step t: their number and names change from step to step."""
    return tuple(sorted({f"go {k} at {t}" for k in range(1 + (t + env) % 3)} | {"wait"}))


class ScriptedEnv:
    """A `TextGameEnv` that plays a script: step t earns t, and the episode ends in the way and at
    the step given.
    """

    def __init__(self, number: int, length: int = 6, end: str = "terminated") -> None:
        self.number, self.length, self.end = number, length, end
        self.game = SimpleNamespace(goal=f"goal {number}", env_id="script", max_score=40.0)
        self.played: list[list[str]] = []
        self.t = self.episode_seed = 0
        self.forgets = False  # whether a saved episode does not come back

    def seed(self, seed, dynamic_seed=True, env_index=None):
        self.episode_seed = seed * 100

    def _observation(self):
        return {
            "text": f"env {self.number} episode {len(self.played)} step {self.t}",
            "valid_actions": told_actions(self.number, self.t)
            if self.t < self.length or self.end != "terminated"
            else (),
            "timestep": self.t,
            "score": float(sum(range(self.t + 1))),
            "state_hash": "",
        }

    def reset(self):
        self.t, self.episode_seed = 0, self.episode_seed + 1
        self.played.append([])
        return self._observation()

    def step(self, action):
        assert action in told_actions(self.number, self.t), (
            f"{action!r} is not valid at step {self.t}"
        )
        before = self._observation()
        self.played[-1].append(action)
        self.t += 1
        done = self.t == self.length
        kind = self.end if done else "running"
        hang = kind == "hang"
        observation = {**before, "timestep": self.t} if hang else self._observation()
        info = {
            "done_kind": kind,
            "score": observation["score"],
            "max_score": 40.0,
            "steps": self.t,
            "terminated": kind == "terminated",
            "truncated": kind in ("truncated", "hang"),
        }
        if done:
            info["eval_episode_return"] = observation["score"]
        return BaseEnvTimestep(observation, 0.0 if hang else float(self.t), done, info)

    def state_dict(self):
        return {"t": self.t, "played": self.played, "episode_seed": self.episode_seed}

    def replay(self, state):
        self.episode_seed = state["episode_seed"]
        if self.forgets:
            return None
        self.t, self.played = state["t"], state["played"]
        return self._observation()

    def stats(self):
        return {}

    def interrupt(self):
        pass

    def close(self):
        pass


def logprobs(text: str, action: str) -> tuple[float, float]:
    """Two tokens' log-probabilities, from a hash of state and action."""
    digest = hashlib.blake2b(f"{text}|{action}".encode(), digest_size=2).digest()
    return -digest[0] / 100, -digest[1] / 100


class FakePrior:
    """`LLMPrior`'s interface: answers with `logprobs`, or with nothing; counts its calls."""

    VERSION = 5

    def __init__(self, answers: bool = True) -> None:
        self.answers = answers
        self.calls: list[int] = []  # requests of each call
        self.told: list[tuple[str, tuple[str, ...]]] = []  # text and actions of each request

    def requests(self, states, actions):
        made = []
        for state, choice in zip(states, actions, strict=True):
            made.append(TokenisedRequest((1,), (len(self.told),), tuple((2,) for _ in choice)))
            self.told.append((state.observation, tuple(choice)))
        return made

    async def ask(self, requests):
        self.calls.append(len(requests))
        if not self.answers:
            return [None] * len(requests)
        asked = [self.told[request.body_ids[0]] for request in requests]
        return [
            ActionScores(tuple(logprobs(text, a) for a in actions), weights_version=self.VERSION)
            for text, actions in asked
        ]


def make_watched(cfg, encoder, **settings) -> Watched:
    """An untrained policy on compiled settings, and some of its settings set anew."""
    torch.manual_seed(0)
    for name, value in settings.items():
        setattr(cfg.policy.settings, name, value)
    policy = PriorZeroPolicy(cfg.policy)
    policy.attach_encoder(encoder.encode)
    return Watched(policy)


class Watched:
    """A policy whose planning is written down: `calls` holds (arguments, outputs)."""

    def __init__(self, policy) -> None:
        self._policy = policy
        self.calls: list[tuple[tuple, list]] = []
        self.collect_mode = SimpleNamespace(forward=self._watch(policy.collect_mode.forward))
        self.eval_mode = SimpleNamespace(forward=self._watch(policy.eval_mode.forward))

    def _watch(self, forward):
        def watched(*arguments):
            outputs = forward(*arguments)
            self.calls.append((arguments, outputs))
            return outputs

        return watched

    def __getattr__(self, name):
        return getattr(self._policy, name)
