"""Settings of the LLM: model, engine, prompt and training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.orz import OrzSettings
from priorzero.settings.record import (
    Rule,
    Settings,
    a_file_of,
    in_unit_interval,
    not_negative,
    one_of,
    positive,
)


@dataclass(kw_only=True)
class VLLMSettings(Settings):
    """The vLLM engine."""

    dtype: str = "auto"
    """Number format: auto, bfloat16, float16, float32."""
    max_model_len: int | None = None
    """Longest prompt plus action, in tokens; None: the model's own, at most 8192."""
    tensor_parallel_size: int = 1
    """GPUs one copy of the model is split over."""
    gpu_memory_utilization: float = 0.35
    """Share of the GPU; the trainer and the world model need the rest."""
    kv_cache_gb: float = 1.0
    """CPU only: GiB for keys and values."""
    block_size: int | None = None
    """Tokens of one block of keys and values; None: 32 on the CPU (its smallest), vLLM's own choice
    on CUDA."""
    enforce_eager: bool | None = None
    """No CUDA graphs; None: eager on the CPU, graphs on CUDA."""
    sleep_mode: bool = False
    """CUDA: give the engine's memory to the trainer while the LLM trains."""
    lora: str = "auto"
    """How adapters reach the engine. merge: merged, with all weights; hot_load: by themselves;
    auto: merge where vLLM computes in float32, hot_load in 16 bits, where merging would lose a part
    of every update."""
    request_timeout_s: float = 120.0
    """Seconds one request may take before it is retried."""
    control_timeout_s: float = 300.0
    """Seconds a weight transfer, a sleep or a wake may take."""
    start_timeout_s: float = 600.0
    """Seconds the start may take."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "dtype", "auto", "bfloat16", "float16", "float32")
        yield from one_of(self, "lora", "auto", "merge", "hot_load")
        yield from positive(
            self,
            "tensor_parallel_size",
            "kv_cache_gb",
            "request_timeout_s",
            "control_timeout_s",
            "start_timeout_s",
        )
        for name in ("max_model_len", "block_size"):
            value = getattr(self, name)
            yield Rule(name, value is None or value > 0, "it must be positive or None")
        yield Rule(
            "gpu_memory_utilization", 0 < self.gpu_memory_utilization <= 1, "it must lie in (0, 1]"
        )


@dataclass(kw_only=True)
class PromptSettings(Settings):
    """What the LLM reads."""

    history_length: int = 5
    """Past steps shown at most; 0 shows none."""
    max_observation_chars: int = 400
    """Characters kept of each past observation (its beginning). The current observation has no such
    limit."""
    include_valid_actions: bool = True
    """List the valid actions in the prompt."""
    use_cot: bool = False
    """Ask for a chain of thought before the action; the prompt then ends with the reasoning
    marker."""
    max_prompt_tokens: int = 1024
    """Tokens of the whole prompt; what goes first when there are more is told in
    `priorzero.llm.prompts.build_prompt`."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "history_length")
        yield from positive(self, "max_observation_chars")
        yield Rule("max_prompt_tokens", self.max_prompt_tokens >= 32, "it must be at least 32")


@dataclass(kw_only=True)
class ReasoningSettings(Settings):
    """The chain of thought, where prompt.use_cot asks for one."""

    max_new_tokens: int = 96
    """Its tokens at most; it ends earlier at the action marker, which is added where the LLM writes
    none."""
    temperature: float = 1.0
    """Its sampling temperature; 0 is greedy, and lets the score cache keep such states."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "max_new_tokens")
        yield from not_negative(self, "temperature")


@dataclass(kw_only=True)
class LLMTrainSettings(Settings):
    """The optimiser both kinds of LLM training share."""

    learning_rate: float = 1e-5
    """AdamW's learning rate."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    schedule: str = "constant"
    """Learning rate behind the warm-up. constant: as it is; cosine: falls along half a cosine."""
    warmup_steps: int = 0
    """Optimiser steps over which the learning rate grows linearly to its full value."""
    decay_steps: int = 0
    """cosine: optimiser steps, those of the warm-up included, after which the rate is at its
    lowest."""
    min_learning_rate_share: float = 0.0
    """cosine: the lowest rate, as a share of learning_rate."""
    max_grad_norm: float = 1.0
    """Largest norm of a gradient."""
    batch_size: int = 16
    """Decisions per optimiser step; 0: all of a training phase in one step."""
    max_batch_tokens: int = 2048
    """Padded tokens per forward pass; gradients accumulate over the passes of a step."""
    gradient_checkpointing: bool = False
    """Compute the layers a second time in the backward pass instead of keeping what they gave: less
    memory, about a third more time."""
    max_bad_steps: int = 3
    """A step whose loss or gradient is not finite is skipped, and so many in a row end the run."""
    objective: str = "actions"
    """SFT loss. actions: cross-entropy over the valid actions; tokens: over the tokens of their
    texts."""
    clip_epsilon: float = 0.2
    """RFT: PPO's clip range."""
    kl_coef: float = 0.05
    """RFT: weight of the KL divergence to the policy that collected the data."""
    entropy_coef: float = 0.0
    """RFT: weight of the entropy bonus."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(
            self, "learning_rate", "max_grad_norm", "max_batch_tokens", "max_bad_steps"
        )
        yield from not_negative(
            self, "weight_decay", "warmup_steps", "batch_size", "kl_coef", "entropy_coef"
        )
        yield from one_of(self, "schedule", "constant", "cosine")
        yield from in_unit_interval(self, "min_learning_rate_share")
        falls = self.schedule == "cosine"
        yield Rule(
            "decay_steps",
            self.decay_steps > self.warmup_steps if falls else self.decay_steps == 0,
            f"it must be more than warmup_steps ({self.warmup_steps}) with schedule cosine"
            if falls
            else "only schedule cosine decays; with constant it must be 0",
        )
        yield from one_of(self, "objective", "actions", "tokens")
        yield Rule("clip_epsilon", 0 < self.clip_epsilon < 1, "it must lie between 0 and 1")


@dataclass(kw_only=True)
class SFTSettings(Settings):
    """Supervised learning of the policy the search arrived at."""

    enable: bool = True
    """Whether the LLM learns from the search."""
    samples: int = 64
    """Decisions per training phase."""
    recent_transitions: int = 2000
    """The newest transitions they are drawn from."""
    target_prior: str = "mixture"
    """The prior in the targets, as policy.target_prior. mixture: what the search started from; llm:
    the LLM's own as it answered then, so that it learns what the search found and not the world
    model's opinion; world_model: the world model's policy."""
    temperature: float = 1.0
    """What is trained towards the target is softmax(l / temperature). With the number of
    policy.root_prior.temperature the root reads what was trained; with a lower one it reads a
    flattened copy of it."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "samples", "recent_transitions", "temperature")
        yield from one_of(self, "target_prior", "mixture", "world_model", "llm")
        yield Rule(
            "temperature",
            self.temperature == 1 or self.target_prior != "llm",
            "with target_prior llm it must be 1: that prior is the LLM's at temperature 1, which "
            "training at another one would sharpen or flatten where the search found nothing",
        )


GROUP_ADVANTAGES = ("group", "group_mean", "leave_one_out")


@dataclass(kw_only=True)
class RFTSettings(Settings):
    """Reinforcement; advantage = n-step return - the world model's predicted value, or
    where the LLM plays alone return - baseline of a group of episodes.

    The equations stand in docs/ALGORITHM.md.
    """

    enable: bool = False
    """Whether the LLM learns from advantages of the world model, or of groups."""
    samples: int = 64
    """Decisions per training phase."""
    recent_transitions: int = 500
    """The newest transitions they are drawn from."""
    objective: str = "action"
    """What a ratio is taken of: a file of priorzero/llm/update/objectives. action: the policy over
    the valid actions; token: each token of the played action; sequence: their mean (GSPO)."""
    surrogate: str = "clipped"
    """What is maximised. clipped: PPO's clipped ratio times the advantage; reinforce: the
    log-probability times the advantage, without ratio and clip."""
    cot_weight: float = 0.0
    """How much the tokens of a chain of thought count beside the action's; 0: the thought is not
    trained."""
    format_reward: float = 0.0
    """Reward of a thought that the LLM ended itself, with the action marker, over one that was cut
    off; it counts for the thought's tokens alone, in units of the scaled advantage. 0: none."""
    advantage: str = "batch"
    """Scale of advantages. raw: none; batch: mean and deviation of the phase; running: of the last
    thousand decisions; robust: median and quartiles of the phase. Or, for wm_training_mode
    llm_only, what an episode's return is compared with. group: mean and deviation of the episodes
    that the same weights played (GRPO); group_mean: their mean; leave_one_out: the others' mean."""
    group_return: str = "episode"
    """What a decision of a group is rated by. episode: the return of its whole episode; to_go: what
    was earned from it on, compared at the same step of the other episodes."""
    clip_epsilon_high: float | None = None
    """Clip range upwards, where it is another than train.clip_epsilon; None: the same."""
    dual_clip: float = 0.0
    """A bad action's loss is at most this times its advantage, however likely it has become; 0: not
    bounded."""
    epochs: int = 1
    """Passes over the decisions of a phase."""
    max_kl: float = 0.0
    """Nats (approx_kl of an optimiser step) from the policy before the phase at which the phase
    ends; 0: never."""
    max_importance: float = 2.0
    """Truncates the weight pi_LLM / mu of an action the search drew from mu; 0 switches the
    correction off."""
    mismatch: str = "off"
    """Correction of ratios k between trainer's and engine's numbers. truncate: weight k, at most
    mismatch_high; mask: weight k, 0 outside of mismatch_low to mismatch_high."""
    mismatch_low: float = 0.5
    """Smallest k that `mask` lets pass."""
    mismatch_high: float = 2.0
    """Largest k."""
    max_staleness: int | None = None
    """Training phases a decision may be old; older ones are left out and counted (older groups are
    not drawn from). None: any."""
    kl_estimator: str = "exact"
    """KL from the reference, times train.kl_coef. exact: over the valid actions; k1, k2, k3: from
    the played action's (and thought's) own probabilities, k1 within the advantage."""
    kl_reference: str = "collected"
    """collected: the policy that collected; initial: the LLM before any training, which is the
    adapters switched off, or with all weights training a second copy of them in memory."""
    kl_target: float = 0.0
    """Nats to which train.kl_coef is adapted, doubled or halved after a phase; 0: it stays."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "samples", "recent_transitions", "epochs")
        yield from not_negative(
            self,
            "cot_weight",
            "format_reward",
            "max_kl",
            "max_importance",
            "mismatch_low",
            "kl_target",
        )

        yield from one_of(self, "surrogate", "clipped", "reinforce")
        yield from a_file_of(self, "objective", "priorzero.llm.update.objectives")
        scales = ("raw", "batch", "running", "robust")
        yield from one_of(self, "advantage", *scales, *GROUP_ADVANTAGES)
        yield from one_of(self, "group_return", "episode", "to_go")
        yield Rule(
            "group_return",
            self.group_return == "episode" or self.relative,
            f"only advantage {', '.join(GROUP_ADVANTAGES)} reads it",
        )
        yield from one_of(self, "mismatch", "off", "truncate", "mask")
        yield from one_of(self, "kl_estimator", "exact", "k1", "k2", "k3")
        yield from one_of(self, "kl_reference", "collected", "initial")
        high, staleness = self.clip_epsilon_high, self.max_staleness
        yield Rule("clip_epsilon_high", high is None or high > 0, "it must be positive or None")
        yield Rule(
            "dual_clip", self.dual_clip == 0 or self.dual_clip > 1, "it must be 0 or above 1"
        )
        for name, unset in (("clip_epsilon_high", high is None), ("dual_clip", not self.dual_clip)):
            yield Rule(
                name,
                unset or self.surrogate == "clipped",
                "surrogate reinforce has no ratio that could be clipped",
            )
        yield Rule("mismatch_low", self.mismatch_low <= 1, "it must be at most 1")
        yield Rule("mismatch_high", self.mismatch_high >= 1, "it must be at least 1")
        yield Rule("max_staleness", staleness is None or staleness >= 0, "it must not be negative")

    @property
    def relative(self) -> bool:
        """Whether advantages compare the episodes of a group, which the LLM played alone."""
        return self.advantage in GROUP_ADVANTAGES


@dataclass(kw_only=True)
class LoraSettings(Settings):
    """Low-rank adapters (arXiv:2106.09685) instead of all weights."""

    enable: bool = False
    """Train adapters only."""
    rank: int = 16
    """Rank of an adapter's two matrices."""
    alpha: float = 32.0
    """Scale: an adapter's product counts alpha / rank."""
    target_modules: str = "all-linear"
    """all-linear, or names of linear layers joined by commas."""
    last_layers: int = 0
    """Only the last so many layers learn, which spares most of the backward pass; 0: all."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "rank", "alpha")
        yield from not_negative(self, "last_layers")
        yield Rule("target_modules", bool(self.target_modules), "it must name at least one layer")


@dataclass(kw_only=True)
class LLMSettings(Settings):
    """Which LLM, which engine answers for it, and how it learns."""

    enable: bool = True
    """False: no LLM at all, pure UniZero."""
    model: str = "auto"
    """auto: Qwen/Qwen2.5-0.5B-Instruct where it is cached or reachable, else the embedded
    SmolLM2-135M-Instruct; embedded: that one; embedded-warm: that one after a warm-up on games that
    TextWorld generates; or a hub name, or a folder."""
    engine: str = "auto"
    """auto, vllm, transformers. auto: vllm where chains of thought are generated on a GPU, else
    transformers, which scores faster."""
    required: bool = False
    """True: an engine that cannot start or answer stops the run; False: it is replaced, said and
    counted."""
    device: str = "auto"
    """Where the LLM lives: auto (as policy.device), cpu, cuda."""
    dtype: str = "auto"
    """Number format of scoring: auto, float32, bfloat16."""
    share_weights: bool = False
    """The transformers engine scores with the trainer's own weights, without a second copy in
    memory. Otherwise it keeps a copy with its layers in `dtype`: faster in bfloat16."""
    residual_dtype: str = "auto"
    """Norms and residual stream of that copy, where `dtype` is bfloat16: float32; bfloat16, as vLLM
    computes (faster, with about twice the rounding); auto: float32 on a CPU, bfloat16 on CUDA."""
    max_batch_tokens: int = 0
    """Tokens the transformers engine computes together in one forward: bounds memory. 0: 4,096 on a
    CPU, 32,768 on CUDA."""
    attempts: int = 3
    """Tries of one call before its engine counts as dead."""
    max_restarts: int = 2
    """Restarts before transformers takes over."""
    vllm: VLLMSettings = field(default_factory=VLLMSettings)
    """The vLLM engine."""
    score_cache_size: int = 20_000
    """Scored states remembered for the present weights; 0: none."""
    trunk_cache_mib: int = 1024
    """On a CPU, with adapters on the last layers only: MiB for what the layers below them gave,
    which no update changes. A state met again, or trained on, is computed from there. 0: none."""
    prompt: PromptSettings = field(default_factory=PromptSettings)
    """What the LLM reads."""
    reasoning: ReasoningSettings = field(default_factory=ReasoningSettings)
    """The chain of thought, with prompt.use_cot."""
    trainer: str = "builtin"
    """Who trains the LLM: a file of priorzero/llm/update/trainers."""
    train: LLMTrainSettings = field(default_factory=LLMTrainSettings)
    """The optimiser both kinds of training share."""
    sft: SFTSettings = field(default_factory=SFTSettings)
    """Supervised learning from the search."""
    rft: RFTSettings = field(default_factory=RFTSettings)
    """Reinforcement with the world model's values."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Low-rank adapters."""
    orz: OrzSettings = field(default_factory=OrzSettings)
    """Open-Reasoner-Zero's workers, with trainer orz."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "engine", "auto", "vllm", "transformers")
        yield from one_of(self, "device", "auto", "cpu", "cuda")
        yield from one_of(self, "dtype", "auto", "float32", "bfloat16")
        yield from one_of(self, "residual_dtype", "auto", "float32", "bfloat16")
        yield from a_file_of(self, "trainer", "priorzero.llm.update.trainers")

        # What is rewarded must be there, and be trained.
        yield Rule(
            "rft.cot_weight",
            not self.rft.cot_weight or self.prompt.use_cot,
            "there is no chain of thought to train without prompt.use_cot",
        )
        yield Rule(
            "sft.enable",
            not (self.sft.enable and self.rft.enable and self.rft.relative),
            f"rft.advantage is {self.rft.advantage}: the LLM plays alone, and SFT learns from a "
            "search. The preset llm_only has settings that fit",
        )
        yield Rule(
            "sft.temperature",
            self.sft.temperature == 1 or self.train.objective == "actions",
            "train.objective is tokens, whose loss has no softmax over the valid actions: it must "
            "be 1, or train.objective actions",
        )
        yield Rule(
            "rft.format_reward",
            not self.rft.format_reward or self.prompt.use_cot,
            "there is no chain of thought to reward without prompt.use_cot",
        )
        yield Rule(
            "rft.format_reward",
            not self.rft.format_reward or self.rft.cot_weight > 0,
            "it goes to the thought's tokens, which are not trained where rft.cot_weight is 0",
        )
        yield Rule(
            "reasoning.temperature",
            self.reasoning.temperature == 1 or not self.rft.cot_weight,
            "rft.cot_weight trains the policy at temperature 1, so that thoughts must be drawn "
            "from it: set 1, or rft.cot_weight to 0",
        )
        yield Rule(
            "rft.kl_target",
            not self.rft.kl_target or self.train.kl_coef > 0,
            "train.kl_coef is 0, and no doubling makes it anything else",
        )
        yield from positive(self, "attempts")
        yield from not_negative(
            self, "max_batch_tokens", "max_restarts", "score_cache_size", "trunk_cache_mib"
        )
        if self.trainer == "orz":
            yield from self.orz_rules()

    def orz_rules(self) -> Iterator[Rule]:
        """What ORZ's trainer does, and nothing else: PPO with one clip range on tokens, all weights
        learning from advantages.
        """
        rft, train = self.rft, self.train
        yield Rule("enable", self.enable, "ORZ's trainer needs an LLM")
        yield Rule("rft.enable", rft.enable, "ORZ's trainer does reinforcement: set it")
        yield Rule("sft.enable", not self.sft.enable, "ORZ's trainer does reinforcement alone")
        yield Rule("lora.enable", not self.lora.enable, "ORZ's trainer trains all weights")
        for name, value, wanted, why in (
            ("rft.objective", rft.objective, "token", "ORZ rates tokens"),
            ("rft.surrogate", rft.surrogate, "clipped", "ORZ's loss is PPO's"),
            ("rft.clip_epsilon_high", rft.clip_epsilon_high, None, "ORZ has one clip range"),
            ("rft.dual_clip", rft.dual_clip, 0, "ORZ has no dual clip"),
            ("rft.max_kl", rft.max_kl, 0, "ORZ does not stop within a phase"),
            ("rft.kl_target", rft.kl_target, 0, "ORZ's weight of the KL is fixed"),
            ("train.entropy_coef", train.entropy_coef, 0, "ORZ's loss has no entropy"),
            ("train.schedule", train.schedule, "constant", "ORZ's rate is constant"),
        ):
            yield Rule(name, value == wanted, f"with trainer orz it must be {wanted}: {why}")
        yield Rule(
            "rft.kl_estimator",
            rft.kl_estimator == "k3" or not train.kl_coef,
            "with trainer orz it must be k3, the one ORZ has, or train.kl_coef 0",
        )
