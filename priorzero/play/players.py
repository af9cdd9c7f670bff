"""Who plays, and what a player does in a state: a search's answer, or a draw from the LLM alone, in
the one form in which the collector plays it and writes it down.

Letters: `A` valid actions of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from priorzero.search.root_prior import log_softmax
from priorzero.search.roots import SearchOutput

Player = Literal["search", "search_alone", "llm"]
"""search: the search with the LLM's prior, as the settings mix it. search_alone: without it; the
LLM is not asked. llm: the LLM, without a search."""


@dataclass(frozen=True, eq=False)
class Move:
    """What is played in a state, and all that is known about why.

    Attributes:
        action_index: position of the chosen action.
        behaviour: `[A]` probabilities it was drawn from.
        target_policy: `[A]` what the world model's policy is trained on, and the LLM; without a
            search `behaviour`, there is nothing better.
        visit_counts: `[A]` of the search; all 0 without one.
        root_value: of the search; nan without one.
        predicted_value: of the network before the search; nan without one.
        prior_weight: the LLM's share in what was played from.
        plan: all that the search said, for whoever records it; None without one.
        llm_target: `[A]` what the LLM is trained on, where that is something else; else None.
    """

    action_index: int
    behaviour: np.ndarray
    target_policy: np.ndarray
    visit_counts: np.ndarray
    root_value: float
    predicted_value: float
    prior_weight: float
    plan: SearchOutput | None = None
    llm_target: np.ndarray | None = None


def search_move(plan: SearchOutput) -> Move:
    """What the search decided."""
    own, llm = plan.world_model_target, plan.llm_target
    if llm is None and own is not None:
        llm = plan.target_policy  # the mixture's, which is not what the world model learns
    return Move(
        action_index=plan.action_index,
        behaviour=plan.behaviour,
        target_policy=plan.target_policy if own is None else own,
        visit_counts=plan.visit_counts,
        root_value=plan.root_value,
        predicted_value=plan.predicted_value,
        prior_weight=plan.prior.weight,
        plan=plan,
        llm_target=llm,
    )


def llm_policy(logprobs: np.ndarray, temperature: float) -> np.ndarray:
    """The LLM over the valid actions: softmax(l / temperature).

    Args:
        logprobs: `[A]` its log-probabilities l, already reduced over tokens.
        temperature: positive.
    """
    return np.exp(log_softmax(logprobs / temperature))


def llm_move(logprobs: np.ndarray, temperature: float, rng: np.random.Generator) -> Move:
    """A draw from `llm_policy`."""
    policy = llm_policy(logprobs, temperature)
    return Move(
        action_index=int(rng.choice(len(policy), p=policy)),
        behaviour=policy,
        target_policy=policy,
        visit_counts=np.zeros(len(policy)),
        root_value=float("nan"),
        predicted_value=float("nan"),
        prior_weight=1.0,
    )
