"""The configuration of a run: settings, the presets laid over them, and the schedule.

Three levels, from what is changed most to what is changed least:

* `HybridTrainingConfig`: the schedule of a run. Subclass it and overwrite attributes, or pass them
  to the constructor.
* `get_priorzero_config`: the settings (`ExperimentSettings`, groups env, policy, text, llm, eval,
  decisions, metrics) and the class names DI-engine needs. Each setting stands once, with its
  meaning and default, in `priorzero/settings/`.
* `PRESETS` (`priorzero/settings/presets.py`): overlays with the same names, and the schedule that
  goes with them. Debug is one of them, not a second set of settings.

Unknown names, wrong types and impossible combinations are rejected on construction; what must hold
of the schedule stands in `priorzero/settings/schedule.py`. This module imports nothing heavy.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from priorzero.orz import ORZ_AVAILABLE, orz_status  # noqa: F401 (looked for here by users)
from priorzero.settings.env import run_name
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.presets import (  # noqa: F401 (users look for all of them here)
    DEBUG,
    FROZEN,
    JERICHO_PROTOCOL,
    LLM_ONLY,
    LORA,
    ORZ,
    PRESETS,
    PURE_UNIZERO,
    RFT_ONLY,
    SFT_ONLY,
    TALES_JERICHO,
    TALES_SW,
    TALES_TWX,
    Preset,
    choose,
    refuse_rft,
)
from priorzero.settings.record import merge, overlay, require
from priorzero.settings.schedule import CHOICES, orz_rules, schedule_rules  # noqa: F401 (the same)
from priorzero.types import PriorZeroError

# Class names for DI-engine's registries, and the modules that register them.
CREATE = dict(
    env=dict(type="priorzero_text_game", import_names=["priorzero.games.env"]),
    env_manager=dict(type="base"),
    policy=dict(type="priorzero", import_names=["priorzero_policy"]),
    collector=dict(type="priorzero", import_names=["priorzero_collector"]),
    replay_buffer=dict(type="game_buffer_priorzero", import_names=["game_buffer_priorzero"]),
)


def get_priorzero_config(
    env_id: str | list[str] = "auto",
    seed: int = 0,
    exp_name: str | None = None,
    enable_llm: bool = True,
    enable_rft: bool = False,
    debug_mode: bool = False,
    presets: tuple[str, ...] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[ExperimentSettings, dict[str, Any]]:
    """Settings of a run, and DI-engine's class names.

    Args:
        exp_name: folder under data_priorzero/; None names it after game, method and seed.
        enable_llm: False is the preset `pure_unizero`, applied after the others.
        enable_rft: train the LLM with advantages too.
        debug_mode: the same as the preset `debug`, which always comes first.
        presets: names of `PRESETS`, applied in this order and before `overrides`.
        overrides: nested dictionary of single settings, applied last.

    Returns:
        settings, checked; and the create config.

    Raises:
        PriorZeroError: an unknown name, a wrong type or an impossible combination.
    """
    chosen = choose(debug_mode, presets)
    if enable_rft:
        refuse_rft(chosen)

    layers = [preset.settings for preset in chosen.values()]
    if not enable_llm:
        layers.append(PURE_UNIZERO.settings)
    layers.append(dict(seed=seed, env=dict(env_id=env_id)))
    if enable_rft:
        layers.append(dict(llm=dict(rft=dict(enable=True))))
    settings = overlay(ExperimentSettings(), *layers, overrides or {})
    settings.validate()

    name = exp_name or settings.exp_name or _default_name(settings, "debug" in chosen)
    placed = name.startswith(("data_priorzero", "/"))
    settings.exp_name = name if placed else f"data_priorzero/{name}"
    return settings, copy.deepcopy(CREATE)


def get_priorzero_config_for_quick_test(
    env_id: str | list[str] = "auto", seed: int = 0, **settings: Any
) -> tuple[ExperimentSettings, dict[str, Any]]:
    """`get_priorzero_config` in debug mode."""
    return get_priorzero_config(env_id=env_id, seed=seed, debug_mode=True, **settings)


def _default_name(settings: ExperimentSettings, debug: bool) -> str:
    """Game, method and seed as a folder's name."""
    games = run_name(settings.env.env_id)
    method = "priorzero" if settings.llm.enable else "unizero"
    if settings.llm.enable and settings.llm.rft.relative:
        method = "llmonly"
    return f"{games}_{method}{'_debug' if debug else ''}_seed{settings.seed}"


class HybridTrainingConfig:
    """The schedule of a run, with the settings it runs on.

        class Mine(HybridTrainingConfig):
            llm_train_freq = 10

        config = Mine(env_id="detective.z5", seed=1, debug_mode=True)
        config.priorzero_cfg.policy.num_simulations = 30

    Attributes may be overwritten until the run starts. Where several sources name an attribute, a
    constructor's argument comes before a subclass, a subclass before a preset, and a preset before
    the defaults here.

    A subclass may have a schedule of its own: `async def iterate(self, parts)` does one iteration
    (`priorzero/loop/schedules`), and `wm_training_mode` is then the class's name. Attributes that
    it annotates are new settings: overwritten, saved and refused when misspelt as those here are.

    Raises:
        PriorZeroError: an unknown attribute or an impossible value, on construction and again when
            the run starts.
    """

    wm_training_mode: str = "parallel"
    """Whose training follows whose: a file of priorzero/loop/schedules, which draws it as a time
    line. parallel: both in the same iterations, by wm_train_freq and llm_train_freq; sequential:
    the world model, then the LLM; alternating: in turns; llm_only: the LLM plays and learns alone,
    with the preset of that name."""
    wm_train_freq: int = 1
    """parallel: iterations between training phases of the world model."""
    llm_train_freq: int = 5
    """parallel: iterations between training phases of the LLM."""
    sequential_wm_updates: int = 40_000
    """sequential: updates of the world model, before the LLM trains. An iteration brings about
    policy.replay_ratio * num_segments * game_segment_length of them."""
    sequential_llm_phases: int = 200
    """sequential: training phases of the LLM, after the world model; one an iteration."""
    sequential_repeat: bool = False
    """sequential: both again and again until `iterations`. False: the run ends after the LLM."""
    alternating_wm_updates: int = 1000
    """alternating: updates of the world model in each of its turns."""
    alternating_llm_phases: int = 5
    """alternating: training phases in each turn of the LLM, one an iteration."""
    alternating_first: str = "world_model"
    """alternating: who begins, world_model or llm."""
    alternating_llm_collect: str = "everything"
    """alternating: what an iteration of the LLM's turn plays. everything: the search with the LLM's
    prior; world_model: the search without it (the LLM is not asked, but learns from what is found);
    nothing: it learns from what the buffer holds."""
    off_policy_degree: int = 0
    """parallel: phases of training that collection may be ahead. 0: collect and train in turn. n:
    training runs beside the next collections, which play with weights that are up to n phases
    older. -1: chosen by the measured times, and told in the log."""
    async_eval: bool = False
    """Evaluations play a snapshot beside what follows, instead of before it. The last one of a run
    has nothing beside it."""
    llm_only_episodes: int = 8
    """llm_only: episodes of a round, played by the same weights, at whose end the LLM trains."""
    use_orz_trainer: bool | None = None
    """Let ORZ's Ray PPO trainer do the LLM's reinforcement step (docs/ORZ.md). True: with the
    preset orz, which other presets and settings are laid over. None: where ORZ is available and
    does what the settings ask for."""
    collector_workers: int = 0
    """Collect in so many processes, Ray actors on this machine or others, each with its share of
    the environments, its own search and its own LLM engine (docs/COLLECTORS.md). 0: in this
    process."""
    ray_address: str = ""
    """Ray cluster that collector_workers and ORZ's trainer live in: host:port of its head, or auto
    for the one this machine belongs to. Empty: llm.orz.ray_address, or one that is started for the
    run."""
    iterations: int = 2000
    """Iterations: collect, train, log."""
    eval_freq: int = 100
    """Iterations between evaluations; one more at the start and one at the end. 0: none."""
    save_freq: int = 100
    """Iterations between checkpoints; one more at the end. 0: at the end only."""
    sample_prompt_freq: int = 10
    """Iterations between sample prompts (with a table of prior against visit counts) in
    TensorBoard. 0: none."""
    resume: bool = False
    """Continue the experiment's latest checkpoint."""
    checkpoint: str = "latest"
    """Which checkpoint `resume` and evaluation load: latest, best, or a folder's name."""
    debug_mode: bool = False
    """The preset debug: small sizes and a short schedule."""
    priorzero_cfg: ExperimentSettings
    """The settings, see `get_priorzero_config`."""
    priorzero_create_cfg: dict[str, Any]
    """Class names for DI-engine's registries."""

    def __init__(
        self,
        env_id: str | list[str] = "auto",
        seed: int = 0,
        exp_name: str | None = None,
        enable_llm: bool = True,
        enable_rft: bool = False,
        debug_mode: bool | None = None,
        presets: tuple[str, ...] = (),
        overrides: Mapping[str, Any] | None = None,
        **schedule: Any,
    ) -> None:
        asked = type(self).debug_mode if debug_mode is None else debug_mode
        if schedule.get("use_orz_trainer", type(self).use_orz_trainer) and "orz" not in presets:
            presets = ("orz", *presets)
        chosen = choose(asked, presets)
        self.debug_mode = "debug" in chosen
        address = schedule.get("ray_address", type(self).ray_address)
        if address and isinstance(address, str):
            overrides = merge({"llm": {"orz": {"ray_address": address}}}, overrides or {})

        own = self._subclass_attributes()
        if self._own_schedule() and "wm_training_mode" not in own:
            self.wm_training_mode = type(self).__name__
            own.add("wm_training_mode")  # no preset's takes its place
        for preset in chosen.values():
            for name, value in preset.schedule.items():
                if name not in own:
                    setattr(self, name, value)
        for name, value in schedule.items():
            setattr(self, name, value)

        self.priorzero_cfg, self.priorzero_create_cfg = get_priorzero_config(
            env_id, seed, exp_name, enable_llm, enable_rft, self.debug_mode, presets, overrides
        )
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        _require_schedule_name(type(self), name)
        super().__setattr__(name, value)

    def _subclass_attributes(self) -> set[str]:
        """Names of the schedule that subclasses set themselves, be it to the default's value."""
        own: set[str] = set()
        for cls in type(self).__mro__:
            if cls is HybridTrainingConfig:
                break
            for name, value in vars(cls).items():
                method = callable(value) or isinstance(value, property | classmethod | staticmethod)
                if not name.startswith("_") and not method:
                    _require_schedule_name(type(self), name)
                    own.add(name)
        return own

    def _own_schedule(self) -> bool:
        """Whether a subclass brings a schedule of its own."""
        return hasattr(self, "iterate")

    def validate(self) -> None:
        """Check the schedule and the settings; called on construction and by
        `train_priorzero_orz`.

        Raises:
            PriorZeroError: names every impossible value of the schedule, or of the settings.
        """
        names = _schedule_names(type(self))
        values = {name: getattr(self, name) for name in names if hasattr(self, name)}
        missing = {
            name: ("missing", False, "a setting is declared with its default")
            for name in names
            if name not in values
        }
        rules = schedule_rules(
            values,
            self.priorzero_cfg,
            defaults={name: getattr(HybridTrainingConfig, name) for name in SCHEDULE},
            read_by=READ_BY,
            own_mode=type(self).__name__ if self._own_schedule() else "",
        )
        require(rules | missing)

        self.priorzero_cfg.validate()
        if self.use_orz_trainer:
            require(orz_rules(self.priorzero_cfg.llm))

    def settle_trainer(self, eval_only: bool = False) -> str:
        """Decide who trains the LLM, and write it into `use_orz_trainer` and `llm.trainer`. Called
        when a run starts.

        Args:
            eval_only: nothing is trained, and ORZ's checkpoints are the built-in trainer's.

        Returns:
            why it is not ORZ's, in a line; empty where it is.

        Raises:
            PriorZeroError: ORZ is asked for, and cannot be used.
        """
        llm = self.priorzero_cfg.llm
        llm.orz.ray_address = self.cluster
        asked = self.use_orz_trainer or llm.trainer == "orz"
        found, why = orz_status()
        if eval_only:
            why = "an evaluation trains nothing"
        elif asked and not found:
            raise PriorZeroError(
                f"Open-Reasoner-Zero is asked for and cannot be used: {why}. docs/ORZ.md says how "
                "to get it; or leave use_orz_trainer, llm.trainer and the preset orz out"
            )
        elif self.use_orz_trainer is False:
            why = "use_orz_trainer is False"
        elif found and not asked and self.collector_workers and not self.cluster:
            why = "collector_workers is set, and ray_address names no cluster with room for both"
        elif found:
            rules = {} if asked else orz_rules(llm)
            why = next(
                (f"{name} is {value!r}" for name, (value, holds, _) in rules.items() if not holds),
                "",
            )

        self.use_orz_trainer = not why
        if self.use_orz_trainer:
            llm.trainer = "orz"
        elif llm.trainer == "orz":
            llm.trainer = "builtin"
        self.validate()
        return why

    @property
    def cluster(self) -> str:
        """Address of this run's Ray cluster, by whichever setting; empty for one of its own."""
        return self.ray_address or self.priorzero_cfg.llm.orz.ray_address

    def as_dict(self) -> dict[str, Any]:
        """Everything, as saved beside the run."""
        schedule = {name: getattr(self, name) for name in _schedule_names(type(self))}
        return dict(schedule=schedule, settings=self.priorzero_cfg.as_dict())


SCHEDULE = tuple(
    name for name in HybridTrainingConfig.__annotations__ if not name.startswith("priorzero_")
)


# Settings that bear their mode's name, which no other mode of ours reads; a user's own may.
READ_BY = {
    mode: tuple(name for name in SCHEDULE if name.startswith(f"{mode}_"))
    for mode in ("parallel", "sequential", "alternating", "llm_only")
}


def _schedule_names(cls: type[HybridTrainingConfig]) -> tuple[str, ...]:
    """The attributes of the schedule, those that subclasses declare included."""
    declared = [
        name
        for base in cls.__mro__
        if issubclass(base, HybridTrainingConfig) and base is not HybridTrainingConfig
        for name in vars(base).get("__annotations__", {})
        if not name.startswith(("_", "priorzero_"))
    ]
    return tuple(dict.fromkeys([*SCHEDULE, *declared]))


def _require_schedule_name(cls: type[HybridTrainingConfig], name: str) -> None:
    """Raise PriorZeroError where this class has no such attribute."""
    known = _schedule_names(cls)
    if name not in (*known, *HybridTrainingConfig.__annotations__):
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"
        raise PriorZeroError(f"schedule setting {name!r} does not exist; {hint}")
