"""Our settings in the shape LightZero and DI-engine want: one function, called once per run.

LightZero wants several settings in several places (the action space size in four), as EasyDicts.
The result is what DI-engine's `compile_config` makes of it, defaults of every class merged in. Our
own parts do not read it: they take the records of `priorzero/settings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from priorzero.compute import resolve_device
from priorzero.quiet import quiet_base
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.policy import PolicySettings

with quiet_base():
    from ding.config import compile_config
    from ding.utils import deep_merge_dicts
    from lzero.policy.unizero import UniZeroPolicy

# What LightZero reads from its model's settings only, or in another form.
_NOT_PASSED_ON = ("embed_dim", "num_layers", "num_heads", "group_size", "support_scale", "device")


def compile_priorzero(
    settings: ExperimentSettings, create_cfg: Mapping[str, Any], text_dim: int
) -> EasyDict:
    """The compiled settings.

    Args:
        settings: of the run; the compiled `policy.settings` is a copy of its `policy`.
        create_cfg: class names for DI-engine's registries.
        text_dim: `E`, dimension of the sentence encoder, of observations and action texts alike.
    """
    p, device = settings.policy, resolve_device(settings.policy.device)
    values = {name: v for name, v in p.as_dict().items() if name not in _NOT_PASSED_ON}

    policy = dict(
        values,
        settings=p,
        model=_model(settings, device, text_dim),
        device=device,
        cuda=device == "cuda",
        seed=settings.seed,
        env_type="not_board_games",
        action_type="varied_action_space",
        manual_temperature_decay=False,
        use_wandb=False,
        collector_env_num=settings.env.collector_env_num,
        evaluator_env_num=settings.env.evaluator_env_num,
        n_episode=settings.env.collector_env_num,
        learn=dict(learner=dict(log_policy=False)),
    )
    main = EasyDict(
        exp_name=settings.exp_name,
        seed=settings.seed,
        env=dict(settings.env.as_dict(), manager=dict(shared_memory=False)),
        policy=policy,
    )
    with quiet_base():
        return compile_config(
            main, seed=settings.seed, auto=True, create_cfg=EasyDict(create_cfg), save_cfg=False
        )


def network_settings(settings: ExperimentSettings, text_dim: int) -> EasyDict:
    """What `PriorZeroModel` is constructed with, for who wants the network alone: LightZero's
    defaults, and ours over them, as `compile_priorzero` has them.

    Args:
        settings: of the run.
        text_dim: `E`, see `compile_priorzero`.
    """
    own = _model(settings, resolve_device(settings.policy.device), text_dim)
    merged = deep_merge_dicts(UniZeroPolicy.default_config().model, EasyDict(own))
    return EasyDict({n: v for n, v in merged.items() if n not in ("type", "import_names")})


def _model(settings: ExperimentSettings, device: str, text_dim: int) -> dict[str, Any]:
    """LightZero's model settings; names and places are its own."""
    p: PolicySettings = settings.policy
    capacity = p.action_vocabulary.capacity
    positions = p.burn_in + p.num_unroll_steps  # that training visits

    # What its transformer takes; a token each for an observation and an action.
    world_model = dict(
        continuous_action_space=False,
        tokens_per_block=2,
        max_blocks=positions,
        max_tokens=2 * positions,
        context_length=2 * p.context_steps,
        device=device,
        action_space_size=capacity,
        group_size=p.group_size,
        num_layers=p.num_layers,
        num_heads=p.num_heads,
        embed_dim=p.embed_dim,
        support_size=2 * p.support_scale + 1,
        env_num=max(settings.env.collector_env_num, settings.env.evaluator_env_num),
        obs_type="vector",
        max_cache_size=1,
        num_simulations=1,
        rotary_emb=False,
    )

    return dict(
        type="PriorZeroModel",
        import_names=["priorzero.world_model.model"],
        model_type="mlp",
        norm_type="LN",
        observation_shape=text_dim,
        action_space_size=capacity,
        frame_stack_num=1,
        image_channel=1,
        support_scale=p.support_scale,
        categorical_distribution=True,
        continuous_action_space=False,
        action_text_dim=text_dim if p.action_vocabulary.kind == "stable" else 0,
        world_model_cfg=world_model,
    )
