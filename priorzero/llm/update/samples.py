"""What the LLM is trained on: one record per decision, whoever trains it and with which objective.

The buffer builds the samples (`build_sample`), trainers read them. A sample holds token ids, not
text: what was scored in play is what is trained on, a generated chain of thought included.

Letters: `A` valid actions of the state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from priorzero.types import TokenisedRequest

if TYPE_CHECKING:
    from priorzero.data.segment import StepRecord


@dataclass(frozen=True)
class LLMSample:
    """One decision.

    The whole sequence of the executed action is `request.prompt_ids` followed by
    `request.action_ids[action_index]`. Of the prompt, the last `thought_tokens` ids were generated
    by the LLM; all before them were given to it. So the mask of every kind of token follows from
    two lengths.

    Attributes:
        request: token ids of the prompt (the chain of thought is the end of its body) and of every
            valid action.
        thought_tokens: how many ids at the end of `request.body_ids` are the chain of thought,
            action marker included; 0 where none was generated.
        thought_logprobs: what the engine gave to the thought's ids as it wrote them; they are the
            first ones, the marker's behind them were not written.
        thought_ended: whether the LLM itself ended the thought, by writing the marker.
        action_index: which action was executed.
        target_policy: `[A]` probabilities, what the search would play (no exploration noise), from
            the prior that `llm.sft.target_prior` names; `behaviour` where the LLM played alone.
        behaviour: `[A]` probabilities the executed action was drawn from.
        collected_logprobs: `[A]` tuples of token log-probabilities (natural log) the engine gave
            when the action was chosen; None where it did not answer.
        policy_version: LLM weights that gave them.
        value_target: n-step return of the decision; in a group, the return it is rated by.
        predicted_value: what the world model expected before the search; in a group, its baseline.
        spread: what advantages are divided by; 1 outside of groups.
    """

    request: TokenisedRequest
    thought_tokens: int
    thought_logprobs: tuple[float, ...]
    action_index: int
    target_policy: tuple[float, ...]
    behaviour: tuple[float, ...]
    collected_logprobs: tuple[tuple[float, ...], ...] | None
    policy_version: int
    value_target: float
    predicted_value: float
    thought_ended: bool = False
    spread: float = 1.0

    def __post_init__(self) -> None:
        actions = len(self.request.action_ids)
        assert not self.request.reasoning, "the thought belongs into the prompt of a sample"
        assert 0 <= self.thought_tokens <= len(self.request.body_ids)
        assert len(self.thought_logprobs) <= self.thought_tokens
        assert 0 <= self.action_index < actions, f"action {self.action_index} of {actions}"
        assert len(self.target_policy) == len(self.behaviour) == actions
        assert min(self.target_policy) >= 0 and abs(sum(self.target_policy) - 1) < 1e-3, (
            f"a target must be a distribution, got {self.target_policy}"
        )
        assert self.collected_logprobs is None or len(self.collected_logprobs) == actions

    @property
    def written(self) -> range:
        """Where in `request.body_ids` the ids are that the LLM wrote itself."""
        start = len(self.request.body_ids) - self.thought_tokens
        return range(start, start + len(self.thought_logprobs))

    @property
    def advantage(self) -> float:
        """How much better the decision turned out than expected."""
        return (self.value_target - self.predicted_value) / self.spread


def build_sample(
    step: StepRecord, value_target: float, expected: float | None = None, spread: float = 1.0
) -> LLMSample | None:
    """The sample of a played step.

    Args:
        step: the decision as it was recorded.
        value_target: its n-step return (`priorzero/data/returns.py`), or what its group rates it by
            (`priorzero/llm/update/groups.py`).
        expected: what that is held against; None: what the world model predicted.
        spread: what the difference is divided by.

    Returns:
        None where there is nothing to train on: the LLM was never asked, or a chain of thought
        was wanted and none came, so that what the LLM would have been asked is not known.
    """
    request, scores = step.request, step.scores
    if request is None:
        return None
    thought = scores.thought_ids if scores is not None else ()
    if request.reasoning and not thought:
        return None

    target = step.target_policy if step.llm_target is None else step.llm_target
    return LLMSample(
        request=request.with_thought(thought) if thought else request,
        thought_tokens=len(thought),
        thought_logprobs=scores.thought_logprobs if scores is not None else (),
        action_index=step.action_index,
        target_policy=tuple(float(p) for p in target),
        behaviour=tuple(float(p) for p in step.behaviour),
        collected_logprobs=scores.token_logprobs if scores is not None else None,
        policy_version=scores.weights_version if scores is not None else 0,
        value_target=float(value_target),
        predicted_value=float(step.predicted_value if expected is None else expected),
        thought_ended=scores is not None and scores.thought_ended,
        spread=spread,
    )
