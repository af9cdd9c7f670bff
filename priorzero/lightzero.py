"""Our settings in the shape LightZero and DI-engine want: one function, called once per run.

`priorzero_config.py` names each setting once; LightZero wants several of them in several places
(the action space size in four). The result is what DI-engine's `compile_config` makes of it,
defaults of every class merged in.
"""

from __future__ import annotations

import torch
from easydict import EasyDict

from priorzero.quiet import quiet_base
from priorzero.settings.policy import (
    LossWeights,
    PolicySettings,
    RootPriorSettings,
    VocabularySettings,
)
from priorzero.types import PriorZeroError

with quiet_base():
    from ding.config import compile_config


def resolve_device(setting: str, name: str = "policy.device") -> str:
    """`auto` -> cuda where torch sees a GPU, else cpu.

    Raises:
        PriorZeroError: cuda was asked for and there is none.
    """
    if setting == "cuda" and not torch.cuda.is_available():
        raise PriorZeroError(
            f"{name} is cuda, but torch sees no GPU: install the CUDA lock "
            "(PRIORZERO_DEVICE=cuda ./run_priorzero_orz.sh check) or use --device cpu"
        )
    return ("cuda" if torch.cuda.is_available() else "cpu") if setting == "auto" else setting


def compile_priorzero(cfg: EasyDict, create_cfg: EasyDict, text_dim: int) -> EasyDict:
    """The compiled settings.

    Args:
        text_dim: `E`, dimension of the sentence encoder, of observations and action texts alike.
    """
    p, device = cfg.policy, resolve_device(cfg.policy.device)
    capacity = p.action_vocabulary.capacity
    tokens = 2 * p.num_unroll_steps
    world_model = dict(
        continuous_action_space=False,
        tokens_per_block=2,
        max_blocks=p.num_unroll_steps,
        max_tokens=tokens,
        context_length=2 * p.context_steps,
        device=device,
        action_space_size=capacity,
        group_size=p.group_size,
        num_layers=p.num_layers,
        num_heads=p.num_heads,
        embed_dim=p.embed_dim,
        support_size=2 * p.support_scale + 1,
        env_num=max(cfg.env.collector_env_num, cfg.env.evaluator_env_num),
        obs_type="vector",
        max_cache_size=1,
        num_simulations=1,
        rotary_emb=False,
    )
    model = dict(
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
    passed_on = {
        k: v
        for k, v in p.items()
        if k
        not in ("embed_dim", "num_layers", "num_heads", "group_size", "support_scale", "device")
    }
    policy = dict(
        passed_on,
        model=model,
        device=device,
        cuda=device == "cuda",
        seed=cfg.seed,
        env_type="not_board_games",
        action_type="varied_action_space",
        manual_temperature_decay=False,
        use_wandb=False,
        collector_env_num=cfg.env.collector_env_num,
        evaluator_env_num=cfg.env.evaluator_env_num,
        n_episode=cfg.env.collector_env_num,
        learn=dict(learner=dict(log_policy=False)),
    )
    main = EasyDict(
        exp_name=cfg.exp_name,
        seed=cfg.seed,
        env=dict(cfg.env, manager=dict(shared_memory=False)),
        policy=policy,
    )
    with quiet_base():
        compiled = compile_config(
            main, seed=cfg.seed, auto=True, create_cfg=EasyDict(create_cfg), save_cfg=False
        )
    compiled.policy.settings = _settings(p)
    return compiled


def _settings(p: EasyDict) -> PolicySettings:
    plain = {k: v for k, v in p.items() if k != "search_tree"}
    return PolicySettings(
        **plain
        | dict(
            root_policy=p.search_tree,
            root_prior=RootPriorSettings(**p.root_prior),
            action_vocabulary=VocabularySettings(**p.action_vocabulary),
            loss_weights=LossWeights(**p.loss_weights),
        )
    )
