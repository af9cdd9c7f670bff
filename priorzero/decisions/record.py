"""One decision as one line of JSON. docs/DECISIONS.md explains every field.

Letters: `A` commands that could be chosen, `N` nodes of the search's tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from priorzero.search.root_prior import log_softmax
from priorzero.search.roots import SearchOutput, TreeNodes
from priorzero.types import ActionScores, TextState, TokenisedRequest

if TYPE_CHECKING:
    from ding.envs import BaseEnvTimestep

VERSION = 1

# Digits behind the point. Five of a probability are more than anybody sees, and few bytes.
_DIGITS = 5

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, eq=False)
class Moment:
    """A decision and its outcome, as the player hands them over.

    Attributes:
        state: what was seen.
        commands: `A` of them, what was chosen from.
        command: the chosen one.
        outcome: what the environment answered.
        request: what the LLM was asked; None without.
        scores: what it answered; None without.
        plan: what the search found, its arrays in the order of `commands`; None without a search.
        tree_commands: `[N]` the command of each node of the plan's tree; None for the root.
    """

    state: TextState
    commands: tuple[str, ...]
    command: str
    outcome: BaseEnvTimestep
    request: TokenisedRequest | None = None
    scores: ActionScores | None = None
    plan: SearchOutput | None = None
    tree_commands: Sequence[str | None] = ()


def decision_record(
    facts: Mapping[str, Any], step: int, moment: Moment, reduction: str, decode: Decode | None
) -> dict[str, Any]:
    """The line's fields, as plain values.

    Args:
        facts: of the episode; they stand in every line.
        step: actions played before in the episode.
        moment: the decision.
        reduction: how the LLM's token log-probabilities become one number per command.
        decode: token ids -> text, for prompt and thought; None leaves both out.
    """
    info, outcome = moment.outcome.info, moment.outcome
    record = {
        "v": VERSION,
        **facts,
        "step": step,
        "goal": moment.state.goal,
        "text": moment.state.observation,
        "score": moment.state.score,
        "commands": list(moment.commands),
        "chosen": moment.commands.index(moment.command),
        **_of_llm(moment, reduction, decode),
        **search_fields(moment.plan, moment.tree_commands),
        "reward": float(outcome.reward),
        "score_after": float(info["score"]),
        "end": info["done_kind"],
    }
    if outcome.done:
        record["last_text"] = outcome.obs["text"]
        record["return"] = float(info["eval_episode_return"])
    return record


def _of_llm(moment: Moment, reduction: str, decode: Decode | None) -> dict[str, Any]:
    """Prompt, thought and probabilities `[A]`; those that entered the root where there was one."""
    fields: dict[str, Any] = {}
    if decode is not None and moment.request is not None:
        fields["prompt"] = decode(moment.request.prompt_ids)
    if moment.scores is None:
        return fields

    if decode is not None and moment.scores.thought_ids:
        fields["thought"] = decode(moment.scores.thought_ids)
    totals = np.asarray(moment.scores.totals(reduction))
    logs = moment.plan.prior.log_llm if moment.plan is not None else log_softmax(totals)
    return fields | {
        "llm_version": moment.scores.weights_version,
        "llm_logprobs": _short(totals),
        "llm": _short(np.exp(logs)),
    }


def search_fields(plan: SearchOutput | None, commands: Sequence[str | None] = ()) -> dict[str, Any]:
    """What entered the root, what the search made of it, and its tree; empty without a search.

    Args:
        commands: `[N]` of the tree's nodes, see `tree_commands`.
    """
    if plan is None:
        return {}
    fields = {
        "llm_share": round(float(plan.prior.weight), _DIGITS),
        "world_model": _short(np.exp(plan.prior.log_wm)),
        "mixture": _short(np.exp(plan.prior.log_mixed)),
        "visits": _short(plan.visit_counts),
        "improved": _short(plan.target_policy),
        "behaviour": _short(plan.behaviour),
        "value": round(float(plan.root_value), _DIGITS),
        "predicted_value": round(float(plan.predicted_value), _DIGITS),
    }
    if plan.prior.temperature is not None:
        fields["llm_temperature"] = round(plan.prior.temperature, _DIGITS)
    for name, target in (("world_model", plan.world_model_target), ("llm", plan.llm_target)):
        if target is not None:
            fields[f"target_{name}"] = _short(target)
    if plan.tree is not None:
        fields["tree"] = _tree(plan.tree, commands)
    return fields


def _tree(tree: TreeNodes, commands: Sequence[str | None]) -> dict[str, list]:
    """The tree in columns `[N]`, with commands in place of action ids."""
    return {
        "parent": tree.parent.tolist(),
        "command": list(commands),
        "n": _short(tree.visits),
        "q": _short(tree.q),
        "p": _short(tree.prior),
        "reward": _short(tree.reward),
        "value": _short(tree.value),
    }


def tree_commands(
    tree: TreeNodes,
    valid_ids: np.ndarray,
    commands: Sequence[str],
    action_of: Callable[[int], str | None],
) -> list[str | None]:
    """The command of each node `[N]`; None for the root.

    Args:
        valid_ids: `[A]` ids of the root's commands.
        commands: `[A]` these commands.
        action_of: the vocabulary's name of an id; an id that names nothing is told as `#id`.
    """
    here = dict(zip(valid_ids.tolist(), commands, strict=True))
    named: list[str | None] = [None]
    for parent, action in zip(tree.parent[1:].tolist(), tree.action[1:].tolist(), strict=True):
        # Overflow ids mean different commands in different states: at the root it is known which.
        known = here[action] if parent == 0 else action_of(action)
        named.append(known if known is not None else f"#{action}")
    return named


def _short(values: np.ndarray) -> list[float | int]:
    """Rounded; whole numbers as such."""
    rounded = np.round(np.asarray(values, dtype=np.float64), _DIGITS)
    if (rounded == np.trunc(rounded)).all():
        return rounded.astype(np.int64).tolist()
    return rounded.tolist()
