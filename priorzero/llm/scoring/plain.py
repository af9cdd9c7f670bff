"""The plain way: prompt and action through the model's public forward, once per action.

Slow, and right for every causal model; what the other ways are compared with, and what scores a
model that none of them can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from priorzero.llm.scoring.items import TreeItem, headless


def plain_logprobs(
    causal_lm: torch.nn.Module, items: Sequence[TreeItem], max_tokens: int = 4096
) -> list[torch.Tensor]:
    """Flat token log-probabilities per item, float32, as `forward.tree_logprobs` gives them.

    The actions of one state are padded on the right, which no causal model can see; so there is no
    mask either.

    Args:
        max_tokens: padded tokens of one forward.
    """
    device = next(causal_lm.parameters()).device
    return [_one(causal_lm, item, max_tokens, device) for item in items]


def _one(causal_lm, item: TreeItem, max_tokens: int, device: torch.device) -> torch.Tensor:
    prompt, actions = item.request.prompt_ids, item.request.action_ids
    thought = [_thought(causal_lm, headless(item), device)] if item.written else []
    longest = max(len(a) for a in actions)
    length = len(prompt) + longest - 1  # the last token is predicted, never read
    together = max(1, max_tokens // length)

    flats = []
    for start in range(0, len(actions), together):
        chunk = actions[start : start + together]
        padded = [a + (0,) * (longest - len(a)) for a in chunk]
        ids = torch.tensor([prompt + p[:-1] for p in padded], device=device)
        out = causal_lm(input_ids=ids, logits_to_keep=longest, use_cache=False)
        logits = out.logits[:, -longest:].float()

        tokens = torch.tensor(padded, device=device)
        values = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        flats += [values[i, : len(action)] for i, action in enumerate(chunk)]
    return torch.cat(flats + thought)


def _thought(causal_lm, item: TreeItem, device: torch.device) -> torch.Tensor:
    """Log-probabilities of the ids at `item.written`."""
    first, end = item.written.start, item.written.stop
    assert first > 0, "nothing stands before the thought"
    ids = torch.tensor([item.request.body_ids[: end - 1]], device=device)
    out = causal_lm(input_ids=ids, logits_to_keep=end - first, use_cache=False)
    logits = out.logits[0, first - end :].float()
    tokens = torch.tensor(item.request.body_ids[first:end], device=device)
    return logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
