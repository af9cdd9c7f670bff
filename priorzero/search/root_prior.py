"""How the LLM enters the search: one pure function that mixes its prior with the world model's
policy at the root.

For a state with valid actions a_1..a_A:

    p_LLM = softmax( l_i / temperature ),      l_i = sum or mean over tokens of log P_LLM(tokens of
    a_i | prompt) p_WM  = softmax( z_i ),                    z_i = world model's policy logits of
    the valid actions only log p = w log p_LLM + (1 - w) log p_WM - log Z
    (mixing "logits", a product of experts) p     = w p_LLM + (1 - w) p_WM
    (mixing "probabilities")

    mode "wm_logits":  w = 0       mode "llm_logits":  w = 1       mode "llm_plus_wm_logits":  w as
    scheduled weighting "fixed":     w = weight weighting "adaptive":  w = weight_min + (s -
    weight_min) * H(p_WM) / log A,
                           s annealed linearly from weight_max to weight_min over anneal_env_steps

so with "adaptive" the LLM counts more where the world model is unsure, and less as training goes
on. Collect and eval call the same function; Dirichlet noise is added afterwards, by the tree, in
collect only (AlphaZero, arXiv:1712.01815).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from priorzero.types import PriorZeroError

MODES = ("llm_logits", "wm_logits", "llm_plus_wm_logits")
# exp(-30) is 1e-13: no action is ruled out by one very long text, and the C++ tree's float softmax
# stays finite.
LOG_FLOOR = -30.0


@dataclass(frozen=True)
class RootPriorSettings:
    """Settings of the mixture; see the module's equations.

    Raises:
        PriorZeroError: on construction, for a value outside its range.
    """

    mode: str = "llm_plus_wm_logits"
    weighting: str = "fixed"
    mixing: str = "logits"
    weight: float = 0.5
    weight_max: float = 0.8
    weight_min: float = 0.1
    anneal_env_steps: int = 20_000
    temperature: float = 1.0
    reduction: str = "sum"

    def __post_init__(self) -> None:
        rules = [
            (
                self.mode in MODES,
                f"prior mode {self.mode!r} is unknown; use one of {', '.join(MODES)}",
            ),
            (
                self.weighting in ("fixed", "adaptive"),
                f"prior weighting {self.weighting!r}: use 'fixed' or 'adaptive'",
            ),
            (
                self.mixing in ("logits", "probabilities"),
                f"prior mixing {self.mixing!r}: use 'logits' or 'probabilities'",
            ),
            (
                self.reduction in ("sum", "mean"),
                f"prior reduction {self.reduction!r}: use 'sum' or 'mean'",
            ),
            (0.0 <= self.weight <= 1.0, f"prior weight {self.weight} must lie in [0, 1]"),
            (
                0.0 <= self.weight_min <= self.weight_max <= 1.0,
                f"prior weight_min {self.weight_min} and weight_max {self.weight_max}: need 0 <= min <= max <= 1",
            ),
            (self.temperature > 0.0, f"prior temperature {self.temperature} must be positive"),
            (
                self.anneal_env_steps > 0,
                f"prior anneal_env_steps {self.anneal_env_steps} must be positive",
            ),
        ]
        for ok, message in rules:
            if not ok:
                raise PriorZeroError(message)


@dataclass(frozen=True)
class RootPrior:
    """The mixture at one root. All arrays `[A]`, natural logs, in the order of the valid actions."""

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
    env_steps: int = 0,
) -> RootPrior:
    """Mix the two opinions on the valid actions of one root; see the module's equations.

    Args:
        wm_logits: `[A]` world-model policy logits of the valid actions.
        llm_logprobs: `[A]` log-probabilities from the LLM (already reduced over tokens), or None
            where no LLM answered; then the world model stands alone, whatever the mode.
        env_steps: environment steps collected so far (for the annealing).
    Raises:
        PriorZeroError: if a log-probability is not a number, or the lengths differ.
    """
    log_wm = log_softmax(np.asarray(wm_logits, dtype=np.float64))
    if llm_logprobs is None:
        return RootPrior(log_wm, log_wm, None, 0.0)
    llm = np.asarray(llm_logprobs, dtype=np.float64)
    if llm.shape != log_wm.shape or np.isnan(llm).any():
        raise PriorZeroError(
            f"LLM prior of shape {llm.shape} with {int(np.isnan(llm).sum())} NaN for {len(log_wm)} valid "
            "actions: the engine must give one number per valid action"
        )
    log_llm = log_softmax(llm / settings.temperature)
    weight = prior_weight(settings, log_wm, env_steps)
    if settings.mixing == "logits":
        mixed = log_softmax(weight * log_llm + (1.0 - weight) * log_wm)
    else:
        mixed = log_softmax(np.log(weight * np.exp(log_llm) + (1.0 - weight) * np.exp(log_wm)))
    return RootPrior(mixed, log_wm, log_llm, weight)
