"""The lines a user reads on the terminal: the banner at the start and a line per evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from priorzero.games.catalogue import GameSpec


def banner(
    config,
    *,
    folder: Path,
    games: Sequence[GameSpec],
    eval_games: Sequence[GameSpec],
    llm: str,
    device: str,
    parameters: int,
    orz: tuple[bool, str],
    not_orz: str,
    warning: str = "",
    processes: int = 1,
) -> str:
    """What is about to run.

    Args:
        config: schedule and settings (`HybridTrainingConfig`).
        folder: of the experiment.
        games: those trained on. eval_games: those evaluated; told where they are others.
        llm: model and engine in words.
        device: of the world model.
        parameters: of the world model, their number.
        orz: whether Open-Reasoner-Zero can be used; and where it is, or why not.
        not_orz: why its trainer does not train; empty where it does.
        warning: that the LLM saw these games or relatives of theirs, `Seen.warning`.
        processes: of a data-parallel run.
    """
    settings = config.priorzero_cfg
    line = "=" * 78
    head = "Game:            " if len(games) == 1 else "Games:           "
    told = [f"{head}{_in_words(games)}, seed {settings.seed}"]
    if eval_games != games:
        told.append(f"Evaluated on:    {_in_words(eval_games)}")
    if processes > 1:
        rows = processes * settings.policy.batch_size
        told.append(f"Processes:       {processes}, an update is made of {rows} rows")

    return "\n".join(
        [
            line,
            "PriorZero-ORZ",
            line,
            f"Debug mode:      {config.debug_mode}",
            f"ORZ available:   {orz[0]} ({orz[1]})",
            f"Use ORZ trainer: {not not_orz}" + (f" ({not_orz})" if not_orz else ""),
            f"Experiment:      {folder}",
            f"Iterations:      {config.iterations}",
            f"Training mode:   {_training_mode(config)}",
            *told,
            f"LLM:             {llm}",
            f"World model:     {_world_model(config, device, parameters)}",
            *([f"WARNING:         {warning}"] if warning else []),
            line,
        ]
    )


def _in_words(games: Sequence[GameSpec]) -> str:
    return ", ".join(f"{game.env_id} ({game.kind})" for game in games)


def _world_model(config, device: str, parameters: int) -> str:
    """What plans, and how hard."""
    if config.wm_training_mode == "llm_only":
        return "neither plays nor learns"
    policy = config.priorzero_cfg.policy
    return (
        f"UniZero, {parameters / 1e6:.1f} M parameters on {device}, "
        f"{policy.num_simulations} simulations, root prior {policy.root_prior.mode}"
    )


def _training_mode(config) -> str:
    """The schedule and its numbers; of a user's own the name alone."""
    mode = config.wm_training_mode
    if mode == "parallel":
        text = f"world model every {config.wm_train_freq}, LLM every {config.llm_train_freq}"
        if config.off_policy_degree:
            ahead = config.off_policy_degree
            phases = "by itself" if ahead < 0 else f"{ahead} ahead"
            text += f", beside collection (off-policy degree: {phases})"
    elif mode == "sequential":
        text = f"world model {config.sequential_wm_updates} updates, "
        text += f"then LLM {config.sequential_llm_phases} phases"
        text += ", again and again" if config.sequential_repeat else ", once"
    elif mode == "alternating":
        text = f"world model {config.alternating_wm_updates} updates, "
        text += f"LLM {config.alternating_llm_phases} phases, in turns, "
        text += f"{config.alternating_first} first, the LLM's collects "
        text += config.alternating_llm_collect
    elif mode == "llm_only":
        text = f"rounds of {config.llm_only_episodes} episodes of the LLM alone, which then trains"
    else:
        return mode
    return f"{mode}: {text}"


def evaluation_line(iteration: int, mode: str, values: Mapping[str, float]) -> str:
    """One mode's episodes in words; `values` as `EvalResult.metrics` names them."""
    share = values.get(f"{mode}/score_share")
    tail = "" if share is None else f", {100 * share:.1f} % of the maximum"
    mean, std, best, length = (
        values[f"{mode}/{name}"] for name in ("return_mean", "return_std", "return_best", "length")
    )
    return (
        f"[Eval {iteration}] {mode:<16} return {mean:.2f} ± {std:.2f} (best {best:.2f}), "
        f"length {length:.1f}{tail}"
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
