"""Log-probabilities of all actions of many states, with or without gradients: `tree_logprobs`.

A state's tokens are its prompt body, then the inner nodes of its actions' token trie. A mask lets a
node see the prompt and its own ancestors only, so one forward equals one full forward per action.
The head, common to many states, is computed once; its keys and values serve all of them.

Which way a batch is computed hangs on device, length and model (`choose_way`). Each way is compared
once per model with the model's own public forward; a model that none of them can do takes a full
forward per action.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from priorzero.llm.module import base_model
from priorzero.llm.scoring.adapters import plain_adapters
from priorzero.llm.scoring.head_cache import HeadCache, head_key_values
from priorzero.llm.scoring.items import LayerKV, TreeItem, headless, prepare
from priorzero.llm.scoring.layers import (
    checkpointed_layers,
    is_out_of_memory,
    multiplying_dtype,
    sliding_window,
)
from priorzero.llm.scoring.logits import token_logprobs
from priorzero.llm.scoring.packed import lay_out, packed_pass, run_packed, supports_packing
from priorzero.llm.scoring.padded import padded_pass
from priorzero.llm.scoring.plain import plain_logprobs
from priorzero.llm.scoring.trunk import TrunkCache
from priorzero.llm.scoring.two_pass import two_pass
from priorzero.types import TokenisedRequest

logger = logging.getLogger(__name__)

TWO_PASS_TOKENS = 1024  # body tokens from which a GPU takes two passes

# What the check of a way allows, in nats of a token: the largest difference in float32, the mean
# one in 16 bits, where single tokens differ by a few tenths in every implementation.
_LARGEST, _MEAN_16_BITS = 2e-3, 0.4

_checked: WeakKeyDictionary[torch.nn.Module, dict[str, str]] = WeakKeyDictionary()


@contextlib.contextmanager
def computing(device: torch.device, dtype: torch.dtype | None):
    """Context of every forward: autocast to `dtype` (None: the weights' own), no cuDNN attention.

    cuDNN makes a plan for every new shape, and every batch of prompts has one.
    """
    with contextlib.ExitStack() as stack:
        if dtype is not None:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        if device.type == "cuda":
            from torch.nn.attention import SDPBackend, sdpa_kernel

            kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
            stack.enter_context(sdpa_kernel(kernels))
        yield


def tree_logprobs(
    model: torch.nn.Module,
    items: Sequence[TreeItem],
    *,
    heads: HeadCache | None = None,
    trunk: TrunkCache | None = None,
    way: str | None = None,
    logit_rows: int = 512,
    checkpointing: bool = False,
) -> list[torch.Tensor]:
    """Log-probabilities (natural log, temperature 1, float32) of all action tokens of one batch.

    Gradients follow the surrounding grad mode.

    Args:
        items: states with one common head (`plan_batches`).
        heads: keeps heads between calls; for use without gradients. Without it the head is computed
            here, once for the batch, with gradients where they are on.
        trunk: outputs of frozen layers; used where states are packed.
        way: "packed", "padded", "two_pass" or "plain"; None: `choose_way`.
        logit_rows: rows of logits `[R, N]` held at a time (autograd keeps them all).
        checkpointing: keep only what goes into each layer for the backward, which computes the rest
            again (`checkpointed_layers`). Nothing is handed on as keys and values then: the head is
            computed with every state where states are padded.

    Returns:
        per item one flat tensor: the tokens of its actions one after another, with the lengths of
        `request.action_ids`, then those of its `written` thought.
    """
    assert not any(item.request.reasoning for item in items), "the chain of thought comes first"
    head_ids = items[0].request.head_ids
    assert all(item.request.head_ids == head_ids for item in items), "one head per batch"

    causal_lm = base_model(model)
    way = way or choose_way(model, items, passes=1 if checkpointing else 2)
    if checkpointing:
        assert heads is None and way != "two_pass", "computed again, keys and values come twice"
        items = [headless(item) for item in items] if way == "padded" else items

    with checkpointed_layers(model) if checkpointing else plain_adapters(model):
        if way == "plain":
            return plain_logprobs(causal_lm, items)
        hidden = _row_states(model, items, way, heads, trunk, all_tokens=checkpointing)
    return token_logprobs(causal_lm, hidden, items, logit_rows, checkpointing)


def _row_states(
    model: torch.nn.Module,
    items: Sequence[TreeItem],
    way: str,
    heads: HeadCache | None,
    trunk: TrunkCache | None,
    all_tokens: bool,
) -> torch.Tensor:
    """Hidden states `[R, D]` of the rows, state after state.

    Args:
        all_tokens: leave out nothing that rows do not need: a layer that is computed again must
            come out as before.
    """
    causal_lm = base_model(model)
    head_ids, head_kv = items[0].request.head_ids, None

    # An empty body has no token whose output ends the prompt, so the head joins the body then.
    if head_ids and (way == "two_pass" or any(item.needs_body for item in items)):
        items, head_ids = [headless(item) for item in items], ()
    if head_ids and heads is not None:
        head_kv = heads.get(model, head_ids, trunk)

    if way == "two_pass":
        return two_pass(causal_lm, items)
    if way == "packed" and trunk is not None:
        return _packed_on_trunk(causal_lm, items, head_kv, trunk, all_tokens)
    if way == "packed":
        return packed_pass(causal_lm, items, head_kv, all_tokens)
    if head_ids and head_kv is None:
        head_kv = head_key_values(model, head_ids)
    return padded_pass(causal_lm, items, head_kv)


def _packed_on_trunk(
    causal_lm: torch.nn.Module,
    items: Sequence[TreeItem],
    head_kv: LayerKV | None,
    trunk: TrunkCache,
    all_tokens: bool,
) -> torch.Tensor:
    """As `packed_pass`, with the frozen lower layers' outputs from the trunk where it has them."""
    device = next(causal_lm.parameters()).device
    inputs = lay_out(causal_lm, items, head_kv, device)
    below = trunk.hidden(causal_lm, items, head_kv is None, device)
    rows = None if all_tokens else inputs.places
    return run_packed(causal_lm, inputs, trunk.depth, hidden=below, rows=rows)[inputs.places]


def choose_way(model: torch.nn.Module, items: Sequence[TreeItem], passes: int = 2) -> str:
    """How to compute these states together: "packed", "padded", "two_pass" or "plain".

    Args:
        passes: at most so many; with 1 "two_pass" is out of the question.
    """
    causal_lm = base_model(model)

    # The tree's mask is the full mask; a window that is shorter than the line would need another.
    window = sliding_window(causal_lm.config)
    longest = max(len(item.request.head_ids) + item.num_tokens for item in items)
    if window and longest > window:
        why = f"it attends over a sliding window of {window} tokens, and prompts are longer"
        _say_plain(causal_lm, "window", why)
        return "plain"

    failures = ""
    for way in _candidates(causal_lm, items, passes):
        failure = _fault(causal_lm, way)
        if not failure:
            return way
        failures = f"{failures}; {way}: {failure}".removeprefix("; ")
    _say_plain(causal_lm, "ways", failures)
    return "plain"


def _candidates(causal_lm: torch.nn.Module, items: Sequence[TreeItem], passes: int) -> list[str]:
    """Ways for these states, the fastest first."""
    if next(causal_lm.parameters()).device.type == "cuda":
        # On a GPU padding costs less than the many small kernels of a packed line.
        longest = max(len(item.request.body_ids) for item in items)
        long = passes > 1 and longest >= TWO_PASS_TOKENS
        return ["two_pass", "padded"] if long else ["padded"]
    return ["packed", "padded"] if supports_packing(causal_lm) else ["padded"]


def _say_plain(causal_lm: torch.nn.Module, key: str, why: str) -> None:
    """Once per model and reason: it is scored with one full forward per action."""
    told = _checked.setdefault(causal_lm, {})
    if key not in told:
        told[key] = why
        logger.warning(
            "the LLM's %s is scored with one full forward per action, which is slow: %s",
            type(causal_lm).__name__,
            why,
        )


def _fault(causal_lm: torch.nn.Module, way: str) -> str:
    """Why this way does not give the model's own numbers, or "". Looked at once per model and way,
    on a small made-up state.
    """
    found = _checked.setdefault(causal_lm, {})
    if way not in found:
        training = causal_lm.training
        causal_lm.eval()
        try:
            with torch.no_grad():
                found[way] = _compare(causal_lm, way)
        finally:
            causal_lm.train(training)
            # What autocast remembers of a weight without gradients must not serve a backward.
            torch.clear_autocast_cache()
    return found[way]


def _compare(causal_lm: torch.nn.Module, way: str) -> str:
    """A small batch by `way` and by the public forward: what differs in words, or ""."""
    items = _made_up_states(causal_lm.get_input_embeddings().weight.shape[0])
    expected = torch.cat(plain_logprobs(causal_lm, items))
    try:
        got = torch.cat(tree_logprobs(causal_lm, items, heads=HeadCache(), way=way))
    except Exception as error:  # whatever a foreign architecture does not know
        if is_out_of_memory(error):
            raise  # says nothing of the way
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"

    difference = (got - expected).abs()
    exact = multiplying_dtype(causal_lm, got.device) == torch.float32
    off = float(difference.max() if exact else difference.mean())
    if off <= (_LARGEST if exact else _MEAN_16_BITS):  # False for NaN
        return ""
    return f"its log-probabilities are {off:.2g} off the model's own"


def _made_up_states(vocabulary: int) -> list[TreeItem]:
    """Two states of two lengths behind one head, whose actions branch; one has a thought."""

    def ids(count: int, start: int) -> tuple[int, ...]:
        return tuple((start + 7919 * i) % vocabulary for i in range(1, count + 1))

    head, (a, b, c, d) = ids(6, 5), ids(4, 3)
    actions = ((a, b, d), (a, c, d), (a, b, c, d), (c, d))
    return prepare(
        [
            TokenisedRequest(head, ids(13, 17), actions),
            TokenisedRequest(head, ids(8, 29), actions[1:]),
        ],
        [range(9, 12), range(0)],
    )
