"""Whole episodes without a search: the LLM alone, greedy or drawing, and uniform play.

A good rank along a walkthrough is not yet good play: on its own the LLM comes into states that no
walkthrough shows, and may walk in circles there. So besides the return it is counted how often a
step leads into a state that the episode has been in.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.evidence.metrics import reduce
from priorzero.evidence.scores import Asker
from priorzero.games.group import GameEnvGroup
from priorzero.play.slot import Slot
from priorzero.search.root_prior import log_softmax


@dataclass(frozen=True)
class Player:
    """Who chooses the commands.

    Attributes:
        asker: of the LLM; None plays uniformly.
        variant: the asker's prompt variant.
        reduction: how token log-probabilities become one number per command.
        temperature: 0 plays the favourite; a higher one draws from softmax(score / temperature).
    """

    asker: Asker | None = None
    variant: str | None = None
    reduction: str | None = None
    temperature: float = 1.0

    @property
    def name(self) -> str:
        if self.asker is None:
            return "uniform"
        drawn = "greedy" if self.temperature == 0 else f"drawn at {self.temperature:g}"
        return f"LLM, {self.variant}, {self.reduction}, {drawn}"


@dataclass(frozen=True)
class Episode:
    """A finished one.

    Attributes:
        total: the game's points it earned.
        steps: commands typed.
        revisits: how many of them led into a state the episode had been in.
    """

    total: float
    steps: int
    revisits: int


def play_figures(episodes: Sequence[Episode]) -> dict[str, float]:
    """Means over episodes; each name is explained in docs/METRICS.md."""
    returns = np.asarray([e.total for e in episodes])
    return {
        "episodes": len(episodes),
        "return": float(returns.mean()),
        "return_std": float(returns.std()),
        "return_best": float(returns.max()),
        "length": float(np.mean([e.steps for e in episodes])),
        "revisits": float(np.mean([e.revisits / e.steps for e in episodes])),
    }


async def play(player: Player, envs: GameEnvGroup, episodes: int, seed: int) -> list[Episode]:
    """Play whole episodes, as many at once as there are environments.

    Every call with one seed plays the same episode seeds, so that players can be compared.

    Raises:
        PriorZeroError: a game does not start, or the LLM's engine fails.
    """
    envs.seed(seed)
    rng = np.random.default_rng(seed)
    done: list[Episode] = []
    while len(done) < episodes:
        ids = range(min(len(envs), episodes - len(done)))
        done += await _round(player, envs, ids, rng)
    return done


async def _round(
    player: Player, envs: GameEnvGroup, ids: Sequence[int], rng: np.random.Generator
) -> list[Episode]:
    """One episode in each of these environments."""
    history_length = player.asker.history_length if player.asker else 0
    first = await asyncio.to_thread(envs.reset, ids)
    running = {
        i: Slot(
            i,
            envs.envs[i].episode_seed,
            first[i],
            goal=envs.envs[i].game.goal,
            history_length=history_length,
            context_steps=1,
        )
        for i in ids
    }
    seen = {i: {first[i]["state_hash"]} for i in ids}
    revisits = dict.fromkeys(ids, 0)

    done = {}
    while running:
        chosen = await _choose(player, running, rng)
        for i, answer in (await asyncio.to_thread(envs.step, chosen)).items():
            running[i].advance(chosen[i], float(answer.reward), answer.obs)
            revisits[i] += answer.obs["state_hash"] in seen[i]
            seen[i].add(answer.obs["state_hash"])
            if answer.done:
                done[i] = Episode(
                    answer.info["eval_episode_return"], running[i].timestep, revisits[i]
                )
                del running[i]
    return [done[i] for i in ids]


async def _choose(
    player: Player, running: Mapping[int, Slot], rng: np.random.Generator
) -> dict[int, str]:
    """Each environment's command."""
    states = {i: slot.state for i, slot in running.items()}
    if player.asker is None:
        return {i: str(rng.choice(state.valid_actions)) for i, state in states.items()}

    answers = await player.asker.ask(list(states.values()))
    chosen = {}
    for (i, state), answer in zip(states.items(), answers, strict=True):
        actions = state.valid_actions
        unconditional = np.zeros(len(actions))
        if player.reduction == "pmi":
            alone = await player.asker.unconditional(state.goal, actions)
            unconditional = np.asarray([alone[action] for action in actions])
        scores = reduce(answer.token_logprobs, unconditional, player.reduction)
        if player.temperature == 0:
            chosen[i] = actions[int(np.argmax(scores))]
        else:
            p = np.exp(log_softmax(scores / player.temperature))
            chosen[i] = actions[int(rng.choice(len(actions), p=p))]
    return chosen
