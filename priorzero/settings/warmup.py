"""Settings of a warm-up: what an LLM is fine-tuned on before any run, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from priorzero.settings.llm import LLMTrainSettings, LoraSettings
from priorzero.settings.record import (
    Rule,
    Settings,
    in_unit_interval,
    not_negative,
    one_of,
    positive,
)

GENERATORS = ("tw-simple", "tw-coin", "tw-cooking")
PROMPTS = ("bare", "history", "list", "history+list")


@dataclass(kw_only=True)
class WarmupSettings(Settings):
    """What `./run_priorzero_orz.sh warmup` reads."""

    llm: str = "auto"
    """The LLM to begin with, as `llm.model`."""
    games: list[str] = field(default_factory=list)
    """Folders with story files, or games as `env.env_id`."""
    exclude: list[str] = field(default_factory=lambda: ["zork1.z5", "detective.z5"])
    """Games the LLM is to be judged on later: they and their relatives
    (`priorzero/games/families.py`) are left out. Games that are for judging only
    (`priorzero/games/judging.py`) always are."""
    textworld: int = 24
    """Games that TextWorld generates; 0: none. Their seeds are above those runs play."""
    textworld_kinds: list[str] = field(default_factory=lambda: list(GENERATORS))
    """The generators they come from, in turns."""
    wanders: int = 4
    """Further episodes of a game whose kind has a solver: they stray, and learn the way back. 0:
    none."""
    stray: float = 0.3
    """Probability that such an episode types a random command instead of the solver's."""
    steps: int = 0
    """Walkthrough commands per game at most; 0: all."""

    decisions: int = 0
    """Decisions to train on at most, drawn at random; 0: all."""

    prompts: list[str] = field(default_factory=lambda: ["bare"])
    """Every decision once with each of these prompts (`priorzero/evidence/variants.py`): bare is
    what debug runs ask, history+list what full runs ask."""
    history_length: int = 5
    """Past steps in prompts with history."""
    max_prompt_tokens: int = 448
    """Tokens of a prompt at most."""

    reduction: str = "sum"
    """How token log-probabilities become one number per command, as `policy.root_prior.reduction`
    of the runs to come: sum, mean."""
    weights: str = "auto"
    """What trains. all: every weight; adapters: those of `lora`, merged at the end; auto: all on a
    GPU, adapters on a CPU."""
    learning_rate: float = 0.0
    """0: 5e-5 for all weights, 2e-3 for adapters."""
    epochs: int = 3
    """Passes over the decisions at most; it ends earlier where the games held out get worse."""
    evaluations: int = 2
    """Evaluations on the games held out, per pass."""
    patience: int = 2
    """Evaluations without a better one, after which it ends."""
    held_out: float = 0.15
    """Share of the games that are held out: of stories whole families."""
    held_out_decisions: int = 240
    """Their decisions that are looked at, at most."""
    max_text_loss: float = 0.5
    """Nats per token by which plain English may become less likely; beyond it training ends, and
    the weights before it stand."""
    minutes: float = 0.0
    """Of training; 0: no limit."""

    jobs: int = 0
    """Games walked at a time; 0: as many as there are cores."""
    device: str = "auto"
    """auto, cpu, cuda."""
    seed: int = 0
    """Of the draws: games held out, straying, order."""
    train: LLMTrainSettings = field(
        default_factory=lambda: LLMTrainSettings(batch_size=32, max_batch_tokens=8192)
    )
    """The optimiser. objective: actions trains the softmax over the valid commands, which is what
    the search reads; tokens the likelihood of the right command's text alone. learning_rate,
    schedule and its steps are set from what stands above and the number of decisions."""
    lora: LoraSettings = field(default_factory=lambda: LoraSettings(enable=True, last_layers=6))
    """The adapters."""
    adapter_dtype: str = "float32"
    """Number format of a file of adapters: float32, float16 (half the size), bfloat16."""

    def rules(self) -> Iterator[Rule]:
        """See `Settings.rules`."""
        yield from not_negative(
            self,
            "textworld",
            "wanders",
            "steps",
            "decisions",
            "learning_rate",
            "minutes",
            "jobs",
            "seed",
        )
        yield from positive(
            self,
            "history_length",
            "max_prompt_tokens",
            "epochs",
            "evaluations",
            "patience",
            "held_out_decisions",
            "max_text_loss",
        )

        yield from in_unit_interval(self, "stray")
        yield Rule("held_out", 0 < self.held_out < 1, "it must lie between 0 and 1")
        yield Rule(
            "games", bool(self.games or self.textworld), "without games textworld must not be 0"
        )

        for name, known in (("textworld_kinds", GENERATORS), ("prompts", PROMPTS)):
            chosen = getattr(self, name)
            fits = bool(chosen) and set(chosen) <= set(known)
            yield Rule(name, fits, f"it must name some of {', '.join(known)}")

        yield from one_of(self, "reduction", "sum", "mean")
        yield from one_of(self, "weights", "auto", "all", "adapters")
        yield from one_of(self, "device", "auto", "cpu", "cuda")
        yield from one_of(self, "adapter_dtype", "float32", "float16", "bfloat16")
        yield Rule("lora.enable", self.lora.enable, "weights=all trains without adapters")
