"""Settings: everything shipped parses, everything impossible is rejected with value, rule and way
out.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import priorzero_config as config
from priorzero.settings.record import merge, parse_assignment, require
from priorzero.settings.record_old import overlay
from priorzero.types import PriorZeroError
from priorzero_config import (
    DEFAULTS,
    PRESETS,
    HybridTrainingConfig,
    get_priorzero_config,
    get_priorzero_config_for_quick_test,
)


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


@pytest.mark.parametrize("preset", list(PRESETS))
@pytest.mark.parametrize("debug", [False, True])
def test_every_preset_parses_and_takes_effect(preset, debug):
    main, create = get_priorzero_config(debug_mode=debug, presets=(preset,))
    for path, value in leaves(PRESETS[preset]):
        assert look(main, path) == value, path
    assert create.policy.type == "priorzero"


def test_debug_is_an_overlay_that_presets_and_overrides_lie_over():
    full, debug = get_priorzero_config()[0], get_priorzero_config(debug_mode=True)[0]
    touched = dict(leaves(config.DEBUG))
    for path, value in leaves(DEFAULTS):
        if path in touched:
            assert look(debug, path) == touched[path]
        elif path != ("exp_name",):
            assert look(debug, path) == look(full, path) == value
    main, _ = get_priorzero_config(
        debug_mode=True, presets=("pure_unizero",), overrides=dict(policy=dict(num_simulations=7))
    )
    small = config.DEBUG["policy"]
    assert (main.policy.num_simulations, main.policy.embed_dim, main.llm.enable) == (
        7,
        small["embed_dim"],
        False,
    )
    assert (
        get_priorzero_config_for_quick_test("zork1.z5", 3)[0].policy.num_simulations
        == small["num_simulations"]
    )
    assert (
        get_priorzero_config()[0].policy.num_simulations == DEFAULTS["policy"]["num_simulations"]
    )  # nothing leaked


@pytest.mark.parametrize("path", [path for path, _ in leaves(DEFAULTS)], ids=".".join)
def test_every_setting_is_known_by_name_and_type(path):
    """Its own default is accepted where it stands; a misspelt name and another type are not."""
    default = look(DEFAULTS, path)
    assert look(overlay(DEFAULTS, nested(path, default)), path) == default
    with pytest.raises(PriorZeroError, match="does not exist") as caught:
        overlay(DEFAULTS, nested((*path[:-1], path[-1] + "x"), default))
    assert path[-1] in str(caught.value)  # the right name is suggested
    if default is not None:
        with pytest.raises(PriorZeroError) as caught:
            overlay(DEFAULTS, nested(path, object()))
        assert ".".join(path) in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        ("policy.embed_dim", 100, "num_heads 8 and group_size 8 must divide it"),
        ("policy.context_steps", 11, r"1\.\.num_unroll_steps"),
        ("policy.num_simulations", 0, "positive"),
        ("policy.batch_size", -1, "positive"),
        ("policy.discount_factor", 1.5, r"\(0, 1\]"),
        ("policy.value_bootstrap", "mcts", "target_network or search"),
        ("policy.device", "tpu", "auto, cpu or cuda"),
        ("policy.replay_buffer_size", 3, "one segment"),
        ("policy.action_vocabulary.overflow", 512, r"1\.\.capacity-1"),
        ("policy.root_prior.weight", 1.5, r"\[0, 1\]"),
        ("policy.root_prior.mode", "both", "unknown"),
        ("env.max_steps", 0, "positive or None"),
        ("env.collector_env_num", 0, "positive"),
        ("llm.engine", "trt", "auto, vllm or transformers"),
        ("llm.dtype", "int8", "float32 or bfloat16"),
        ("llm.train.objective", "words", "actions or tokens"),
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
    ],
)
def test_unknown_names_and_wrong_types(overrides, message):
    with pytest.raises(PriorZeroError, match=message):
        get_priorzero_config(overrides=overrides)


def test_an_unknown_preset_lists_the_known_ones():
    with pytest.raises(PriorZeroError, match="fast.*debug, pure_unizero"):
        get_priorzero_config(presets=("fast",))


def test_integers_pass_as_floats_and_layers_do_not_touch_their_inputs():
    given = dict(policy=dict(learning_rate=1))
    main, _ = get_priorzero_config(overrides=given)
    assert main.policy.learning_rate == 1.0 and isinstance(main.policy.learning_rate, float)
    main.policy.root_prior.weight = 0.9
    main.eval.modes.append("random")
    assert (
        DEFAULTS["policy"]["root_prior"]["weight"] == 0.5
        and "random" not in DEFAULTS["eval"]["modes"]
    )
    assert given == dict(policy=dict(learning_rate=1))


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
    assert plan.use_orz_trainer == config.orz_available()


def test_subclass_attributes_and_overwriting():
    class Mine(HybridTrainingConfig):
        llm_train_freq = 10
        iterations = 7

    mine = Mine(debug_mode=True, eval_freq=3)
    assert (mine.llm_train_freq, mine.iterations, mine.eval_freq) == (10, 7, 3)
    assert mine.save_freq == HybridTrainingConfig.DEBUG_SCHEDULE["save_freq"]
    assert (
        Mine().iterations == 7
        and HybridTrainingConfig().iterations == HybridTrainingConfig.iterations
    )

    class Small(HybridTrainingConfig):
        debug_mode = True

    assert Small().iterations == HybridTrainingConfig.DEBUG_SCHEDULE["iterations"]
    assert Small(debug_mode=False).iterations == HybridTrainingConfig.iterations
    mine.priorzero_cfg.policy.num_simulations = 30
    mine.validate()
    assert mine.as_dict()["settings"].policy.num_simulations == 30
    mine.priorzero_cfg.policy.num_simulations = 0
    with pytest.raises(PriorZeroError, match="num_simulations is 0"):
        mine.validate()


@pytest.mark.parametrize(
    ("schedule", "rule"),
    [
        (dict(wm_train_freq=0), ">= 1"),
        (dict(llm_train_freq=-1), ">= 1"),
        (dict(eval_freq=-1), ">= 0"),
        (dict(iterations=1.5), "integer"),
        (dict(wm_training_mode="sometimes"), "'sometimes'"),
        (dict(iteration=3), "'iteration' does not exist"),
    ],
)
def test_impossible_schedules(schedule, rule):
    with pytest.raises(PriorZeroError, match=rule):
        HybridTrainingConfig(**schedule)


def test_orz_is_not_taken_for_granted():
    if config.orz_available():
        pytest.skip("Open-Reasoner-Zero is installed here")
    with pytest.raises(PriorZeroError, match="PYTHONPATH"):
        HybridTrainingConfig(use_orz_trainer=True)


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


# ---- helpers -------------------------------------------------------------------------------------


def test_command_line_assignments():
    assert parse_assignment("policy.num_simulations=30") == {"policy": {"num_simulations": 30}}
    assert parse_assignment("llm.model=Qwen/Qwen2.5-0.5B-Instruct") == {
        "llm": {"model": "Qwen/Qwen2.5-0.5B-Instruct"}
    }
    assert parse_assignment('eval.modes=["random"]') == {"eval": {"modes": ["random"]}}
    assert parse_assignment("env.games_dir=a=b") == {"env": {"games_dir": "a=b"}}
    for broken in ("policy.num_simulations", "=3"):
        with pytest.raises(PriorZeroError, match="group.setting=value"):
            parse_assignment(broken)


def test_merge_and_require():
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": 4,
    }
    require({"a": (1, True, "it must be")})
    with pytest.raises(PriorZeroError, match="a is 1, but it must be two"):
        require({"a": (1, False, "it must be two")})


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


def test_cuda_without_a_gpu_is_one_clear_error(monkeypatch):
    import torch

    from priorzero.lightzero import resolve_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(PriorZeroError, match="--device cpu"):
        resolve_device("cuda")
