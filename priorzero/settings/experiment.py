"""All settings of one experiment: the groups, and the rules between them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.collectors import CollectorSettings
from priorzero.settings.decisions import DecisionSettings
from priorzero.settings.env import EnvSettings
from priorzero.settings.evaluation import LLM_MODES, EvalSettings
from priorzero.settings.llm import LLMSettings
from priorzero.settings.metrics import MetricsSettings
from priorzero.settings.policy import NO_OPERATOR, PolicySettings
from priorzero.settings.record import Rule, Settings
from priorzero.settings.text import TextSettings


@dataclass(kw_only=True)
class ExperimentSettings(Settings):
    """Everything but the schedule, which is `priorzero_config.HybridTrainingConfig`."""

    exp_name: str = ""
    """The run's folder; empty names it after game, method and seed."""
    seed: int = 0
    """Seed of networks, games, search and sampling."""
    env: EnvSettings = field(default_factory=EnvSettings)
    """The game."""
    policy: PolicySettings = field(default_factory=PolicySettings)
    """World model, search, replay data and learning."""
    text: TextSettings = field(default_factory=TextSettings)
    """The sentence encoder."""
    llm: LLMSettings = field(default_factory=LLMSettings)
    """The LLM."""
    eval: EvalSettings = field(default_factory=EvalSettings)
    """The evaluation."""
    decisions: DecisionSettings = field(default_factory=DecisionSettings)
    """The recording of decisions."""
    metrics: MetricsSettings = field(default_factory=MetricsSettings)
    """Where the numbers are shown."""
    collectors: CollectorSettings = field(default_factory=CollectorSettings)
    """Collectors in other processes, with collector_workers."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield Rule("seed", 0 <= self.seed < 2**31, "it must lie in 0..2**31-1")
        yield Rule(
            "llm.enable",
            self.llm.enable or not set(self.eval.modes) & set(LLM_MODES),
            f"eval.modes {self.eval.modes} ask for an LLM; leave those out or enable it",
        )
        yield Rule(
            "policy.root_prior.mode",
            self.llm.enable or self.policy.root_prior.mode == "wm_logits",
            "without an LLM it must be wm_logits",
        )
        alone = self.llm.enable and self.llm.rft.enable and self.llm.rft.relative
        yield Rule(
            "policy.restarts.share",
            not alone or not self.policy.restarts.share,
            f"llm.rft.advantage is {self.llm.rft.advantage}, which compares whole episodes",
        )
        yield Rule(
            "policy.restarts.share",
            not self.env.several or not self.policy.restarts.share,
            "env.env_id names several games, and visited states are remembered of one",
        )
        yield from self._target_rules()

    def _target_rules(self) -> Iterator[Rule]:
        """Of the priors in the training targets."""
        own, sft = self.policy.target_prior, self.llm.sft
        for name, prior in (
            ("policy.target_prior", own),
            ("llm.sft.target_prior", sft.target_prior),
        ):
            yield Rule(
                name,
                self.llm.enable or prior == "mixture",
                "without an LLM the mixture is the world model's policy: leave it mixture",
            )
        yield Rule(
            "llm.sft.target_prior",
            sft.enable or sft.target_prior == "mixture",
            "only SFT reads it, and llm.sft.enable is False",
        )
        yield Rule(
            "llm.sft.target_prior", self.policy.takes_target_prior(sft.target_prior), NO_OPERATOR
        )
