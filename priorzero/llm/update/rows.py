"""The LLM's samples as rows of other trainers' data sets: TRL's, verl's and Open-Reasoner-Zero's.

Token ids are what was scored in play; the texts beside them are those ids decoded. Used by
`python -m priorzero.export_samples` and `priorzero.export_orz`; the manual tells what each file is
for.

Letters: `A` valid actions of the state, `K` rows drawn from a decision's target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from priorzero.llm.prompts import read_messages
from priorzero.llm.update.samples import LLMSample
from priorzero.settings.llm import PromptSettings

Row = dict[str, Any]


class Texts:
    """Token ids as text, and how often a text would not give its ids back.

    Args:
        tokenizer: of the run's LLM.

    Attributes:
        differing: texts so far that the tokenizer splits otherwise than their ids.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.differing = 0

    def __call__(self, *parts: Sequence[int]) -> str:
        """The text of ids, special tokens included.

        Args:
            parts: they stand one behind the other.
        """
        ids = [token for part in parts for token in part]
        text = self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        self.differing += self._tokenizer(text, add_special_tokens=False)["input_ids"] != ids
        return text


def given(sample: LLMSample) -> tuple[int, ...]:
    """Ids of the prompt without the chain of thought."""
    ids = sample.request.prompt_ids
    return ids[: len(ids) - sample.thought_tokens]


def thought(sample: LLMSample) -> tuple[int, ...]:
    """Ids of the chain of thought, action marker included."""
    ids = sample.request.prompt_ids
    return ids[len(ids) - sample.thought_tokens :]


# ---- TRL -----------------------------------------------------------------------------------------


def sft_rows(
    samples: Sequence[LLMSample], texts: Texts, draws: int, rng: np.random.Generator
) -> Iterator[Row]:
    """TRL's tokenised prompt-completion rows (SFTTrainer): `draws` actions of each decision, drawn
    from the search's policy, so that rows of equal weight have the mean loss -sum_a pi_a log P(a).

    The loss is over the action's tokens; a chain of thought is context.
    """
    for number, sample in enumerate(samples):
        request = sample.request
        prompt, text = list(request.prompt_ids), texts(request.prompt_ids)
        for action in drawn_actions(sample.target_policy, draws, rng):
            ids = list(request.action_ids[action])
            yield {
                "input_ids": prompt + ids,
                "completion_mask": [0] * len(prompt) + [1] * len(ids),
                "prompt": text,
                "completion": texts(ids),
                "target": sample.target_policy[action],
                "decision": number,
            }


def drawn_actions(target: Sequence[float], draws: int, rng: np.random.Generator) -> list[int]:
    """Systematic draws: action a comes floor(K pi_a) or ceil(K pi_a) times, K pi_a in the mean.

    Args:
        target: `[A]` pi, sums to one.
        draws: `K`.

    Returns:
        `[K]` actions in ascending order.
    """
    places = (np.arange(draws) + rng.random()) / draws
    ends = np.cumsum(target)
    # Rounding may leave the last end below 1.
    return np.minimum(np.searchsorted(ends / ends[-1], places, "right"), len(target) - 1).tolist()


def unpaired_rows(samples: Sequence[LLMSample], texts: Texts) -> Iterator[Row]:
    """TRL's unpaired-preference rows (KTOTrainer): the played action, desirable where its advantage
    is above the mean of all samples (as `llm.rft.advantage` = batch subtracts it); and beside that
    what a policy gradient needs.

    The completion is chain of thought and action. `completion_logprobs` are the engine's, null for
    tokens that the LLM did not write; null as a whole where the engine did not answer.
    """
    usual = fmean(sample.advantage for sample in samples)
    for number, sample in enumerate(samples):
        action = sample.action_index
        prompt, completion = given(sample), thought(sample) + sample.request.action_ids[action]
        yield {
            "prompt": texts(prompt),
            "completion": texts(completion),
            "label": sample.advantage > usual,
            "advantage": sample.advantage,
            "value_target": sample.value_target,
            "predicted_value": sample.predicted_value,
            "prompt_ids": list(prompt),
            "completion_ids": list(completion),
            "completion_logprobs": _logprobs(sample),
            "behaviour": sample.behaviour[action],
            "target": sample.target_policy[action],
            "policy_version": sample.policy_version,
            "decision": number,
        }


def _logprobs(sample: LLMSample) -> list[float | None] | None:
    """Of the tokens of `thought` and action."""
    if sample.collected_logprobs is None:
        return None
    marker = [None] * (sample.thought_tokens - len(sample.thought_logprobs))
    action = sample.collected_logprobs[sample.action_index]
    return [*sample.thought_logprobs, *marker, *action]


# ---- verl ----------------------------------------------------------------------------------------


def verl_rows(
    samples: Sequence[LLMSample],
    texts: Texts,
    settings: PromptSettings,
    tokenizer,
    game: str,
) -> Iterator[Row]:
    """verl's rows: messages to answer, what rewards an answer, and the decision in `extra_info`.

    Args:
        settings: with which the prompts were built.
        game: for `data_source`, by which verl chooses the reward function.

    Raises:
        PriorZeroError: the prompts have no messages; see `read_messages`.
    """
    for number, sample in enumerate(samples):
        request, actions = sample.request, [texts(ids[:-1]) for ids in sample.request.action_ids]
        commands = [text.strip() for text in actions]
        best = int(np.argmax(sample.target_policy))

        yield {
            "data_source": f"priorzero/{game}",
            "prompt": read_messages(texts(given(sample)), settings, tokenizer),
            "ability": "text_game",
            "reward_model": {"style": "rule", "ground_truth": commands[best]},
            "extra_info": {
                "split": "train",
                "index": number,
                "valid_actions": commands,
                "target_policy": list(sample.target_policy),
                "behaviour": list(sample.behaviour),
                "action_index": sample.action_index,
                "advantage": sample.advantage,
                "value_target": sample.value_target,
                "predicted_value": sample.predicted_value,
                "prompt_ids": list(given(sample)),
                "thought_ids": list(thought(sample)),
                "thought_logprobs": list(sample.thought_logprobs),
                "action_ids": [list(ids) for ids in request.action_ids],
                "action_logprobs": sample.collected_logprobs
                and [list(one) for one in sample.collected_logprobs],
                "policy_version": sample.policy_version,
            },
        }


# ---- Open-Reasoner-Zero --------------------------------------------------------------------------


def orz_dialogue(sample: LLMSample, texts: Texts, settings: PromptSettings, tokenizer) -> list[Row]:
    """One dialogue of its prompt files: what is asked, and the true answer, which is the search's
    favourite; beside it, for a reward function of one's own, all valid actions and the search's
    policy over them. ORZ puts its own template around the question.

    Args:
        settings: with which the prompts were built.

    Raises:
        PriorZeroError: the prompts have no messages; see `read_messages`.
    """
    messages = read_messages(texts(given(sample)), settings, tokenizer)
    commands = [texts(ids[:-1]).strip() for ids in sample.request.action_ids]
    truth = {
        "value": commands[int(np.argmax(sample.target_policy))],
        "valid_actions": commands,
        "target_policy": list(sample.target_policy),
    }
    question = "\n\n".join(message["content"] for message in messages)
    return [{"from": "human", "value": question}, {"from": "assistant", "ground_truth": truth}]
