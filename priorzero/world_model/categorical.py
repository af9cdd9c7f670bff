"""Scalars as distributions over a support, and back (MuZero, arXiv:1911.08265, appendix F).

To the last bit LightZero's transforms, without what makes a GPU wait in theirs: zeros that are made
on the CPU and copied, and a look at the logits to guess whether they are probabilities already.

Letters: `B` rows, `T` steps, `S` = 2 * scale + 1 size of the support.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 0.001  # of the transform h (arXiv:1805.11593, proposition A.2)


class Support:
    """The integers -scale..scale, onto which h(x) = sign(x) (sqrt(|x| + 1) - 1) + epsilon x maps
    rewards and values.

    Args:
        scale: largest transformed scalar that can be told.
        device: where its tensors live.
    """

    def __init__(self, scale: int, device: str) -> None:
        self._scale = scale
        self._points = torch.arange(-scale, scale + 1, dtype=torch.float32, device=device)

    def two_hot(self, scalars: Tensor) -> Tensor:
        """Distributions `[B, T, S]` over the two points next to h(x), for scalars x `[B, T]`."""
        x = torch.sign(scalars) * (torch.sqrt(scalars.abs() + 1) - 1) + _EPSILON * scalars
        x = x.clamp(-self._scale, self._scale)
        low, high = x.floor(), x.ceil()
        above = x - low

        # At a point itself low and high are one, and what is written last stands: all of it. A nan
        # has no place: its probabilities stand at 0, for the update's check to find.
        target = torch.zeros(*x.shape, len(self._points), device=x.device)
        for point, share in ((high, above), (low, 1 - above)):
            index = (point.nan_to_num(0.0) + self._scale).long()
            target.scatter_(2, index.unsqueeze(-1), share.unsqueeze(-1))
        return target

    def scalars(self, logits: Tensor) -> Tensor:
        """h^-1 of the means of softmax(logits): `[n, S]` -> `[n, 1]`."""
        mean = (torch.softmax(logits, dim=1) * self._points).sum(1, keepdim=True)
        inner = torch.sqrt(1 + 4 * _EPSILON * (mean.abs() + 1 + _EPSILON)) - 1
        root = inner / (2 * _EPSILON)
        return torch.sign(mean) * (root * root - 1)
