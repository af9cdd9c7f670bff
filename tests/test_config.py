"""Settings: everything shipped parses, everything impossible is rejected with value, rule and way
out.
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest

from priorzero.orz import orz_status
from priorzero.settings.experiment import ExperimentSettings
from priorzero.types import PriorZeroError
from priorzero_config import (
    DEBUG,
    PRESETS,
    HybridTrainingConfig,
    get_priorzero_config,
    get_priorzero_config_for_quick_test,
)

DEFAULTS = ExperimentSettings().as_dict()


def leaves(tree, path=()):
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key), value


def nested(path, value):
    for key in reversed(path):
        value = {key: value}
    return value


def look(tree, path):
    for key in path:
        tree = tree[key]
    return tree


# ---- presets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("debug", [False, True])
def test_every_preset_parses_and_takes_effect(preset, debug):
    plan = HybridTrainingConfig(debug_mode=debug, presets=(preset,))
    for path, value in leaves(PRESETS[preset].settings):
        assert look(plan.priorzero_cfg.as_dict(), path) == value, path
    for name, value in PRESETS[preset].schedule.items():
        assert getattr(plan, name) == value
    assert plan.priorzero_create_cfg["policy"]["type"] == "priorzero"


def test_debug_is_an_overlay_that_presets_and_overrides_lie_over():
    debug = get_priorzero_config(debug_mode=True)[0].as_dict()
    touched = dict(leaves(DEBUG.settings))
    for path, value in leaves(DEFAULTS):
        if path != ("exp_name",):
            assert look(debug, path) == touched.get(path, value), path
    main, _ = get_priorzero_config(
        debug_mode=True, presets=("pure_unizero",), overrides=dict(policy=dict(num_simulations=7))
    )
    small = DEBUG.settings["policy"]
    assert (main.policy.num_simulations, main.policy.embed_dim, main.llm.enable) == (
        7,
        small["embed_dim"],
        False,
    )
    quick, _ = get_priorzero_config_for_quick_test("zork1.z5", 3)
    assert quick.policy.num_simulations == small["num_simulations"]
    # Nothing leaked into the defaults.
    full, _ = get_priorzero_config()
    assert full.policy.num_simulations == DEFAULTS["policy"]["num_simulations"]


def test_the_debug_preset_is_debug_mode():
    preset, mode = HybridTrainingConfig(presets=("debug",)), HybridTrainingConfig(debug_mode=True)
    assert preset.as_dict() == mode.as_dict()
    assert preset.debug_mode and preset.iterations == DEBUG.schedule["iterations"] == 60
    # It comes first, wherever it is named: what is smaller still stands.
    small = HybridTrainingConfig(presets=("lora", "debug")).priorzero_cfg
    assert (
        small.llm.train.learning_rate == PRESETS["lora"].settings["llm"]["train"]["learning_rate"]
    )


@pytest.mark.parametrize(
    ("preset", "sft", "rft"),
    [("sft_only", True, False), ("rft_only", False, True), ("frozen", False, False)],
)
def test_what_the_llm_learns_from(preset, sft, rft):
    llm = get_priorzero_config(presets=(preset,))[0].llm
    assert (llm.enable, llm.sft.enable, llm.rft.enable) == (True, sft, rft)


@pytest.mark.parametrize("preset", ["sft_only", "frozen"])
def test_rft_contradicts_a_preset_without_it(preset):
    with pytest.raises(PriorZeroError, match=f"--rft.*{preset}"):
        get_priorzero_config(enable_rft=True, presets=(preset,))
    both = get_priorzero_config(enable_rft=True, presets=("rft_only",))[0].llm
    assert (both.sft.enable, both.rft.enable) == (False, True)


# ---- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path, _ in leaves(DEFAULTS)], ids=".".join)
def test_every_setting_is_known_by_name_and_type(path):
    """Its own default is accepted where it stands; a misspelt name and another type are not."""
    default = look(DEFAULTS, path)
    if path != ("exp_name",):
        main, _ = get_priorzero_config(overrides=nested(path, default))
        assert look(main.as_dict(), path) == default
    with pytest.raises(PriorZeroError, match="does not exist") as caught:
        get_priorzero_config(overrides=nested((*path[:-1], path[-1] + "x"), default))
    assert path[-1] in str(caught.value)  # the right name is suggested
    with pytest.raises(PriorZeroError) as caught:
        get_priorzero_config(overrides=nested(path, object()))
    assert ".".join(path) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("policy.embed_dim", 100, "num_heads 8 and group_size 8 must divide it"),
        ("policy.context_steps", 11, r"1\.\.num_unroll_steps"),
        ("policy.burn_in", 4, r"0\.\.context_steps - 1 \(3\)"),
        ("policy.burn_in", -1, r"0\.\.context_steps - 1"),
        ("policy.reanalyse_ratio", 1.5, r"\[0, 1\]"),
        ("policy.num_simulations", 0, "positive"),
        ("policy.batch_size", -1, "positive"),
        ("policy.discount_factor", 1.5, r"\(0, 1\]"),
        ("policy.value_bootstrap", "mcts", "target_network or search"),
        ("policy.device", "tpu", "auto, cpu or cuda"),
        ("policy.replay_buffer_size", 3, "one segment"),
        ("policy.action_vocabulary.overflow", 512, r"1\.\.capacity-1"),
        ("policy.root_prior.weight", 1.5, r"\[0, 1\]"),
        ("policy.root_prior.temperature", "warm", "must be a positive number, or auto"),
        ("policy.root_prior.temperature", -2.0, "must be a positive number, or auto"),
        ("policy.root_prior.calibration.start", 0.1, r"lowest \(0.25\) <= start"),
        ("policy.root_prior.calibration.highest", math.inf, "all finite"),
        ("policy.root_prior.calibration.lowest", 0.0, "positive"),
        ("policy.root_prior.calibration.least", 300, r"1\.\.most \(256\)"),
        ("policy.root_prior.calibration.rate", 0.0, r"\(0, 1\]"),
        ("policy.root_prior.mode", "both", "llm_logits, wm_logits or llm_plus_wm_logits"),
        ("policy.embed_dim", 0, "positive"),
        ("policy.num_heads", 0, "positive"),
        ("policy.root_noise_weight", 1.5, r"\[0, 1\]"),
        ("env.max_steps", 0, "positive or None"),
        ("env.collector_env_num", 0, "positive"),
        ("llm.engine", "trt", "auto, vllm or transformers"),
        ("llm.dtype", "int8", "float32 or bfloat16"),
        ("llm.train.objective", "words", "actions or tokens"),
        ("llm.train.clip_epsilon", 1.0, "between 0 and 1"),
        ("llm.trainer", "nobody", "trainers holds builtin"),
        ("llm.rft.objective", "word", "objectives holds action, sequence, token"),
        ("llm.rft.cot_weight", 0.5, "no chain of thought to train without prompt.use_cot"),
        ("llm.rft.advantage", "best", "raw, batch, running, robust, group, group_mean or leave"),
        ("llm.rft.group_return", "discounted", "episode or to_go"),
        ("llm.rft.group_return", "to_go", "only advantage group, group_mean, leave_one_out"),
        ("llm.rft.clip_epsilon_high", 0.0, "positive or None"),
        ("llm.rft.dual_clip", 1.0, "0 or above 1"),
        ("llm.rft.epochs", 0, "positive"),
        ("llm.rft.mismatch", "tis", "off, truncate or mask"),
        ("llm.rft.mismatch_low", 1.5, "at most 1"),
        ("llm.rft.mismatch_high", 0.5, "at least 1"),
        ("llm.rft.max_staleness", -1, "not be negative"),
        ("llm.rft.kl_estimator", "k4", "exact, k1, k2 or k3"),
        ("llm.rft.kl_reference", "copy", "collected or initial"),
        ("policy.root_policy", "best", "root_policies holds gumbel, lightzero, puct"),
        ("llm.vllm.tensor_parallel_size", 0, "positive"),
        ("llm.prompt.max_prompt_tokens", 8, "at least 32"),
        ("llm.enable", False, "leave those out or enable it"),
        ("eval.modes", ["best"], "among"),
        ("eval.modes", [], "among"),
        ("seed", -1, r"2\*\*31"),
    ],
)
def test_impossible_values_are_rejected_with_value_and_rule(path, value, rule):
    with pytest.raises(PriorZeroError, match=rule) as caught:
        get_priorzero_config(overrides=nested(tuple(path.split(".")), value))
    assert repr(value) in str(caught.value) or str(value) in str(caught.value)


def test_a_temperature_is_a_number_or_auto():
    def given(value, **policy):
        root_prior = dict(temperature=value)
        settings, _ = get_priorzero_config(
            overrides=dict(policy=dict(root_prior=root_prior) | policy)
        )
        return settings.policy.root_prior

    assert [given(v).calibrated for v in (2.5, "auto")] == [False, True]
    # Of one value there is one form in a run's config.json.
    assert repr(given(8).temperature) == "8.0"
    with pytest.raises(PriorZeroError, match=r"is True \(bool\); it must be float or str"):
        given(True)
    # What the LLM said at temperature 1 would be confirmed by itself.
    with pytest.raises(PriorZeroError, match="take target_prior mixture or world_model") as caught:
        given("auto", target_prior="llm")
    assert len(str(caught.value).splitlines()) == 2
    assert given("auto", target_prior="world_model").calibrated


def test_a_temperature_of_sft_belongs_to_its_softmax_over_the_actions():
    def given(sft, **train):
        get_priorzero_config(overrides=dict(llm=dict(sft=sft, train=train)))

    given(dict(temperature=8))
    given(dict(temperature=1, target_prior="llm"), objective="tokens")
    with pytest.raises(PriorZeroError, match="llm.sft.temperature is 0.0.*positive"):
        given(dict(temperature=0))
    with pytest.raises(PriorZeroError, match="llm.sft.temperature is 8.0.*target_prior llm"):
        given(dict(temperature=8, target_prior="llm"))
    with pytest.raises(PriorZeroError, match="llm.sft.temperature is 8.0.*objective is tokens"):
        given(dict(temperature=8), objective="tokens")


def test_all_impossible_values_are_named_at_once():
    with pytest.raises(PriorZeroError) as caught:
        get_priorzero_config(overrides=dict(policy=dict(num_simulations=0, device="tpu"), seed=-4))
    assert all(
        name in str(caught.value) for name in ("policy.num_simulations", "policy.device", "seed")
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(polcy=dict()), "did you mean policy"),
        (dict(policy=dict(num_simulation=3)), "did you mean num_simulations"),
        (dict(policy=3), "group of settings"),
        (dict(policy=dict(num_simulations=2.5)), r"2\.5 \(float\)"),
        (dict(policy=dict(num_simulations="9")), r"'9' \(str\)"),
        (dict(policy=dict(use_priority=1)), r"1 \(int\)"),
        (dict(policy=dict(learning_rate=True)), "True"),
        (dict(llm=dict(model=["a"])), "list"),
        (dict(policy=dict(num_simulations=None)), r"None \(NoneType\); it must be like 50 \(int\)"),
        (dict(env=dict(max_steps="many")), "int or None"),
        (dict(eval=dict(modes=[3])), r"\[3\]"),
    ],
)
def test_unknown_names_and_wrong_types(overrides, message):
    with pytest.raises(PriorZeroError, match=message):
        get_priorzero_config(overrides=overrides)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(PriorZeroError, match="fast.*debug, pure_unizero"):
        get_priorzero_config(presets=("fast",))


def test_overwriting_one_configuration_changes_no_other():
    given = dict(policy=dict(learning_rate=1))
    main, _ = get_priorzero_config(overrides=given)
    assert main.policy.learning_rate == 1.0 and isinstance(main.policy.learning_rate, float)
    main.policy.root_prior.weight = 0.9
    main.eval.modes.append("random")
    assert given == dict(policy=dict(learning_rate=1))
    assert get_priorzero_config()[0].as_dict() | {"exp_name": ""} == DEFAULTS


# ---- the schedule --------------------------------------------------------------------------------


def test_every_schedule_attribute_exists_with_its_type_and_is_saved():
    plan = HybridTrainingConfig(env_id="detective.z5", seed=3)
    saved = plan.as_dict()["schedule"]
    for name in HybridTrainingConfig.__annotations__:
        if not name.startswith("priorzero_"):
            assert name in saved and type(saved[name]) is type(
                getattr(HybridTrainingConfig, name)
            ), name
    assert (plan.wm_training_mode, plan.wm_train_freq, plan.llm_train_freq) == ("parallel", 1, 5)
    assert plan.priorzero_cfg.env.env_id == "detective.z5" and plan.priorzero_cfg.seed == 3


def test_subclass_attributes_and_overwriting():
    class Mine(HybridTrainingConfig):
        llm_train_freq = 10
        iterations = 7

    mine = Mine(debug_mode=True, eval_freq=3)
    assert (mine.llm_train_freq, mine.iterations, mine.eval_freq) == (10, 7, 3)
    assert mine.save_freq == DEBUG.schedule["save_freq"]
    assert (
        Mine().iterations == 7
        and HybridTrainingConfig().iterations == HybridTrainingConfig.iterations
    )

    class Small(HybridTrainingConfig):
        debug_mode = True

    assert Small().iterations == DEBUG.schedule["iterations"]
    assert Small(debug_mode=False).iterations == HybridTrainingConfig.iterations
    mine.priorzero_cfg.policy.num_simulations = 30
    mine.validate()
    assert mine.as_dict()["settings"]["policy"]["num_simulations"] == 30
    mine.priorzero_cfg.policy.num_simulations = 0
    with pytest.raises(PriorZeroError, match="num_simulations is 0"):
        mine.validate()


def test_a_subclass_stands_in_debug_mode_even_with_the_default_value():
    class Long(HybridTrainingConfig):
        iterations = HybridTrainingConfig.iterations

    class Longer(Long):
        save_freq = 7

    for plan in (Longer(debug_mode=True), Longer(presets=("debug",))):
        assert (plan.iterations, plan.save_freq) == (HybridTrainingConfig.iterations, 7)
        assert plan.eval_freq == DEBUG.schedule["eval_freq"]
    assert Longer(debug_mode=True, iterations=3).iterations == 3


def test_misspelt_attributes_of_the_schedule_are_refused():
    class Misspelt(HybridTrainingConfig):
        llm_train_frequency = 10

    with pytest.raises(PriorZeroError, match="did you mean llm_train_freq"):
        Misspelt()
    with pytest.raises(PriorZeroError, match="did you mean iterations"):
        HybridTrainingConfig().iteration = 3
    with pytest.raises(PriorZeroError, match="did you mean num_simulations"):
        HybridTrainingConfig().priorzero_cfg.policy.simulations = 3


ADVANTAGE = dict(llm=dict(rft=dict(advantage="batch")))
BOTH = dict(llm=dict(sft=dict(enable=True)))


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [
        (dict(wm_train_freq=0), ">= 1"),
        (dict(llm_train_freq=-1), ">= 1"),
        (dict(eval_freq=-1), ">= 0"),
        (dict(iterations=1.5), "integer"),
        (dict(iterations=True), "integer"),
        (dict(resume="no"), "True or False"),
        (dict(checkpoint=3), "folder"),
        (dict(wm_training_mode="sometimes"), "'sometimes'"),
        (dict(iteration=3), "'iteration' does not exist"),
        (dict(sequential_wm_updates=0), ">= 1"),
        (dict(alternating_llm_phases=2.0), "integer"),
        (dict(sequential_repeat=1), "True or False"),
        (dict(alternating_first="both"), "'both', but it must be world_model or llm"),
        (dict(alternating_llm_collect=None), "everything or world_model or nothing"),
        (dict(wm_training_mode=["parallel"]), "holds alternating, llm_only, parallel, sequential"),
        # What another mode reads would be ignored.
        (dict(alternating_first="llm"), "only wm_training_mode alternating reads it.*parallel"),
        (
            dict(wm_training_mode="alternating", sequential_wm_updates=7),
            "only wm_training_mode sequential reads it.*alternating",
        ),
        (
            dict(
                wm_training_mode="alternating",
                alternating_first="llm",
                alternating_llm_collect="nothing",
            ),
            "must play before it can learn",
        ),
        (dict(off_policy_degree=-2), ">= -1"),
        (dict(off_policy_degree=1.0), "integer"),
        (dict(async_eval=1), "True or False"),
        (
            dict(wm_training_mode="sequential", off_policy_degree=1),
            "beside collection is parallel's alone, and this is sequential",
        ),
        # Who plays must fit what the LLM learns from.
        (dict(wm_training_mode="llm_only"), "'llm_only'.*take the preset llm_only"),
        (dict(presets=("llm_only",), enable_llm=False), "'llm_only'.*llm.enable"),
        (dict(presets=("llm_only",), overrides=ADVANTAGE), "'llm_only'.*group, group_mean"),
        (
            dict(presets=("llm_only",), wm_training_mode="parallel"),
            "llm.rft.advantage is 'group', but a search plays in wm_training_mode parallel",
        ),
        (dict(presets=("llm_only",), enable_rft=True, overrides=BOTH), "SFT learns from a search"),
        (dict(llm_only_episodes=1), ">= 2"),
        (dict(llm_only_episodes=4), "only wm_training_mode llm_only reads it"),
        # Turns of an LLM that is not there, or that learns nothing.
        (dict(wm_training_mode="sequential", enable_llm=False), "none that learns"),
        (dict(wm_training_mode="alternating", presets=("frozen",)), "none that learns"),
    ],
)
@pytest.mark.parametrize("debug_mode", [False, True])
def test_impossible_schedules(schedule, rule, debug_mode):
    with pytest.raises(PriorZeroError, match=rule):
        HybridTrainingConfig(**schedule, debug_mode=debug_mode)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize("mode", ["parallel", "sequential", "alternating"])
def test_every_mode_has_settings_that_fit(mode, debug):
    plan = HybridTrainingConfig(wm_training_mode=mode, debug_mode=debug)
    # About as many updates as an iteration's transitions call for: both get turns in time.
    policy = plan.priorzero_cfg.policy
    updates = policy.replay_ratio * policy.num_segments * policy.game_segment_length
    first = plan.sequential_wm_updates / updates
    assert first + plan.sequential_llm_phases <= plan.iterations
    cycle = plan.alternating_wm_updates / updates + plan.alternating_llm_phases
    assert 5 * cycle <= plan.iterations
    plan.wm_training_mode = "sometimes"
    with pytest.raises(PriorZeroError, match="sometimes"):
        plan.validate()


def test_the_command_line_reaches_every_setting_of_the_schedules():
    from priorzero_orz_entry import config_from, parse_arguments

    def plan(*arguments: str) -> HybridTrainingConfig:
        return config_from(parse_arguments([*arguments]), debug_mode=True)

    one = plan(
        "--wm-training-mode=alternating",
        "--alternating-wm-updates=7",
        "--alternating-llm-phases=3",
        "--alternating-first=llm",
        "--alternating-llm-collect=world_model",
    )
    assert (one.wm_training_mode, one.alternating_wm_updates) == ("alternating", 7)
    assert (one.alternating_llm_phases, one.alternating_first) == (3, "llm")
    assert one.alternating_llm_collect == "world_model"

    other = plan(
        "--wm-training-mode=sequential",
        "--sequential-wm-updates=9",
        "--sequential-llm-phases=4",
        "--sequential-repeat",
    )
    assert other.as_dict()["schedule"]["wm_training_mode"] == "sequential"
    assert (other.sequential_wm_updates, other.sequential_llm_phases) == (9, 4)
    assert other.sequential_repeat is True and plan().sequential_repeat is False
    assert plan().sequential_wm_updates == DEBUG.schedule["sequential_wm_updates"]

    beside = plan("--off-policy-degree=-1", "--async-eval")
    assert (beside.off_policy_degree, beside.async_eval) == (-1, True)
    assert plan("--off-policy-degree", "2").as_dict()["schedule"]["off_policy_degree"] == 2
    assert (plan().off_policy_degree, plan().async_eval) == (0, False)
    turns = plan("--wm-training-mode=alternating", "--async-eval")
    assert turns.async_eval is True


@pytest.mark.parametrize("debug", [False, True])
def test_the_llm_alone_has_settings_that_fit(debug):
    plan = HybridTrainingConfig(presets=("llm_only",), debug_mode=debug)
    assert plan.wm_training_mode == "llm_only" and plan.llm_only_episodes == 8
    llm = plan.priorzero_cfg.llm
    assert (llm.sft.enable, llm.rft.enable, llm.rft.relative) == (False, True, True)
    assert plan.priorzero_cfg.eval.modes == ["llm", "random"]
    # A run of its own: it takes no other's folder.
    assert "_llmonly" in plan.priorzero_cfg.exp_name
    plan.priorzero_cfg.llm.rft.group_return = "to_go"
    plan.priorzero_cfg.llm.rft.advantage = "leave_one_out"
    plan.validate()
    for advantage, fits in (("batch", True), ("group", False)):
        other = HybridTrainingConfig(enable_rft=True, debug_mode=debug)
        other.priorzero_cfg.llm.sft.enable = False
        other.priorzero_cfg.llm.rft.advantage = advantage
        if fits:
            other.validate()
        else:
            with pytest.raises(PriorZeroError, match="a search plays"):
                other.validate()


def test_a_schedule_of_ones_own_may_let_the_llm_play_alone():
    plan = Own(debug_mode=True, presets=("llm_only",))
    assert plan.wm_training_mode == "Own" and plan.priorzero_cfg.llm.rft.advantage == "group"


def test_other_ways_to_customise():
    """Attributes set after the base's constructor, and on an instance; frequencies, which only
    parallel reads, may stand beside any mode.
    """

    class Patient(HybridTrainingConfig):
        def __init__(self):
            super().__init__(env_id="tw-simple", debug_mode=True)
            self.wm_training_mode = "alternating"
            self.wm_train_freq = 2
            self.llm_train_freq = 10

    plan = Patient()
    plan.validate()
    assert plan.as_dict()["schedule"]["llm_train_freq"] == 10
    plan.wm_training_mode = "sequential"
    plan.sequential_repeat = True
    plan.validate()
    plan.alternating_llm_phases = 77
    with pytest.raises(PriorZeroError, match="alternating_llm_phases is 77, but only"):
        plan.validate()


class Own(HybridTrainingConfig):
    """A schedule by subclass, with a setting of its own."""

    warm_up: int = 50

    async def iterate(self, parts):
        """One iteration."""


def test_a_subclass_may_bring_a_schedule_and_settings():
    plan = Own(debug_mode=True, warm_up=3)
    saved = plan.as_dict()["schedule"]
    assert (saved["wm_training_mode"], saved["warm_up"]) == ("Own", 3)
    assert Own.warm_up == 50 and "warm_up" not in HybridTrainingConfig().as_dict()["schedule"]
    with pytest.raises(PriorZeroError, match="did you mean warm_up"):
        Own(warmup=3)
    with pytest.raises(PriorZeroError, match="warm_up.*does not exist"):
        HybridTrainingConfig(warm_up=3)
    with pytest.raises(PriorZeroError, match="class Own has an iterate of its own"):
        Own(wm_training_mode="sequential")
    # It may read the numbers of any mode.
    assert Own(llm_train_freq=7, alternating_first="llm").llm_train_freq == 7

    with pytest.raises(PriorZeroError, match="parallel's alone, and this is Own"):
        Own(off_policy_degree=1)

    class Unfinished(Own):
        cool_down: int

    with pytest.raises(PriorZeroError, match="cool_down.*declared with its default"):
        Unfinished()


def test_the_banner_tells_the_schedule():
    from types import SimpleNamespace

    from priorzero.run.report import banner

    def mode(plan: HybridTrainingConfig) -> str:
        games = (SimpleNamespace(env_id="g", kind="k"),)
        facts = dict(folder=Path("f"), games=games, llm="l", device="cpu", parameters=1)
        facts |= dict(eval_games=games, not_orz="no clone")
        lines = banner(plan, **facts, orz=(False, "")).splitlines()
        return next(line for line in lines if line.startswith("Training mode:"))[17:]

    assert mode(HybridTrainingConfig()) == "parallel: world model every 1, LLM every 5"
    ahead = mode(HybridTrainingConfig(off_policy_degree=2))
    assert ahead.endswith("LLM every 5, beside collection (off-policy degree: 2 ahead)")
    assert mode(HybridTrainingConfig(off_policy_degree=-1)).endswith("degree: by itself)")
    once = HybridTrainingConfig(wm_training_mode="sequential", sequential_wm_updates=9)
    assert mode(once) == "sequential: world model 9 updates, then LLM 200 phases, once"
    once.sequential_repeat = True
    assert mode(once).endswith("again and again")
    turns = HybridTrainingConfig(wm_training_mode="alternating", alternating_first="llm")
    assert mode(turns) == (
        "alternating: world model 1000 updates, LLM 5 phases, in turns, llm first, "
        "the LLM's collects everything"
    )
    assert mode(Own()) == "Own"


TOKENS = dict(
    llm=dict(sft=dict(enable=False), rft=dict(enable=True, objective="token", kl_estimator="k3"))
)


@pytest.mark.parametrize(
    ("chosen", "why"),
    [
        ({}, "llm.rft.enable is False"),
        (dict(enable_rft=True), "llm.sft.enable is True"),
        (dict(enable_llm=False, overrides=TOKENS), "llm.enable is False"),
        (dict(overrides=TOKENS), ""),
        (dict(overrides=TOKENS, use_orz_trainer=False), "use_orz_trainer is False"),
        (dict(use_orz_trainer=True, debug_mode=True), ""),
        (dict(presets=("orz",)), ""),
    ],
)
def test_orz_trains_where_it_is_and_can(chosen, why, tmp_path, monkeypatch):
    config = HybridTrainingConfig(**chosen)
    put_orz(tmp_path, monkeypatch, "class RayPPOTrainer: pass")
    assert config.settle_trainer() == why
    assert config.use_orz_trainer is (why == "")
    assert config.priorzero_cfg.llm.trainer == ("builtin" if why else "orz")
    # Settled once, it stays so.
    assert bool(config.settle_trainer()) is bool(why)


@pytest.mark.parametrize("asked", [dict(use_orz_trainer=True), dict(presets=("orz",))])
def test_asking_for_orz_where_it_is_not_is_one_error(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("ORZ_HOME", str(tmp_path))
    assert HybridTrainingConfig(overrides=TOKENS).settle_trainer().startswith("ORZ_HOME=")

    config = HybridTrainingConfig(**asked)
    with pytest.raises(PriorZeroError, match="asked for and cannot be used: ORZ_HOME=.*docs/ORZ"):
        config.settle_trainer()
    # An evaluation needs none of it: its checkpoints are the built-in trainer's.
    assert config.settle_trainer(eval_only=True)
    assert config.priorzero_cfg.llm.trainer == "builtin"


def test_what_orz_cannot_do_is_refused_with_the_reason():
    with pytest.raises(PriorZeroError, match="llm.lora.enable is True, but ORZ's trainer trains"):
        HybridTrainingConfig(use_orz_trainer=True, presets=("lora",))
    config = HybridTrainingConfig(enable_rft=True)
    config.use_orz_trainer = True
    with pytest.raises(PriorZeroError) as refused:
        config.validate()
    for told in ("llm.rft.objective is 'action'", "ORZ rates tokens", "the preset orz"):
        assert told in str(refused.value)
    with pytest.raises(PriorZeroError, match="leave one of them out"):
        HybridTrainingConfig(use_orz_trainer=False, presets=("orz",))
    with pytest.raises(PriorZeroError, match="name a cluster in ray_address"):
        HybridTrainingConfig(overrides=dict(llm=dict(orz=dict(actor_nodes=2))))


@pytest.mark.parametrize(
    ("trainer", "found"),
    [
        (None, False),
        ("", False),
        ("def RayPPOTrainer(): ...", False),
        ("class RayPPOTrainer(:", False),
        ("import a_package_nobody_has\n\nclass RayPPOTrainer:\n    pass\n", True),
    ],
)
def test_orz_is_recognised_by_its_trainers_class(trainer, found, tmp_path, monkeypatch):
    put_orz(tmp_path, monkeypatch, trainer)
    available, reason = orz_status()
    assert available is found
    assert str(tmp_path) in reason and ("RayPPOTrainer" in reason) is not found


def test_orz_without_its_packages_is_not_available(tmp_path, monkeypatch):
    put_orz(tmp_path, monkeypatch, "class RayPPOTrainer: pass", needed=("json", "no_such_package"))
    available, reason = orz_status()
    assert not available
    assert "no_such_package not installed: pip install" in reason and "json" not in reason


def test_orz_home_goes_before_the_path(tmp_path, monkeypatch):
    put_orz(tmp_path / "path", monkeypatch, "class RayPPOTrainer: pass")
    assert orz_status() == (True, str(tmp_path / "path" / "orz" / "ppo"))
    monkeypatch.setenv("ORZ_HOME", str(tmp_path / "home"))
    assert orz_status()[0] is False
    (tmp_path / "path").rename(tmp_path / "home")
    assert orz_status() == (True, str(tmp_path / "home" / "orz" / "ppo"))


def put_orz(folder, monkeypatch, trainer: str | None, needed: tuple[str, ...] = ()) -> None:
    """A package `orz` with a folder `ppo`; trainer: the text of its `trainer.py`; needed: the
    packages that it needs.
    """
    monkeypatch.delenv("ORZ_HOME", raising=False)
    monkeypatch.setattr("priorzero.orz.NEEDED", needed)
    (folder / "orz" / "ppo").mkdir(parents=True)
    for package in ("orz", "orz/ppo"):
        (folder / package / "__init__.py").touch()
    if trainer is not None:
        (folder / "orz" / "ppo" / "trainer.py").write_text(trainer)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "orz", raising=False)


def test_names_of_experiments():
    assert get_priorzero_config("zork1.z5", 2)[0].exp_name == "data_priorzero/zork1_priorzero_seed2"
    assert (
        get_priorzero_config("tw-coin:level=5", 0, enable_llm=False, debug_mode=True)[0].exp_name
        == "data_priorzero/tw-coin-level-5_unizero_debug_seed0"
    )
    assert get_priorzero_config(exp_name="mine")[0].exp_name == "data_priorzero/mine"


def test_enable_llm_and_rft():
    assert get_priorzero_config(enable_rft=True)[0].llm.rft.enable is True
    off = get_priorzero_config(enable_llm=False)[0]
    assert (off.llm.enable, off.policy.root_prior.mode, off.eval.modes) == (
        False,
        "wm_logits",
        ["world_model"],
    )


# ---- at LightZero's door, and at start -----------------------------------------------------------


def test_settings_and_entry_import_nothing_heavy():
    """`--help` and a typing error must answer at once."""
    code = (
        "import sys, priorzero_config, priorzero_orz_entry\n"
        "priorzero_config.get_priorzero_config(debug_mode=True)\n"
        "heavy = ('torch', 'lzero', 'ding', 'transformers', 'vllm', 'jericho', 'textworld')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[1],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_compiled_settings_reach_lightzero_once(compiled_cfg):
    cfg = compiled_cfg(num_unroll_steps=6, support_scale=7, embed_dim=64).policy
    wm = cfg.model.world_model_cfg
    assert (
        cfg.model.action_space_size == wm.action_space_size == cfg.action_vocabulary.capacity == 12
    )
    assert (wm.max_blocks, wm.max_tokens, wm.support_size, wm.embed_dim) == (6, 12, 15, 64)
    assert cfg.model.observation_shape == cfg.model.action_text_dim == 6
    assert compiled_cfg(action_vocabulary=dict(kind="positional")).policy.model.action_text_dim == 0
    assert compiled_cfg(fixed_temperature_value=0.3).policy.fixed_temperature_value == 0.3


def test_the_record_goes_through_lightzeros_door(compiled_cfg):
    """LightZero has defaults under the same names; what is compiled is what our records say."""
    compiled = compiled_cfg(root_policy="puct", loss_weights=dict(entropy=0.5)).policy
    record = compiled.settings
    assert record.loss_weights.entropy == 0.5
    for name, value in record.as_dict().items():
        if name in compiled and name != "device":
            assert compiled[name] == value, name


def test_cuda_without_a_gpu_is_one_clear_error(monkeypatch):
    import torch

    from priorzero.compute import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(PriorZeroError, match="--device cpu"):
        resolve_device("cuda")
