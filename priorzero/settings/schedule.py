"""The rules of a run's schedule, whose attributes are those of
`priorzero_config.HybridTrainingConfig`.

Each function gets their values, where it needs them the settings too, and says what must hold as
`require` (`record.py`) wants it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from priorzero import plugins
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.llm import GROUP_ADVANTAGES, LLMSettings
from priorzero.settings.presets import PRESETS

Rules = dict[str, tuple[Any, bool, str]]
"""Setting -> value, whether it is possible, the rule in words."""

SMALLEST = dict(
    wm_train_freq=1,
    llm_train_freq=1,
    sequential_wm_updates=1,
    sequential_llm_phases=1,
    alternating_wm_updates=1,
    alternating_llm_phases=1,
    llm_only_episodes=2,
    iterations=1,
    eval_freq=0,
    save_freq=0,
    sample_prompt_freq=0,
    off_policy_degree=-1,
    collector_workers=0,
)
SWITCHES = ("resume", "debug_mode", "sequential_repeat", "async_eval")
CHOICES = dict(
    alternating_first=("world_model", "llm"),
    alternating_llm_collect=("everything", "world_model", "nothing"),
)


def schedule_rules(
    values: Mapping[str, Any],
    settings: ExperimentSettings,
    *,
    defaults: Mapping[str, Any],
    read_by: Mapping[str, Sequence[str]],
    own_mode: str,
) -> Rules:
    """Everything that must hold of a schedule.

    Args:
        values: attribute -> value.
        settings: those of the run.
        defaults: attribute -> its value in `HybridTrainingConfig`.
        read_by: mode of ours -> attributes which no other mode of ours reads.
        own_mode: the class that has a schedule of its own; empty: a file of ours is the schedule.
    """
    rules = _value_rules(values) | {"use_orz_trainer": _trainer_rule(values, settings.llm)}
    ours = values["wm_training_mode"] in tuple(read_by)
    between = (
        _mode_rules(values, own_mode)
        | (_our_mode_rules(values, settings.llm, defaults, read_by) if ours else {})
        | _ray_rules(values, settings)
    )
    for name, rule in between.items():
        if name not in rules or rules[name][1]:  # what is impossible in itself is told as that
            rules[name] = rule
    return rules


def orz_rules(llm: LLMSettings) -> Rules:
    """What ORZ's trainer needs of the settings."""
    return {
        f"llm.{rule.name}": (
            functools.reduce(getattr, rule.name.split("."), llm),
            rule.holds,
            f"{rule.text} (the preset orz has settings that fit)",
        )
        for rule in llm.orz_rules()
    }


def _value_rules(values: Mapping[str, Any]) -> Rules:
    """Of each value by itself."""
    rules: Rules = {}
    for name, low in SMALLEST.items():
        fits = type(values[name]) is int and values[name] >= low
        rules[name] = values[name], fits, f"it must be an integer >= {low}"
    for name in SWITCHES:
        rules[name] = values[name], isinstance(values[name], bool), "it must be True or False"
    for name, choices in CHOICES.items():
        rules[name] = values[name], values[name] in choices, f"it must be {' or '.join(choices)}"

    checkpoint = values["checkpoint"]
    text = "it must be latest, best or a folder's name"
    rules["checkpoint"] = checkpoint, isinstance(checkpoint, str), text
    return rules


def _trainer_rule(values: Mapping[str, Any], llm: LLMSettings) -> tuple[Any, bool, str]:
    asked = values["use_orz_trainer"]
    if asked is False:
        return asked, llm.trainer != "orz", "llm.trainer is orz: leave one of them out"
    return asked, asked in (None, True, False), "it must be True, False or None"


def _mode_rules(values: Mapping[str, Any], own_mode: str) -> Rules:
    """Of the schedule's name, and of training beside collection."""
    mode, rules = values["wm_training_mode"], {}
    if own_mode:
        text = f"class {own_mode} has an iterate of its own: leave wm_training_mode out"
        rules["wm_training_mode"] = mode, mode == own_mode, text
    else:
        files = plugins.names("priorzero.loop.schedules")
        text = f"priorzero/loop/schedules holds {', '.join(files)}"
        rules["wm_training_mode"] = mode, mode in files, text

    degree = values["off_policy_degree"]
    if mode != "parallel" and degree:
        text = f"training beside collection is parallel's alone, and this is {mode}: take 0"
        rules["off_policy_degree"] = degree, False, text
    return rules


def _our_mode_rules(
    values: Mapping[str, Any],
    llm: LLMSettings,
    defaults: Mapping[str, Any],
    read_by: Mapping[str, Sequence[str]],
) -> Rules:
    """Of what a mode of ours reads, beside `_mode_rules`."""
    mode, rules = values["wm_training_mode"], {}
    for owner, names in read_by.items():
        for name in names if owner != mode else ():
            if values[name] not in (defaults[name], *_laid_over(name)):
                text = f"only wm_training_mode {owner} reads it, and this is {mode}"
                rules[name] = values[name], False, text

    learns = llm.enable and (llm.sft.enable or llm.rft.enable)
    if mode in ("sequential", "alternating") and not learns:
        text = "the LLM has turns, and there is none that learns: take parallel"
        rules["wm_training_mode"] = mode, False, text
    rules |= _player_rules(mode, llm)

    if mode == "alternating" and values["alternating_first"] == "llm":
        collect = values["alternating_llm_collect"]
        text = "alternating_first is llm, which must play before it can learn"
        rules["alternating_llm_collect"] = collect, collect in ("everything", "world_model"), text
    return rules


def _laid_over(name: str) -> Iterator[Any]:
    """The values that presets give an attribute."""
    for preset in PRESETS.values():
        if name in preset.schedule:
            yield preset.schedule[name]


def _player_rules(mode: str, llm: LLMSettings) -> Rules:
    """Advantages must fit the player: those of groups need episodes that the LLM played alone, all
    others a search.
    """
    groups = ", ".join(GROUP_ADVANTAGES)
    by_group = llm.enable and llm.rft.enable and llm.rft.relative
    if mode == "llm_only":
        text = "then an LLM plays alone, and llm.enable and llm.rft.enable must be true and "
        text += f"llm.rft.advantage one of {groups}: take the preset llm_only"
        return {"wm_training_mode": (mode, by_group, text)}

    text = f"a search plays in wm_training_mode {mode}: {groups} compare episodes that the LLM "
    text += "plays alone (the preset llm_only)"
    return {"llm.rft.advantage": (llm.rft.advantage, not by_group, text)}


def _ray_rules(values: Mapping[str, Any], settings: ExperimentSettings) -> Rules:
    """Of `ray_address` and `collector_workers`."""
    address, orz = values["ray_address"], settings.llm.orz.ray_address
    is_text = isinstance(address, str)
    text = "it must be host:port, auto or empty"
    if is_text:
        text = f"llm.orz.ray_address is {orz!r}, and a run is in one Ray cluster"
    fits = is_text and (not address or orz in ("", address))
    rules: Rules = {"ray_address": (address, fits, text)}

    workers = values["collector_workers"]
    if type(workers) is not int or workers <= 0:
        return rules
    conditions = (
        (
            workers <= settings.env.collector_env_num,
            f"each needs an environment, and env.collector_env_num is "
            f"{settings.env.collector_env_num}",
        ),
        (
            workers <= settings.policy.num_segments,
            f"each has a part of an iteration's segments, and policy.num_segments is "
            f"{settings.policy.num_segments}",
        ),
        (
            not settings.policy.restarts.share,
            "policy.restarts.share is above 0: one collector remembers visited states, and "
            "workers would each have a memory of their own, which no checkpoint holds",
        ),
        (
            settings.llm.trainer != "orz" or bool(address or orz),
            "ORZ's workers and collectors need one Ray cluster with room for both: start it "
            "and name it in ray_address",
        ),
    )
    broken = [text for holds, text in conditions if not holds]
    if broken:
        rules["collector_workers"] = workers, False, "; ".join(broken)
    return rules
