"""The configuration of a run: settings, the presets laid over them, and the schedule.

Three levels, from what is changed most to what is changed least:

* `HybridTrainingConfig`: the schedule of a run. Subclass it and overwrite attributes, or pass them
  to the constructor.
* `get_priorzero_config`: the settings (`ExperimentSettings`, groups env, policy, text, llm, eval,
  decisions, metrics) and the class names DI-engine needs. Each setting stands once, with its
  meaning and default, in `priorzero/settings/`.
* `PRESETS`: overlays with the same names, and the schedule that goes with them. Debug is one of
  them, not a second set of settings.

Unknown names, wrong types and impossible combinations are rejected on construction. This module
imports nothing heavy.
"""

from __future__ import annotations

import copy
import difflib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from priorzero import plugins
from priorzero.games import tales
from priorzero.orz import ORZ_AVAILABLE, orz_status  # noqa: F401 (looked for here by users)
from priorzero.settings.env import run_name
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.llm import GROUP_ADVANTAGES, LLMSettings
from priorzero.settings.record import merge, overlay, require
from priorzero.types import PriorZeroError


@dataclass(frozen=True)
class Preset:
    """Values that belong together."""

    settings: Mapping[str, Any]
    """Nested names and values of `ExperimentSettings`."""
    schedule: Mapping[str, Any] = field(default_factory=dict)
    """Attributes of `HybridTrainingConfig`."""


# Minutes on two CPU cores instead of hours on a GPU; every part is on, every size is small.
DEBUG = Preset(
    settings=dict(
        # Eight environments and short segments: 40 transitions an iteration, an LLM call for eight
        # states.
        env=dict(max_steps=50, collector_env_num=8, evaluator_env_num=2, n_evaluator_episode=2),
        policy=dict(
            embed_dim=128,
            num_heads=4,
            num_simulations=16,
            game_segment_length=5,
            num_segments=8,
            batch_size=32,
            replay_buffer_size=20_000,
            learning_rate=3e-4,
            replay_ratio=0.25,
            action_vocabulary=dict(capacity=256, overflow=16),
            # mean: the small model's sums favour the shortest commands ("look") by far.
            root_prior=dict(anneal_env_steps=2400, reduction="mean"),
        ),
        llm=dict(
            # A debug run has no minute to spare for vLLM's start, nor the memory for a second
            # engine.
            engine="transformers",
            # The prompt is the present observation alone: a state met again is in the score cache.
            prompt=dict(history_length=0, include_valid_actions=False, max_prompt_tokens=448),
            # Adapters: with all weights and a few decisions per step the SFT loss rose. On the last
            # six of the small model's thirty layers, because the time of a state met again, or
            # trained on, goes with the layers that change.
            lora=dict(enable=True, last_layers=6),
            train=dict(learning_rate=2e-3, batch_size=4),
            sft=dict(samples=24, recent_transitions=400),
            rft=dict(samples=24, recent_transitions=200),
        ),
        # A stranger's first run ends with something to look at.
        decisions=dict(page=True),
    ),
    schedule=dict(
        iterations=60,
        eval_freq=30,
        save_freq=30,
        # An iteration brings ten updates of the world model.
        sequential_wm_updates=300,
        sequential_llm_phases=12,
        alternating_wm_updates=100,
        alternating_llm_phases=2,
    ),
)

PURE_UNIZERO = Preset(
    dict(
        llm=dict(enable=False),
        policy=dict(root_prior=dict(mode="wm_logits")),
        eval=dict(modes=["world_model"]),
    )
)

# What the LLM learns from: the search alone, the world model's advantages alone, nothing.
SFT_ONLY = Preset(dict(llm=dict(sft=dict(enable=True), rft=dict(enable=False))))
RFT_ONLY = Preset(dict(llm=dict(sft=dict(enable=False), rft=dict(enable=True))))
FROZEN = Preset(dict(llm=dict(sft=dict(enable=False), rft=dict(enable=False))))

# The LLM alone, without search and world model: what planning has to beat.
LLM_ONLY = Preset(
    settings=dict(
        llm=dict(
            sft=dict(enable=False),
            # Few decisions a step are too noisy for returns of whole episodes.
            train=dict(batch_size=16),
            # All that the present weights played, and nothing older. More decisions than where a
            # search plays, because phases are fewer.
            rft=dict(
                enable=True,
                advantage="group",
                samples=96,
                recent_transitions=20_000,
                max_staleness=0,
            ),
        ),
        eval=dict(modes=["llm", "random"]),
    ),
    schedule=dict(wm_training_mode="llm_only"),
)

# What Open-Reasoner-Zero's trainer does: PPO on tokens, all weights, learning from advantages.
ORZ = Preset(
    dict(
        llm=dict(
            trainer="orz",
            sft=dict(enable=False),
            lora=dict(enable=False),
            train=dict(learning_rate=1e-6),
            rft=dict(enable=True, objective="token", kl_estimator="k3"),
        )
    )
)

LORA = Preset(dict(llm=dict(lora=dict(enable=True), train=dict(learning_rate=2e-4))))

# What published scores of Jericho's games were allowed: 8 environments, 100,000 steps each,
# episodes of 100 steps (the defaults of DRRN and TDQN, github.com/microsoft/tdqn).
# `priorzero.compare` prints them beside ours.
JERICHO_PROTOCOL = Preset(
    settings=dict(
        env=dict(max_steps=100, collector_env_num=8, evaluator_env_num=5, n_evaluator_episode=10),
        policy=dict(num_segments=8, game_segment_length=20),
    ),
    # 5,000 times 160 steps; an evaluation every 40,000 steps.
    schedule=dict(iterations=5000, eval_freq=250, save_freq=250),
)

# What published scores of TALES were given: each game once, for 100 steps, those of the two
# generated kinds in one variation of the test set. Training plays what --env-id names.
_TALES = dict(max_steps=100, evaluator_env_num=1, n_evaluator_episode=1)
TALES_JERICHO = Preset(dict(env=_TALES))
TALES_TWX = Preset(dict(env=_TALES | dict(eval_env_id=list(tales.TEXTWORLD_EXPRESS))))
TALES_SW = Preset(
    dict(
        env=_TALES | dict(eval_env_id=list(tales.SCIENCEWORLD)),
        # A task has thousands of commands.
        policy=dict(action_vocabulary=dict(capacity=4096)),
    )
)

PRESETS = dict(
    debug=DEBUG,
    pure_unizero=PURE_UNIZERO,
    sft_only=SFT_ONLY,
    rft_only=RFT_ONLY,
    frozen=FROZEN,
    llm_only=LLM_ONLY,
    lora=LORA,
    jericho_protocol=JERICHO_PROTOCOL,
    tales_jericho=TALES_JERICHO,
    tales_twx=TALES_TWX,
    tales_sw=TALES_SW,
    orz=ORZ,
)

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
    chosen = _presets(debug_mode, presets)
    if enable_rft:
        _refuse_rft(chosen)

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


def _presets(debug_mode: bool, names: tuple[str, ...]) -> dict[str, Preset]:
    """Name -> preset in the order in which they are applied, debug first.

    Raises:
        PriorZeroError: a name does not exist.
    """
    for name in names:
        if name not in PRESETS:
            raise PriorZeroError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    ordered = ["debug"] if debug_mode or "debug" in names else []
    return {name: PRESETS[name] for name in [*ordered, *names]}


def _refuse_rft(presets: Mapping[str, Preset]) -> None:
    for name, preset in presets.items():
        if preset.settings.get("llm", {}).get("rft", {}).get("enable") is False:
            raise PriorZeroError(
                f"--rft (enable_rft) switches on what preset {name!r} switches off; leave one of "
                "them out"
            )


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
        chosen = _presets(asked, presets)
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
        smallest = dict(
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
        rules = {}
        for name, low in smallest.items():
            value = getattr(self, name)
            rules[name] = (
                value,
                type(value) is int and value >= low,
                f"it must be an integer >= {low}",
            )
        for name in ("resume", "debug_mode", "sequential_repeat", "async_eval"):
            value = getattr(self, name)
            rules[name] = value, isinstance(value, bool), "it must be True or False"
        rules["checkpoint"] = (
            self.checkpoint,
            isinstance(self.checkpoint, str),
            "it must be latest, best or a folder's name",
        )

        for name in _schedule_names(type(self)):
            if not hasattr(self, name):
                rules[name] = "missing", False, "a setting is declared with its default"
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            rules[name] = value, value in choices, f"it must be {' or '.join(choices)}"

        # A value that is impossible in itself is told as that.
        for name, rule in (self._mode_rules() | self._ray_rules()).items():
            if name not in rules or rules[name][1]:
                rules[name] = rule
        asked, llm = self.use_orz_trainer, self.priorzero_cfg.llm
        rules["use_orz_trainer"] = (
            asked,
            asked in (None, True, False) and not (asked is False and llm.trainer == "orz"),
            "llm.trainer is orz: leave one of them out"
            if asked is False
            else "it must be True, False or None",
        )
        require(rules)
        self.priorzero_cfg.validate()
        if asked:
            require(_orz_rules(llm))

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
            rules = {} if asked else _orz_rules(llm)
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

    def _ray_rules(self) -> dict[str, tuple[Any, bool, str]]:
        """What must hold of `collector_workers` and `ray_address`, as `require` wants it."""
        settings, address = self.priorzero_cfg, self.ray_address
        orz, is_text = settings.llm.orz.ray_address, isinstance(address, str)
        rules = {
            "ray_address": (
                address,
                is_text and (not address or orz in ("", address)),
                f"llm.orz.ray_address is {orz!r}, and a run is in one Ray cluster"
                if is_text
                else "it must be host:port, auto or empty",
            )
        }
        workers = self.collector_workers
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

    def _mode_rules(self) -> dict[str, tuple[Any, bool, str]]:
        """What must hold of `wm_training_mode` and of the settings it reads, as `require` wants
        it.
        """
        mode, rules = self.wm_training_mode, {}
        if self._own_schedule():
            name = type(self).__name__
            text = f"class {name} has an iterate of its own: leave wm_training_mode out"
            rules["wm_training_mode"] = mode, mode == name, text
        else:
            files = plugins.names("priorzero.loop.schedules")
            text = f"priorzero/loop/schedules holds {', '.join(files)}"
            rules["wm_training_mode"] = mode, mode in files, text

        if mode != "parallel" and self.off_policy_degree:
            text = f"training beside collection is parallel's alone, and this is {mode}: take 0"
            rules["off_policy_degree"] = self.off_policy_degree, False, text
        if mode not in tuple(READ_BY):
            return rules
        for owner, names in READ_BY.items():
            for name in names:
                if owner != mode and getattr(self, name) not in _defaults(name):
                    text = f"only wm_training_mode {owner} reads it, and this is {mode}"
                    rules[name] = getattr(self, name), False, text

        llm = self.priorzero_cfg.llm
        learns = llm.enable and (llm.sft.enable or llm.rft.enable)
        if mode in ("sequential", "alternating") and not learns:
            text = "the LLM has turns, and there is none that learns: take parallel"
            rules["wm_training_mode"] = mode, False, text
        rules |= _who_plays(mode, llm)
        if mode == "alternating" and self.alternating_first == "llm":
            rules["alternating_llm_collect"] = (
                self.alternating_llm_collect,
                self.alternating_llm_collect in ("everything", "world_model"),
                "alternating_first is llm, which must play before it can learn",
            )
        return rules

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

CHOICES = dict(
    alternating_first=("world_model", "llm"),
    alternating_llm_collect=("everything", "world_model", "nothing"),
)


def _orz_rules(llm: LLMSettings) -> dict[str, tuple[Any, bool, str]]:
    """What ORZ's trainer needs of the settings, as `require` wants it."""
    return {
        f"llm.{rule.name}": (
            functools.reduce(getattr, rule.name.split("."), llm),
            rule.holds,
            f"{rule.text} (the preset orz has settings that fit)",
        )
        for rule in llm.orz_rules()
    }


def _who_plays(mode: str, llm: LLMSettings) -> dict[str, tuple[Any, bool, str]]:
    """Advantages must fit the player, as `require` wants it: those of groups need episodes that the
    LLM played alone, all others a search.
    """
    advantage, groups = llm.rft.advantage, ", ".join(GROUP_ADVANTAGES)
    if mode == "llm_only":
        learns = llm.enable and llm.rft.enable and llm.rft.relative
        text = "then an LLM plays alone, and llm.enable and llm.rft.enable must be true and "
        text += f"llm.rft.advantage one of {groups}: take the preset llm_only"
        return {"wm_training_mode": (mode, learns, text)}

    searched = not (llm.enable and llm.rft.enable and llm.rft.relative)
    text = f"a search plays in wm_training_mode {mode}: {groups} compare episodes that the LLM "
    text += "plays alone (the preset llm_only)"
    return {"llm.rft.advantage": (advantage, searched, text)}


def _defaults(name: str) -> list[Any]:
    """The values an attribute has where the user says nothing."""
    laid_over = [p.schedule[name] for p in PRESETS.values() if name in p.schedule]
    return [getattr(HybridTrainingConfig, name), *laid_over]


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
