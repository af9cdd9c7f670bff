"""ORZ's own configuration, from our settings."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

_BETAS = (0.9, 0.95)  # AdamW's, as the built-in trainer's and ORZ's own default


def orz_arguments(
    settings: LLMSettings, *, cuda: bool, model: Path, folder: Path
) -> SimpleNamespace:
    """What ORZ's trainer, strategy and policy worker read.

    ORZ takes any object with these attributes; its own record of defaults drags Hydra in.

    Args:
        settings: the `llm` group.
        cuda: whether the workers have GPUs.
        model: Hugging Face folder the workers load.
        folder: for what ORZ writes itself.
    """
    train, rft, orz = settings.train, settings.rft, settings.orz
    bfloat16 = cuda if orz.dtype == "auto" else orz.dtype == "bfloat16"
    return SimpleNamespace(
        # Where.
        actor_num_nodes=orz.actor_nodes,
        actor_num_gpus_per_node=orz.actor_gpus_per_node,
        colocate_all=False,
        pretrain=str(model),
        local_rank=-1,
        ckpt_path=str(folder),
        save_path=str(folder),
        tensorboard_log_dir=str(folder),
        load_checkpoint=False,
        # How it computes.
        seed=42,  # ORZ's own; nothing is drawn
        zero_stage=orz.zero_stage,
        bf16=bfloat16,
        zpg=1,
        adam_offload=orz.adam_offload,
        flash_attn=orz.flash_attn,
        grad_accum_dtype=None,
        disable_trace_cache=False,
        gradient_checkpointing=train.gradient_checkpointing,
        gradient_checkpointing_use_reentrant=False,
        target_modules="all-linear",
        train_batch_size=orz.workers,
        micro_train_batch_size=1,
        # How it learns.
        actor_learning_rate=train.learning_rate,
        adam_betas=_BETAS,
        l2=train.weight_decay,
        max_norm=train.max_grad_norm,
        num_warmup_steps=train.warmup_steps,
        max_epochs=rft.epochs,
        policy_update_steps=1,  # the worker sets it for every phase
        freezing_actor_steps=-1,
        eps_clip=train.clip_epsilon,
        use_kl_loss=train.kl_coef > 0,
        use_kl_estimator_k3=True,
        kl_loss_coef=train.kl_coef,
    )
