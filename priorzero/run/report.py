"""The lines a user reads on the terminal: the banner at the start and a line per evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def banner(config, folder: Path, game, llm: str, device: str, parameters: int, orz: bool) -> str:
    """What is about to run.

    Args:
        config: schedule and settings. game: the resolved game. llm: model and engine in words.
            device: of the world model. parameters: of the world model. orz: whether
            Open-Reasoner-Zero was found.
    """
    policy = config.priorzero_cfg.policy
    return "\n".join(
        [
            "=" * 78,
            "PriorZero-ORZ",
            "=" * 78,
            f"Debug mode:      {config.debug_mode}",
            f"ORZ available:   {orz} (not wired in yet: the built-in trainer trains the LLM)",
            f"Experiment:      {folder}",
            f"Iterations:      {config.iterations}",
            f"Training mode:   {config.wm_training_mode}: world model every {config.wm_train_freq}, "
            f"LLM every {config.llm_train_freq}",
            f"Game:            {game.env_id} ({game.kind}), seed {config.priorzero_cfg.seed}",
            f"LLM:             {llm}",
            f"World model:     UniZero, {parameters / 1e6:.1f} M parameters on {device}, {policy.num_simulations} simulations, "
            f"root prior {policy.root_prior.mode}",
            "=" * 78,
        ]
    )


def evaluation_line(iteration: int, mode: str, values: Mapping[str, float]) -> str:
    """One mode's episodes in words; `values` as `EvalResult.metrics` names them."""
    share = values.get(f"{mode}/score_share")
    tail = "" if share is None else f", {100 * share:.1f} % of the maximum"
    return (
        f"[Eval {iteration}] {mode:<16} return {values[f'{mode}/return_mean']:.2f} ± {values[f'{mode}/return_std']:.2f} "
        f"(best {values[f'{mode}/return_best']:.2f}), length {values[f'{mode}/length']:.1f}{tail}"
    )


def first_and_last(series: Mapping[str, list[float]]) -> tuple[dict[str, float], dict[str, float]]:
    """Means over the first and the last fifth of each series: single LLM phases, a few decisions
    each, are noisy.
    """
    ends = {name: max(1, len(values) // 5) for name, values in series.items()}
    return (
        {name: sum(series[name][:n]) / n for name, n in ends.items()},
        {name: sum(series[name][-n:]) / n for name, n in ends.items()},
    )
