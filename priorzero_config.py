"""All settings of PriorZero, documented in place, and the presets laid over them.

Three levels, from what is changed most to what is changed least:

* `HybridTrainingConfig`: the schedule of a run. Subclass it and overwrite attributes, or pass them
  to the constructor.
* `get_priorzero_config`: the main settings (`priorzero_cfg`, groups env, policy, text, llm, eval)
  and the class names DI-engine needs (`priorzero_create_cfg`).
* presets (`DEBUG`, `PURE_UNIZERO`, `SFT_ONLY`, `LORA`): overlays with the same names; debug is one
  of them, not a second set of settings.

Unknown names, wrong types and impossible combinations are rejected on construction. This module
imports nothing heavy.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any

from easydict import EasyDict

from priorzero.settings.record_old import overlay, require
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

ENV = dict(
    # (str) A story file's name (zork1.z5, detective.z5, …), a path, tw-simple, tw-cooking, tw-coin
    # (options and seed after a colon: tw-coin:level=5,seed=3), or auto: zork1.z5 if it is found,
    # else a TextWorld game.
    env_id="auto",
    # (int | None) Steps after which an episode is truncated; None: as the game's catalogue entry
    # says.
    max_steps=None,
    # (list) What an observation text is made of: feedback, look, inventory (the last two cost no
    # game turn).
    observation_parts=["feedback", "look", "inventory"],
    # (float) Seconds one step of the interpreter may take before its process is killed and the
    # episode truncated; the second one is for listing the valid actions of a state never seen
    # before.
    step_timeout_s=20.0,
    describe_timeout_s=120.0,
    # (int) Environments stepped together by the collector, and by the evaluator.
    collector_env_num=8,
    evaluator_env_num=3,
    # (int) Evaluation episodes per mode.
    n_evaluator_episode=3,
    # (str | None) Folder of story files looked into before $PRIORZERO_GAMES and ./games.
    games_dir=None,
)

POLICY = dict(
    # (str) cpu or cuda; "auto" takes cuda where torch sees one.
    device="auto",
    # ---- network (UniZero) ----
    # (int) Width, layers and heads of the world model's transformer.
    embed_dim=512,
    num_layers=2,
    num_heads=8,
    # (int) SimNorm group size of latent states.
    group_size=8,
    # (int) Categorical support of transformed rewards and values: -support_scale..support_scale.
    support_scale=50,
    # (int) Real observations a root looks back on, itself included.
    context_steps=4,
    # (dict) kind: stable (an id per command) or positional (id = position among the valid actions,
    # LightZero's usual); capacity: V, most ids; overflow: ids among them reserved for commands seen
    # once the rest is used up.
    action_vocabulary=dict(kind="stable", capacity=512, overflow=16),
    # ---- search ----
    # (int) Expansions per decision.
    num_simulations=50,
    # (str) puct: our tree, reproducible, priors count from the first visit; lightzero: its C++
    # tree.
    search_tree="puct",
    # (int) CPU threads of a search: 1 is fastest up to a width of about 512; 0 leaves torch's own
    # number.
    search_threads=1,
    # (float) Dirichlet noise at the root, in collect only.
    root_dirichlet_alpha=0.3,
    root_noise_weight=0.25,
    # (dict) How the LLM enters at the root; see priorzero/search/root_prior.py for the equations.
    root_prior=dict(
        mode="llm_plus_wm_logits",
        weighting="fixed",
        mixing="logits",
        weight=0.5,
        weight_max=0.8,
        weight_min=0.1,
        anneal_env_steps=20_000,
        temperature=1.0,
        reduction="sum",
    ),
    # (float) Temperature of visit counts when an action is drawn in collect. Lower ones repeat what
    # earns a little: on detective 0.5 stayed near 60 points a training episode where 1.0 reached
    # 150 (one seed each, November 2026).
    fixed_temperature_value=1.0,
    # ---- data ----
    # (int) Steps of a segment, and segments collected per iteration.
    game_segment_length=20,
    num_segments=8,
    # (int) Transitions kept for replay.
    replay_buffer_size=100_000,
    # (bool, float, float) Prioritised replay and its two exponents.
    use_priority=False,
    priority_prob_alpha=0.6,
    priority_prob_beta=0.4,
    # ---- learning ----
    # (int) Steps the model is unrolled, and steps of the value target before it bootstraps.
    num_unroll_steps=10,
    td_steps=5,
    # (str) target_network: the target network's value now; search: the root value found when the
    # step was played.
    value_bootstrap="target_network",
    discount_factor=0.99,
    batch_size=64,
    # (float) Updates per collected transition.
    replay_ratio=0.25,
    # (int) Environment steps before the first update.
    train_start_after_envsteps=0,
    learning_rate=1e-4,
    weight_decay=1e-4,
    grad_clip_value=5.0,
    # (float) Share of the online network that enters the target network at each update.
    target_update_theta=0.05,
    # (dict) Weights of the loss terms.
    loss_weights=dict(latent=10.0, reward=1.0, policy=1.0, value=0.5, entropy=1e-4),
)

TEXT = dict(
    # (str) Frozen sentence encoder: auto (embedded all-MiniLM-L6-v2), a hub name such as
    # BAAI/bge-base-en-v1.5, a folder.
    encoder="auto",
    # (int) MiB of embeddings kept in memory.
    cache_mib=256,
)

LLM = dict(
    # (bool) False: no LLM at all, pure UniZero.
    enable=True,
    # (str) auto: Qwen/Qwen2.5-0.5B-Instruct where it is cached or reachable, else the embedded
    # SmolLM2-135M-Instruct; or a hub name, or a folder.
    model="auto",
    # (str) auto, vllm, transformers. auto starts both, times them on the same states and keeps the
    # faster one.
    engine="auto",
    # (bool) True: an engine that cannot start or answer stops the run; False: it is replaced, said
    # and counted.
    required=False,
    # (str) Where the LLM lives: auto (as policy.device), cpu, cuda.
    device="auto",
    # (str) Number format of scoring: auto, float32, bfloat16.
    dtype="auto",
    # (bool) The transformers engine scores with the trainer's own weights, without a second copy in
    # memory. Otherwise it keeps a copy with its layers in `dtype`: the same numbers, on two cores
    # 1.0 to 1.4 times as fast in bfloat16.
    share_weights=False,
    # (str) Norms and residual stream of that copy, where `dtype` is bfloat16: float32; bfloat16, as
    # vLLM computes (on an H100 54 states/s with no prompts kept, against 38 with float32 and
    # prompts kept; twice the rounding: 0.27 instead of 0.13 in a command's log-probability,
    # SmolLM2, 600 tokens); auto: float32 on a CPU, bfloat16 on CUDA.
    residual_dtype="auto",
    # (int) Tokens the transformers engine computes together in one forward: bounds memory. 0: 4,096
    # on a CPU, 32,768 on CUDA.
    max_batch_tokens=0,
    # (int, int) Tries of one call before its engine counts as dead, and restarts before
    # transformers takes over.
    attempts=3,
    max_restarts=2,
    # (dict) The vLLM engine: fields of `priorzero.settings.engine_old.VLLMSettings`, where each is
    # explained. sleep_mode gives the GPU's memory to the trainer while the LLM trains. lora: merge,
    # hot_load (adapters alone), auto.
    vllm=dict(
        dtype="auto",
        max_model_len=None,
        gpu_memory_utilization=0.35,
        kv_cache_gb=1.0,
        block_size=None,
        enforce_eager=None,
        sleep_mode=False,
        lora="auto",
        request_timeout_s=120.0,
        control_timeout_s=300.0,
        start_timeout_s=600.0,
    ),
    # (int) Scored states remembered for the present weights.
    score_cache_size=20_000,
    # (int) MiB the transformers engine may take for keys and values of earlier prompts: while a
    # history only grows, a prompt is computed from where it differs (on CUDA prompts of 1,024
    # tokens and more, half of them shared). Emptied when the weights change. 0: only the fixed head
    # is kept.
    prefix_cache_mib=1024,
    # (int) On a CPU, with adapters on the last layers only: MiB for what the layers below them
    # gave, which no update changes. A state met again, or trained on, is computed from there. 0:
    # none.
    trunk_cache_mib=1024,
    # (dict) Fields of `priorzero_prompts.PromptSettings`.
    prompt=dict(
        history_length=5,
        history_drop=1,
        max_observation_chars=400,
        include_valid_actions=True,
        use_cot=False,
        max_prompt_tokens=1024,
    ),
    # (dict) With prompt.use_cot: tokens of a chain of thought at most (it ends earlier at the
    # action marker, which is added where the LLM writes none), and their sampling temperature; 0 is
    # greedy, and lets the score cache keep such states.
    reasoning=dict(max_new_tokens=96, temperature=1.0),
    # (dict) The optimiser both kinds of LLM training share: fields of
    # `priorzero.llm.update.trainers.builtin.LLMTrainerSettings`.
    train=dict(
        learning_rate=1e-5,
        weight_decay=0.0,
        warmup_steps=0,
        max_grad_norm=1.0,
        # (int) Decisions per optimiser step, and padded tokens per forward pass (gradients
        # accumulate over passes).
        batch_size=16,
        max_batch_tokens=2048,
        # (str) SFT loss. actions: cross-entropy over the valid actions; tokens: over the tokens of
        # their texts.
        objective="actions",
        # (float) RFT: PPO's clip range, KL to the policy that collected the data, entropy bonus.
        clip_epsilon=0.2,
        kl_coef=0.05,
        entropy_coef=0.0,
    ),
    # (dict) Supervised learning on the search's visit counts: decisions per training phase, and the
    # newest transitions they are drawn from.
    sft=dict(enable=True, samples=64, recent_transitions=2000),
    # (dict) PPO-style reinforcement, advantage = n-step return - predicted value of the world
    # model. max_importance truncates the weight pi_LLM / mu of an action the search drew from mu; 0
    # switches the correction off.
    rft=dict(enable=False, samples=64, recent_transitions=500, max_importance=2.0),
    # (dict) Train low-rank adapters instead of all weights. target_modules: all-linear, or names of
    # linear layers joined by commas. last_layers: only the last so many layers learn, which spares
    # most of the backward pass; 0: all.
    lora=dict(enable=False, rank=16, alpha=32, target_modules="all-linear", last_layers=0),
)

EVAL = dict(
    # (list) world_model: search without the LLM; world_model_llm: search with its prior; llm: its
    # favourite action, no search; random: a uniformly drawn valid action.
    modes=["world_model", "world_model_llm", "llm"],
    # (float) 0: the most visited action. Above: drawn from visit counts ** (1 / temperature), which
    # leaves the loops a greedy player never leaves in a deterministic game, and gives episodes a
    # spread.
    temperature=0.0,
    # (bool) Write every evaluation episode as readable text.
    transcripts=True,
)

DEFAULTS = dict(exp_name="", seed=0, env=ENV, policy=POLICY, text=TEXT, llm=LLM, eval=EVAL)

# Minutes on two CPU cores instead of hours on a GPU; every part is on, every size is small.
DEBUG = dict(
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
        # mean: the small model's sums favour the shortest commands ("look") by far. Softening them
        # with a temperature of 3 instead gave 3.8 points a training episode against 5.7 after 2,400
        # steps of tw-simple (one seed each).
        root_prior=dict(anneal_env_steps=4000, reduction="mean"),
    ),
    # transformers: a debug run has no minute to spare for vLLM's start, nor the memory for a second
    # engine.
    llm=dict(
        engine="transformers",
        # The prompt is the present observation alone: a state met again is in the score cache.
        prompt=dict(history_length=0, include_valid_actions=False, max_prompt_tokens=448),
        # Adapters: with all weights and a few decisions per step the SFT loss rose. On the last six
        # of the small model's thirty layers, because the time of a state met again, or trained on,
        # goes with the layers that change. At half the rate and two thirds of the samples the LLM
        # did not keep up with the search.
        lora=dict(enable=True, last_layers=6),
        train=dict(learning_rate=2e-3, batch_size=4),
        sft=dict(samples=24, recent_transitions=400),
        rft=dict(samples=24, recent_transitions=200),
    ),
)
PURE_UNIZERO = dict(
    llm=dict(enable=False),
    policy=dict(root_prior=dict(mode="wm_logits")),
    eval=dict(modes=["world_model"]),
)
SFT_ONLY = dict(llm=dict(sft=dict(enable=True), rft=dict(enable=False)))
LORA = dict(llm=dict(lora=dict(enable=True), train=dict(learning_rate=2e-4)))
PRESETS = dict(debug=DEBUG, pure_unizero=PURE_UNIZERO, sft_only=SFT_ONLY, lora=LORA)

CREATE = dict(
    env=dict(type="priorzero_text_game", import_names=["priorzero.games.env"]),
    env_manager=dict(type="base"),
    policy=dict(type="priorzero", import_names=["priorzero_policy"]),
    collector=dict(type="priorzero", import_names=["priorzero_collector"]),
    replay_buffer=dict(type="game_buffer_priorzero", import_names=["game_buffer_priorzero"]),
)


def get_priorzero_config(
    env_id: str = "auto",
    seed: int = 0,
    exp_name: str | None = None,
    enable_llm: bool = True,
    enable_rft: bool = False,
    debug_mode: bool = False,
    presets: tuple[str, ...] = (),
    overrides: Mapping[str, Any] | None = None,
) -> tuple[EasyDict, EasyDict]:
    """Main and create settings in LightZero's form.

    Args:
        exp_name: folder under data_priorzero/; None names it after game, method and seed.
        presets: names of `PRESETS`, applied after debug and before `overrides`.
        overrides: nested dictionary of single settings, applied last.
    Raises:
        PriorZeroError: an unknown name, a wrong type or an impossible combination.
    """
    for name in presets:
        if name not in PRESETS:
            raise PriorZeroError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    layers = [DEBUG] if debug_mode else []
    layers += [PRESETS[name] for name in presets]
    chosen: dict[str, Any] = dict(seed=seed, env=dict(env_id=env_id))
    if not enable_llm:
        layers.append(PURE_UNIZERO)
    if enable_rft:
        chosen["llm"] = dict(rft=dict(enable=True))
    cfg = EasyDict(overlay(DEFAULTS, *layers, chosen, overrides or {}))
    method = "priorzero" if cfg.llm.enable else "unizero"
    name = (
        exp_name
        or cfg.exp_name
        or f"{_file_name(cfg.env.env_id)}_{method}{'_debug' if debug_mode else ''}_seed{cfg.seed}"
    )
    cfg.exp_name = (
        name
        if name.startswith("data_priorzero") or name.startswith("/")
        else f"data_priorzero/{name}"
    )
    validate_config(cfg)
    return cfg, EasyDict(CREATE)


def _file_name(env_id: str) -> str:
    stem = env_id.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in stem.rsplit(".z", 1)[0])


def validate_config(cfg: EasyDict) -> None:
    """Reject impossible settings, all at once, before anything is started."""
    p, env, llm = cfg.policy, cfg.env, cfg.llm
    vocabulary, modes = p.action_vocabulary, ("world_model", "world_model_llm", "llm", "random")
    positive = {
        f"policy.{k}": p[k]
        for k in (
            "embed_dim",
            "num_layers",
            "num_heads",
            "group_size",
            "support_scale",
            "context_steps",
            "num_simulations",
            "game_segment_length",
            "num_segments",
            "num_unroll_steps",
            "td_steps",
            "batch_size",
            "learning_rate",
            "replay_ratio",
            "fixed_temperature_value",
            "grad_clip_value",
        )
    }
    positive |= {
        f"env.{k}": env[k]
        for k in (
            "collector_env_num",
            "evaluator_env_num",
            "n_evaluator_episode",
            "step_timeout_s",
            "describe_timeout_s",
        )
    }
    positive |= {
        "llm.sft.samples": llm.sft.samples,
        "llm.rft.samples": llm.rft.samples,
        "llm.sft.recent_transitions": llm.sft.recent_transitions,
        "llm.reasoning.max_new_tokens": llm.reasoning.max_new_tokens,
    }
    rules = {name: (value, value > 0, "it must be positive") for name, value in positive.items()}
    rules |= {
        "seed": (cfg.seed, 0 <= cfg.seed < 2**31, "it must lie in 0..2**31-1"),
        "policy.embed_dim": (
            p.embed_dim,
            p.embed_dim % p.num_heads == 0 and p.embed_dim % p.group_size == 0,
            f"num_heads {p.num_heads} and group_size {p.group_size} must divide it",
        ),
        "policy.context_steps": (
            p.context_steps,
            1 <= p.context_steps <= p.num_unroll_steps,
            f"it must lie in 1..num_unroll_steps ({p.num_unroll_steps}), the positions that are trained",
        ),
        "policy.action_vocabulary.overflow": (
            vocabulary.overflow,
            0 < vocabulary.overflow < vocabulary.capacity,
            f"it must lie in 1..capacity-1 ({vocabulary.capacity - 1})",
        ),
        "policy.discount_factor": (
            p.discount_factor,
            0 < p.discount_factor <= 1,
            "it must lie in (0, 1]",
        ),
        "policy.value_bootstrap": (
            p.value_bootstrap,
            p.value_bootstrap in ("target_network", "search"),
            "it must be target_network or search",
        ),
        "policy.search_tree": (
            p.search_tree,
            p.search_tree in ("puct", "lightzero"),
            "it must be puct or lightzero",
        ),
        "policy.device": (
            p.device,
            p.device in ("auto", "cpu", "cuda"),
            "it must be auto, cpu or cuda",
        ),
        "llm.device": (
            llm.device,
            llm.device in ("auto", "cpu", "cuda"),
            "it must be auto, cpu or cuda",
        ),
        "policy.replay_buffer_size": (
            p.replay_buffer_size,
            p.replay_buffer_size >= p.game_segment_length,
            f"it must hold one segment ({p.game_segment_length} transitions)",
        ),
        "env.max_steps": (
            env.max_steps,
            env.max_steps is None or type(env.max_steps) is int and env.max_steps > 0,
            "it must be positive or None, and an integer",
        ),
        "env.games_dir": (
            env.games_dir,
            env.games_dir is None or isinstance(env.games_dir, str),
            "it must be a folder or None",
        ),
        "llm.max_batch_tokens": (
            llm.max_batch_tokens,
            llm.max_batch_tokens >= 0,
            "it must not be negative",
        ),
        "llm.prefix_cache_mib": (
            llm.prefix_cache_mib,
            llm.prefix_cache_mib >= 0,
            "it must not be negative",
        ),
        "llm.trunk_cache_mib": (
            llm.trunk_cache_mib,
            llm.trunk_cache_mib >= 0,
            "it must not be negative",
        ),
        "llm.lora.last_layers": (
            llm.lora.last_layers,
            llm.lora.last_layers >= 0,
            "it must not be negative",
        ),
        "llm.engine": (
            llm.engine,
            llm.engine in ("auto", "vllm", "transformers"),
            "it must be auto, vllm or transformers",
        ),
        "llm.dtype": (
            llm.dtype,
            llm.dtype in ("auto", "float32", "bfloat16"),
            "it must be auto, float32 or bfloat16",
        ),
        "llm.residual_dtype": (
            llm.residual_dtype,
            llm.residual_dtype in ("auto", "float32", "bfloat16"),
            "it must be auto, float32 or bfloat16",
        ),
        "llm.reasoning.temperature": (
            llm.reasoning.temperature,
            llm.reasoning.temperature >= 0,
            "it must not be negative",
        ),
        "llm.train.objective": (
            llm.train.objective,
            llm.train.objective in ("actions", "tokens"),
            "it must be actions or tokens",
        ),
        "eval.temperature": (
            cfg.eval.temperature,
            cfg.eval.temperature >= 0,
            "it must not be negative",
        ),
        "eval.modes": (
            cfg.eval.modes,
            bool(cfg.eval.modes) and all(m in modes for m in cfg.eval.modes),
            f"they must be among {modes}",
        ),
        "llm.enable": (
            llm.enable,
            llm.enable or not any(m in cfg.eval.modes for m in ("world_model_llm", "llm")),
            f"eval.modes {cfg.eval.modes} ask for an LLM; leave those out or enable it",
        ),
        "policy.root_prior.mode": (
            p.root_prior.mode,
            llm.enable or p.root_prior.mode == "wm_logits",
            "without an LLM it must be wm_logits",
        ),
    }
    require(rules)
    from priorzero.search.root_prior import (
        RootPriorSettings,  # light (numpy); its own rules name the rest
    )
    from priorzero_prompts import PromptSettings

    RootPriorSettings(**p.root_prior)
    PromptSettings(**llm.prompt)


def orz_available() -> bool:
    """Whether Open-Reasoner-Zero can be found: `orz.ppo`, not PyPI's unrelated package `orz`."""
    try:
        return importlib.util.find_spec("orz.ppo") is not None
    except ModuleNotFoundError:
        return False


class HybridTrainingConfig:
    """The schedule of a run, with the settings it runs on.

        class Mine(HybridTrainingConfig):
            llm_train_freq = 10

        config = Mine(env_id="detective.z5", seed=1, debug_mode=True)
        config.priorzero_cfg.policy.num_simulations = 30      # attributes may be overwritten until
        the run starts

    Raises:
        PriorZeroError: an unknown attribute or an impossible value, on construction and again when
            the run starts.
    """

    wm_training_mode: str = "parallel"
    """parallel: within one iteration the world model trains every wm_train_freq and the LLM every
    llm_train_freq.
    """
    wm_train_freq: int = 1
    """Iterations between training phases of the world model."""
    llm_train_freq: int = 5
    """Iterations between training phases of the LLM."""
    use_orz_trainer: bool = orz_available()
    """Let ORZ's Ray PPO trainer do the LLM's reinforcement step (only with llm.rft.enable);
    default: whether it imports.
    """
    iterations: int = 2000
    """Iterations: collect, train, log."""
    eval_freq: int = 100
    """Iterations between evaluations; one more at the start and one at the end. 0: none."""
    save_freq: int = 100
    """Iterations between checkpoints; one more at the end. 0: at the end only."""
    sample_prompt_freq: int = 10
    """Iterations between sample prompts (with a table of prior against visit counts) in
    TensorBoard.
    """
    resume: bool = False
    """Continue the experiment's latest checkpoint."""
    checkpoint: str = "latest"
    """Which checkpoint `resume` and evaluation load: latest, best, or a folder's name."""
    debug_mode: bool = False
    """The DEBUG overlay, and a short schedule."""
    priorzero_cfg: EasyDict
    """Main settings, see `get_priorzero_config`."""
    priorzero_create_cfg: EasyDict
    """Class names for DI-engine's registries."""

    DEBUG_SCHEDULE = dict(iterations=100, eval_freq=50, save_freq=50)

    def __init__(
        self,
        env_id: str = "auto",
        seed: int = 0,
        exp_name: str | None = None,
        enable_llm: bool = True,
        enable_rft: bool = False,
        debug_mode: bool | None = None,
        presets: tuple[str, ...] = (),
        overrides: Mapping[str, Any] | None = None,
        **schedule: Any,
    ) -> None:
        self.debug_mode = type(self).debug_mode if debug_mode is None else debug_mode
        if self.debug_mode:
            for name, value in self.DEBUG_SCHEDULE.items():
                if getattr(type(self), name) == getattr(
                    HybridTrainingConfig, name
                ):  # a subclass's own value stands
                    setattr(self, name, value)
        known = [n for n in HybridTrainingConfig.__annotations__ if not n.startswith("priorzero_")]
        for name, value in schedule.items():
            if name not in known:
                raise PriorZeroError(
                    f"schedule setting {name!r} does not exist; there are {', '.join(known)}"
                )
            setattr(self, name, value)
        self.priorzero_cfg, self.priorzero_create_cfg = get_priorzero_config(
            env_id, seed, exp_name, enable_llm, enable_rft, self.debug_mode, presets, overrides
        )
        self.validate()

    def validate(self) -> None:
        """Check the schedule and the settings; called on construction and by `train_priorzero_orz`."""
        rules = {
            name: (
                getattr(self, name),
                isinstance(getattr(self, name), int) and getattr(self, name) >= low,
                f"it must be an integer >= {low}",
            )
            for name, low in dict(
                wm_train_freq=1,
                llm_train_freq=1,
                iterations=1,
                eval_freq=0,
                save_freq=0,
                sample_prompt_freq=0,
            ).items()
        }
        rules["wm_training_mode"] = (
            self.wm_training_mode,
            self.wm_training_mode == "parallel",
            "only parallel exists so far",
        )
        rules["use_orz_trainer"] = (
            self.use_orz_trainer,
            not self.use_orz_trainer or orz_available(),
            "orz.ppo does not import: put a clone of Open-Reasoner-Zero on PYTHONPATH",
        )
        require(rules)
        validate_config(self.priorzero_cfg)

    def as_dict(self) -> dict[str, Any]:
        """Everything, as saved beside the run."""
        schedule = {
            n: getattr(self, n)
            for n in HybridTrainingConfig.__annotations__
            if not n.startswith("priorzero_")
        }
        return dict(schedule=schedule, settings=self.priorzero_cfg)


def get_priorzero_config_for_quick_test(
    env_id: str = "auto", seed: int = 0, **settings: Any
) -> tuple[EasyDict, EasyDict]:
    """`get_priorzero_config` with the debug overlay."""
    return get_priorzero_config(env_id=env_id, seed=seed, debug_mode=True, **settings)
