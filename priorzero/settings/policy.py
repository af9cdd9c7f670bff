"""Settings of the world model, its search, its replay data and its training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

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
class VocabularySettings(Settings):
    """How commands become action ids."""

    kind: str = "stable"
    """stable: an id per command; positional: id = position among the valid actions, LightZero's
    usual."""
    capacity: int = 512
    """V, most ids."""
    overflow: int = 16
    """Ids among them reserved for commands seen once the rest is used up."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "kind", "stable", "positional")
        yield Rule(
            "overflow",
            0 < self.overflow < self.capacity,
            f"it must lie in 1..capacity-1 ({self.capacity - 1})",
        )


AUTO = "auto"


@dataclass(kw_only=True)
class CalibrationSettings(Settings):
    """With `policy.root_prior.temperature` auto: the temperature follows the LLM, as the search's
    targets judge it; priorzero/search/calibration.py has the equations.
    """

    start: float = 8.0
    """The temperature until enough decisions are played. What suits the sums of an LLM as it
    comes."""
    lowest: float = 0.25
    """Least temperature: however right the LLM is found, no sharper."""
    highest: float = 64.0
    """Greatest temperature, at which next to nothing is left of the LLM's opinion."""
    most: int = 256
    """It is fitted to so many of the newest decisions that the LLM's present weights answered."""
    least: int = 128
    """Where these are fewer, so many of the newest, whatever weights answered; with fewer of those
    the temperature stays."""
    rate: float = 0.3
    """How far one calibration goes towards the best temperature, as a share of the way in log T;
    1: all of it."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "lowest")
        yield Rule(
            "start",
            self.lowest <= self.start <= self.highest < float("inf"),
            f"lowest ({self.lowest}) <= start <= highest ({self.highest}), all finite, is needed",
        )
        yield Rule(
            "least",
            1 <= self.least <= self.most,
            f"it must lie in 1..most ({self.most})",
        )
        yield Rule("rate", 0.0 < self.rate <= 1.0, "it must lie in (0, 1]")


@dataclass(kw_only=True)
class RootPriorSettings(Settings):
    """How the LLM enters at the root; the equations stand in priorzero/search/root_prior.py."""

    mode: str = "llm_plus_wm_logits"
    """wm_logits: the world model alone; llm_logits: the LLM alone; llm_plus_wm_logits: both."""
    weighting: str = "fixed"
    """fixed: the LLM's weight is `weight`; adaptive: it falls with training, and counts more where
    the world model is unsure."""
    mixing: str = "logits"
    """logits: a product of experts; probabilities: a weighted mean."""
    weight: float = 0.5
    """The LLM's weight with fixed weighting."""
    weight_max: float = 0.8
    """The LLM's largest weight at the start, with adaptive weighting."""
    weight_min: float = 0.1
    """The LLM's weight after annealing, with adaptive weighting."""
    anneal_env_steps: int = 20_000
    """Environment steps over which weight_max falls to weight_min."""
    temperature: float | str = 1.0
    """Softens (above 1) or sharpens the LLM's log-probabilities before they are mixed; auto: fitted
    once an iteration to what the search made of them."""
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    """Of temperature auto."""
    reduction: str = "sum"
    """How the log-probabilities of an action's tokens become one number: sum or mean."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "mode", "llm_logits", "wm_logits", "llm_plus_wm_logits")
        yield from one_of(self, "weighting", "fixed", "adaptive")
        yield from one_of(self, "mixing", "logits", "probabilities")
        yield from one_of(self, "reduction", "sum", "mean")
        yield from in_unit_interval(self, "weight")
        yield Rule(
            "weight_min",
            0.0 <= self.weight_min <= self.weight_max <= 1.0,
            f"0 <= weight_min <= weight_max ({self.weight_max}) <= 1 is needed",
        )
        given = self.temperature
        yield Rule(
            "temperature",
            given > 0 if not isinstance(given, str) else given == AUTO,
            f"it must be a positive number, or {AUTO}",
        )
        yield from positive(self, "anneal_env_steps")

    @property
    def calibrated(self) -> bool:
        """Whether the temperature is fitted while the run goes on."""
        return self.temperature == AUTO


@dataclass(kw_only=True)
class LossWeights(Settings):
    """Weights of the world model's loss terms."""

    latent: float = 10.0
    """Prediction of the next latent state."""
    reward: float = 1.0
    """Reward, as a categorical distribution."""
    policy: float = 1.0
    """Cross-entropy to the search's policy."""
    value: float = 0.5
    """Value, as a categorical distribution."""
    entropy: float = 1e-4
    """Bonus for the policy's entropy."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "latent", "reward", "policy", "value", "entropy")


@dataclass(kw_only=True)
class GumbelSettings(Settings):
    """The root policy gumbel; the equations stand in priorzero/search/root_policies/gumbel.py."""

    max_considered_actions: int = 16
    """m, actions of the first round of sequential halving."""
    visit_constant: float = 50.0
    """c_visit: the weight of values before there are visits."""
    value_scale: float = 0.1
    """c_scale: nats per unit of scaled value and visit."""
    smallest_range: float = 0.01
    """Values that differ by less are not scaled up to 1: what an untrained network says of its
    actions is noise."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from positive(self, "max_considered_actions", "value_scale", "smallest_range")
        yield from not_negative(self, "visit_constant")


@dataclass(kw_only=True)
class AnnealingSettings(Settings):
    """Temperature and root noise of training decisions by schedule, in place of
    fixed_temperature_value and root_noise_weight; linear in environment steps, then constant.
    """

    duration: int = 0
    """Environment steps from start to end; 0: no schedule."""
    temperature_start: float = 2.0
    """Temperature of visit counts at the beginning; above 1 it flattens them."""
    temperature_end: float = 0.5
    """The same at the end and from then on."""
    noise_start: float = 0.5
    """Share of the Dirichlet noise in the root's prior at the beginning."""
    noise_end: float = 0.1
    """The same at the end and from then on."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(self, "duration")
        yield from positive(self, "temperature_start", "temperature_end")
        yield from in_unit_interval(self, "noise_start", "noise_end")


@dataclass(kw_only=True)
class RestartSettings(Settings):
    """Training episodes that begin at a state visited before (Go-Explore: Ecoffet et al. 2021,
    "First return, then explore", arXiv:2004.12919); priorzero/play/restarts.py has the equations.
    """

    share: float = 0.0
    """How many of the training episodes do, drawn one by one; 0: none."""
    capacity: int = 1000
    """Most states that are remembered."""
    score_factor: float = 0.5
    """Every score in memory that is higher than a state's multiplies its chance by this; 1: the
    score does not count."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from in_unit_interval(self, "share", "score_factor")
        yield from positive(self, "capacity", "score_factor")


NO_OPERATOR = (
    "visit counts are no function of a prior: take root_policy gumbel, or puct with policy_target "
    "regularised, or leave it mixture"
)


@dataclass(kw_only=True)
class PolicySettings(Settings):
    """World model (UniZero), search, replay data and learning."""

    device: str = "auto"
    """cpu or cuda; auto takes cuda where torch sees one."""

    # ---- network ----
    embed_dim: int = 512
    """Width of the world model's transformer."""
    num_layers: int = 2
    """Its layers."""
    num_heads: int = 8
    """Its attention heads."""
    group_size: int = 8
    """SimNorm group size of latent states."""
    support_scale: int = 50
    """Categorical support of transformed rewards and values: -support_scale..support_scale."""
    context_steps: int = 4
    """Real observations a root looks back on, itself included."""
    action_vocabulary: VocabularySettings = field(default_factory=VocabularySettings)
    """How commands become action ids."""

    # ---- search ----
    num_simulations: int = 50
    """Expansions per decision."""
    root_policy: str = "gumbel"
    """A file of priorzero/search/root_policies. gumbel: sequential halving over sampled actions,
    for few simulations; puct: our tree, priors count from the first visit; lightzero: its C++ tree.
    """
    gumbel: GumbelSettings = field(default_factory=GumbelSettings)
    """Of root_policy gumbel, which knows neither Dirichlet noise nor `policy_target`."""
    search_backend: str = "auto"
    """fused: the simulations compiled, on a GPU as one CUDA graph; plain: the reference, in numpy
    and single network calls; auto: fused where the root policy has such a form (puct, gumbel)."""
    search_precision: str = "float32"
    """Of a fused search's products on a GPU. float32: single precision, from three products of
    tensor cores; tf32: one of them, with ten bits of each number. Other products, and a search on a
    CPU, do not know it."""
    search_threads: int = 1
    """CPU threads of a search: 1 is fastest up to a width of about 512; 0 leaves torch's own
    number."""
    root_dirichlet_alpha: float = 0.3
    """Concentration of the Dirichlet noise at the root, in collect only."""
    root_noise_weight: float = 0.25
    """Share of that noise in the root's prior."""
    root_prior: RootPriorSettings = field(default_factory=RootPriorSettings)
    """How the LLM enters at the root."""
    policy_target: str = "regularised"
    """What policies are trained on with another root policy than gumbel, whose target is its own.
    regularised: what visit counts tend to, from the prior without noise and all values found
    (priorzero/search/targets.py); visits: the shares of the visit counts. lightzero's tree knows
    visits only."""
    target_prior: str = "mixture"
    """The prior in the world model's policy target (regularised, or gumbel's). mixture: what the
    search started from; world_model: its own policy, so that it learns what the search found and
    not the LLM's opinion; llm: the LLM's, at temperature 1."""
    fixed_temperature_value: float = 1.0
    """Temperature of visit counts when an action is drawn in collect (of the LLM where it plays
    alone); lower ones repeat what earns a little."""
    annealing: AnnealingSettings = field(default_factory=AnnealingSettings)
    """Temperature and root noise by schedule."""
    restarts: RestartSettings = field(default_factory=RestartSettings)
    """Training episodes that begin at a state visited before."""

    # ---- data ----
    game_segment_length: int = 20
    """Steps of a segment."""
    num_segments: int = 8
    """Segments collected per iteration."""
    replay_buffer_size: int = 100_000
    """Transitions kept for replay."""
    replay_save_mib: int = 2048
    """MiB on disk for the replay buffer's segments, the newest ones where they take more; 0 keeps
    none, so that a resumed run starts with an empty buffer."""
    use_priority: bool = False
    """Prioritised replay."""
    priority_prob_alpha: float = 0.6
    """Exponent of a transition's priority when it is drawn."""
    priority_prob_beta: float = 0.4
    """Exponent of the importance weights that correct for it."""

    # ---- learning ----
    num_unroll_steps: int = 10
    """Steps the model is unrolled."""
    burn_in: int = 0
    """Real steps before a window, and before the states its values bootstrap from, that are read as
    context and not trained on. 0: windows start cold; context_steps - 1: as roots do."""
    td_steps: int = 5
    """Steps of the value target before it bootstraps."""
    value_bootstrap: str = "target_network"
    """target_network: the target network's value now; search: the root value found when the step
    was played, or reanalysed."""
    reanalyse_ratio: float = 0.0
    """Share of a batch's rows whose policy targets are searched anew with the present network, from
    the stored steps and the LLM's stored answers; with value_bootstrap search their bootstrap
    values too. Above 0 it is one row at least, and costs a search per step of each such row."""
    discount_factor: float = 0.99
    """Discount of rewards, per game step."""
    batch_size: int = 64
    """Windows per update."""
    replay_ratio: float = 0.25
    """Updates per collected transition."""
    train_start_after_envsteps: int = 0
    """Environment steps before the first update."""
    learning_rate: float = 1e-4
    """AdamW's learning rate."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    grad_clip_value: float = 5.0
    """Largest norm of a gradient."""
    target_update_theta: float = 0.05
    """Share of the online network that enters the target network at each update."""
    loss_weights: LossWeights = field(default_factory=LossWeights)
    """Weights of the loss terms."""
    train_dtype: str = "auto"
    """Matrix products of an update: float32, or bfloat16 under autocast (weights, residual stream
    and losses stay float32, on CUDA softmax too); auto takes bfloat16 on CUDA."""
    compile_update: str = "off"
    """torch.compile for the networks' passes in an update: off, default or reduce-overhead (with
    CUDA graphs). It takes up to minutes at the first update."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from one_of(self, "device", "auto", "cpu", "cuda")
        yield from one_of(self, "value_bootstrap", "target_network", "search")
        yield from one_of(self, "policy_target", "regularised", "visits")
        yield from one_of(self, "target_prior", "mixture", "world_model", "llm")
        yield from one_of(self, "train_dtype", "auto", "float32", "bfloat16")
        yield from one_of(self, "compile_update", "off", "default", "reduce-overhead")
        yield from one_of(self, "search_backend", "auto", "fused", "plain")
        yield from one_of(self, "search_precision", "float32", "tf32")
        yield from a_file_of(self, "root_policy", "priorzero.search.root_policies")
        yield from positive(
            self,
            "embed_dim",
            "num_layers",
            "num_heads",
            "group_size",
            "support_scale",
            "num_simulations",
            "root_dirichlet_alpha",
            "fixed_temperature_value",
            "game_segment_length",
            "num_segments",
            "num_unroll_steps",
            "td_steps",
            "batch_size",
            "replay_ratio",
            "learning_rate",
            "grad_clip_value",
        )
        yield from not_negative(
            self,
            "search_threads",
            "priority_prob_alpha",
            "priority_prob_beta",
            "train_start_after_envsteps",
            "replay_save_mib",
            "weight_decay",
        )
        yield from in_unit_interval(
            self, "root_noise_weight", "target_update_theta", "reanalyse_ratio"
        )
        yield Rule("discount_factor", 0 < self.discount_factor <= 1, "it must lie in (0, 1]")

        yield from self._search_rules()
        yield from self._sequence_rules()

    def _search_rules(self) -> Iterator[Rule]:
        """What a root policy and the LLM's temperature can be combined with."""
        yield Rule(
            "annealing.duration",
            not self.annealing.duration or self.root_policy != "gumbel",
            "root_policy gumbel draws by itself: it knows neither temperature nor Dirichlet noise",
        )
        yield Rule("target_prior", self.takes_target_prior(self.target_prior), NO_OPERATOR)
        yield Rule(
            "root_prior.temperature",
            not self.root_prior.calibrated or self.target_prior != "llm",
            "target_prior llm puts the LLM's own opinion at temperature 1 into the targets that it "
            "is fitted to: take target_prior mixture or world_model, or a number",
        )

    def _sequence_rules(self) -> Iterator[Rule]:
        """Of the network's sizes, and of the sequences it is trained on."""
        parts = max(1, self.num_heads), max(1, self.group_size)
        yield Rule(
            "embed_dim",
            all(self.embed_dim % part == 0 for part in parts),
            f"num_heads {self.num_heads} and group_size {self.group_size} must divide it",
        )
        yield Rule(
            "context_steps",
            1 <= self.context_steps <= self.num_unroll_steps + self.burn_in,
            "it must lie in 1..num_unroll_steps + burn_in "
            f"({self.num_unroll_steps + self.burn_in}), the positions that are trained",
        )
        yield Rule(
            "burn_in",
            0 <= self.burn_in < max(1, self.context_steps),
            f"it must lie in 0..context_steps - 1 ({self.context_steps - 1}): a root looks back no "
            "further",
        )
        yield Rule(
            "replay_buffer_size",
            self.replay_buffer_size >= self.game_segment_length,
            f"it must hold one segment ({self.game_segment_length} transitions)",
        )

    def takes_target_prior(self, name: str) -> bool:
        """Whether the training target can have this prior (`target_prior`)."""
        visits = self.root_policy == "lightzero" or (
            self.root_policy == "puct" and self.policy_target == "visits"
        )
        return name == "mixture" or not visits
