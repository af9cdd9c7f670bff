"""How the LLM enters the search: one pure function that mixes its priors with the world model's
policy at the roots.

For a state with valid actions a_1..a_A:

    p_LLM = softmax(l_i / temperature),  l_i = sum or mean over tokens of
                                               log P_LLM(tokens of a_i | prompt)
    p_WM  = softmax(z_i),                z_i = the world model's policy logits of the valid actions

    mixing "logits" (a product of experts):  log p = w log p_LLM + (1 - w) log p_WM - log Z
    mixing "probabilities":                      p = w p_LLM + (1 - w) p_WM

    mode "wm_logits": w = 0      "llm_logits": w = 1      "llm_plus_wm_logits": w as scheduled
    weighting "fixed":     w = weight
    weighting "adaptive":  w = weight_min + (s - weight_min) * H(p_WM) / log A,
                           s annealed linearly from weight_max to weight_min over anneal_env_steps

so with "adaptive" the LLM counts more where the world model is unsure, and less as training goes
on. Collect and eval call the same function; Dirichlet noise is added afterwards, by the tree, in
collect only (AlphaZero, arXiv:1712.01815).

Letters: `A` valid actions of a root, `R` roots that have equally many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from priorzero.settings.policy import RootPriorSettings

# exp(-30) is 1e-13: no action is ruled out by one very long text, and the C++ tree's float softmax
# stays finite.
LOG_FLOOR = -30.0


@dataclass(frozen=True)
class RootPrior:
    """The mixture at one root.

    log_mixed, log_wm, log_llm: `[A]` natural logs in the order of the valid actions; log_llm is
    None where no LLM answered. weight: the LLM's share w. temperature: of log_llm; None where no
    LLM answered.
    """

    log_mixed: np.ndarray
    log_wm: np.ndarray
    log_llm: np.ndarray | None
    weight: float
    temperature: float | None = None

    @property
    def kl_from_wm(self) -> float:
        """KL(mixed || world model): how much the LLM changed what the search starts from."""
        return float(np.sum(np.exp(self.log_mixed) * (self.log_mixed - self.log_wm)))

    @property
    def entropy(self) -> float:
        """Entropy of the mixture in nats."""
        return float(-np.sum(np.exp(self.log_mixed) * self.log_mixed))


def prior_in_target(name: str, prior: RootPrior, llm_logprobs: np.ndarray | None) -> np.ndarray:
    """log p_t `[A]`, the prior of a learner in its training target.

    A target is an operator on a prior and on what the search found. With the mixture as prior, the
    search teaches each learner the other one's opinion too, on actions of which nothing was found;
    with the learner's own, only what was found.

    Args:
        name: "mixture": what the search started from. "world_model": p_WM. "llm": softmax(l), the
            LLM as it is trained, at temperature 1: at another one it would drift towards its own
            sharpened or softened self where the search says nothing. Where no LLM answered, the
            mixture, which is then the world model's policy.
        llm_logprobs: `[A]` l, or None.
    """
    if name == "world_model":
        return prior.log_wm
    if name == "llm" and llm_logprobs is not None:
        return log_softmax(llm_logprobs)
    assert name in ("mixture", "llm"), name
    return prior.log_mixed


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of `[..., A]`, floored at LOG_FLOOR and renormalised."""
    x = logits - logits.max(axis=-1, keepdims=True)
    x = np.maximum(x - np.log(np.exp(x).sum(axis=-1, keepdims=True)), LOG_FLOOR)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def prior_weight(settings: RootPriorSettings, log_wm: np.ndarray, env_steps: int) -> np.ndarray:
    """The LLM's weight w in [0, 1] at roots with the world model's `log_wm` `[..., A]`; `[...]`."""
    alike = {"wm_logits": 0.0, "llm_logits": 1.0}.get(settings.mode)
    if alike is None and settings.weighting == "fixed":
        alike = settings.weight
    if alike is not None:
        return np.full(log_wm.shape[:-1], alike)

    progress = min(env_steps / settings.anneal_env_steps, 1.0)
    scheduled = settings.weight_max + (settings.weight_min - settings.weight_max) * progress
    actions = log_wm.shape[-1]
    # One action leaves no doubt: its entropy is 0, as is the logarithm of 1.
    unsure = -np.sum(np.exp(log_wm) * log_wm, axis=-1) / np.log(max(actions, 2))
    return settings.weight_min + (scheduled - settings.weight_min) * unsure


def mix_root_priors(
    wm_logits: Sequence[np.ndarray],
    llm_logprobs: Sequence[np.ndarray | None],
    settings: RootPriorSettings,
    env_steps: int,
) -> list[RootPrior]:
    """Mix the two opinions on the valid actions of each root; see the module's equations.

    Args:
        wm_logits: per root `[A]` world-model policy logits of the valid actions.
        llm_logprobs: per root `[A]` log-probabilities from the LLM (already reduced over tokens),
            or None where no LLM answered; then the world model stands alone, whatever the mode.
        settings: with a number as temperature; where it is calibrated, the present one.
        env_steps: environment steps collected so far (for the annealing).

    Returns:
        one per root; its numbers do not depend on the other roots.
    """
    # Roots with equally many actions are one array. Padding to the longest would be one array for
    # all, but sums over padded rows round otherwise than over the rows themselves.
    alike: dict[tuple[int, bool], list[int]] = {}
    for row, (wm, llm) in enumerate(zip(wm_logits, llm_logprobs, strict=True)):
        assert llm is None or np.shape(llm) == wm.shape, (
            f"the engine must give one number per valid action, got {llm} for {len(wm)}"
        )
        alike.setdefault((len(wm), llm is None), []).append(row)

    priors: dict[int, RootPrior] = {}
    for (_, alone), rows in alike.items():
        log_wm = log_softmax(np.array([wm_logits[row] for row in rows], dtype=np.float64))
        if alone:
            priors |= {
                row: RootPrior(log, log, None, 0.0) for row, log in zip(rows, log_wm, strict=True)
            }
            continue
        llm = np.array([llm_logprobs[row] for row in rows], dtype=np.float64)
        assert not np.isnan(llm).any(), f"the engine must give one number per valid action: {llm}"
        mixed, log_llm, weight = _mix(log_wm, llm, settings, env_steps)
        for i, row in enumerate(rows):
            share, temperature = float(weight[i]), float(settings.temperature)
            priors[row] = RootPrior(mixed[i], log_wm[i], log_llm[i], share, temperature)
    return [priors[row] for row in range(len(priors))]


def _mix(
    log_wm: np.ndarray, llm: np.ndarray, settings: RootPriorSettings, env_steps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log p and log p_LLM `[R, A]`, and w `[R]`, from log p_WM and the LLM's numbers `[R, A]`."""
    assert not settings.calibrated, "whoever plans knows the temperature of the moment"
    log_llm = log_softmax(llm / settings.temperature)
    weight = prior_weight(settings, log_wm, env_steps)
    w = weight[:, None]
    if settings.mixing == "logits":
        mixed = log_softmax(w * log_llm + (1.0 - w) * log_wm)
    else:
        mixed = log_softmax(np.log(w * np.exp(log_llm) + (1.0 - w) * np.exp(log_wm)))
    return mixed, log_llm, weight
