"""How the LLM enters the search: one pure function that mixes its prior with the world model's
policy at the root.

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
"""

from __future__ import annotations

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
    None where no LLM answered. weight: the LLM's share w.
    """

    log_mixed: np.ndarray
    log_wm: np.ndarray
    log_llm: np.ndarray | None
    weight: float

    @property
    def kl_from_wm(self) -> float:
        """KL(mixed || world model): how much the LLM changed what the search starts from."""
        return float(np.sum(np.exp(self.log_mixed) * (self.log_mixed - self.log_wm)))

    @property
    def entropy(self) -> float:
        """Entropy of the mixture in nats."""
        return float(-np.sum(np.exp(self.log_mixed) * self.log_mixed))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax of `[A]`, floored at LOG_FLOOR and renormalised."""
    x = logits - logits.max()
    x = np.maximum(x - np.log(np.exp(x).sum()), LOG_FLOOR)
    return x - np.log(np.exp(x).sum())


def prior_weight(settings: RootPriorSettings, log_wm: np.ndarray, env_steps: int) -> float:
    """The LLM's weight w at one root, in [0, 1]."""
    if settings.mode == "wm_logits":
        return 0.0
    if settings.mode == "llm_logits":
        return 1.0
    if settings.weighting == "fixed":
        return settings.weight
    progress = min(env_steps / settings.anneal_env_steps, 1.0)
    scheduled = settings.weight_max + (settings.weight_min - settings.weight_max) * progress
    actions = len(log_wm)
    unsure = -np.sum(np.exp(log_wm) * log_wm) / np.log(actions) if actions > 1 else 0.0
    return float(settings.weight_min + (scheduled - settings.weight_min) * unsure)


def mix_root_prior(
    wm_logits: np.ndarray,
    llm_logprobs: np.ndarray | None,
    settings: RootPriorSettings,
    env_steps: int,
) -> RootPrior:
    """Mix the two opinions on the valid actions of one root; see the module's equations.

    Args:
        wm_logits: `[A]` world-model policy logits of the valid actions.
        llm_logprobs: `[A]` log-probabilities from the LLM (already reduced over tokens), or None
            where no LLM answered; then the world model stands alone, whatever the mode.
        env_steps: environment steps collected so far (for the annealing).
    """
    log_wm = log_softmax(np.asarray(wm_logits, dtype=np.float64))
    if llm_logprobs is None:
        return RootPrior(log_wm, log_wm, None, 0.0)
    llm = np.asarray(llm_logprobs, dtype=np.float64)
    assert llm.shape == log_wm.shape and not np.isnan(llm).any(), (
        f"the engine must give one number per valid action, got {llm} for {len(log_wm)}"
    )

    log_llm = log_softmax(llm / settings.temperature)
    weight = prior_weight(settings, log_wm, env_steps)
    if settings.mixing == "logits":
        mixed = log_softmax(weight * log_llm + (1.0 - weight) * log_wm)
    else:
        mixed = log_softmax(np.log(weight * np.exp(log_llm) + (1.0 - weight) * np.exp(log_wm)))
    return RootPrior(mixed, log_wm, log_llm, weight)
