"""Presets: values that belong together, laid over the defaults under the same names.

Debug is one of them, not a second set of settings. `PRESETS` is what `--preset` offers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from priorzero.settings import tales
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


def choose(debug: bool, names: tuple[str, ...]) -> dict[str, Preset]:
    """Name -> preset in the order in which they are applied, debug first.

    Args:
        debug: debug is among them, be it named or not.

    Raises:
        PriorZeroError: a name does not exist.
    """
    for name in names:
        if name not in PRESETS:
            raise PriorZeroError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    ordered = ["debug"] if debug or "debug" in names else []
    return {name: PRESETS[name] for name in [*ordered, *names]}


def refuse_rft(chosen: Mapping[str, Preset]) -> None:
    """Raise PriorZeroError where one of them switches off what `--rft` switches on."""
    for name, preset in chosen.items():
        if preset.settings.get("llm", {}).get("rft", {}).get("enable") is False:
            raise PriorZeroError(
                f"--rft (enable_rft) switches on what preset {name!r} switches off; leave one of "
                "them out"
            )
