"""TensorBoard: every curve, the important ones first (tab CUSTOM SCALARS), and the settings that
matter beside the results (tab HPARAMS).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from priorzero.run.boards import Guard
from priorzero.settings.evaluation import MODES

LAYOUT = {
    "Result": {
        "Return of the evaluation, by mode": [r"^eval/\w+/return_mean$"],
        "Return of training episodes": [r"^collect/episode_return_(mean|max)$"],
        "The same by game, where there are several": [
            r"^eval/[\w-]+/\w+/return_mean$",
            r"^collect/[\w-]+/episode_return_mean$",
        ],
    },
    "Effect of the LLM's prior": {
        "KL(mixture, world model)": [r"^prior/kl_from_wm$"],
        "Overruled by the search": [r"^prior/(llm_)?overridden$"],
        "Entropies": [r"^prior/(llm_)?entropy$", r"^collect/visit_entropy$"],
        "The LLM's share": [r"^prior/weight$"],
    },
    "World model": {
        "Losses": [r"^wm/(wm|latent|reward|policy|value)_loss$"],
        "Value: error and target": [r"^wm/(value_error|target_value)$"],
    },
    "LLM": {
        "Losses": [r"^llm/(sft|rft)_loss$"],
        "Agrees with the search": [r"^llm/sft_accuracy$"],
        "KL of reinforcement": [r"^llm/rft_(approx_kl|kl_reference)$"],
    },
    "Time and caches": {
        "Seconds per stage": [r"^perf/seconds_(collect|train_wm|train_llm|evaluate|save)$"],
        "Seconds of collection": [r"^perf/seconds_(env|encode|llm_prior|search)$"],
        "Cache hit rates": [r"^perf/(valid_action|encoder|llm_cache)_hit_rate$"],
        "Memory (GiB)": [r"^perf/memory_gb$"],
    },
}
"""Category -> chart -> curves, as regular expressions over names; docs/METRICS.md explains them."""

HPARAMS = (
    "settings.env.env_id",
    "settings.seed",
    "settings.llm.enable",
    "settings.llm.model",
    "settings.llm.sft.enable",
    "settings.llm.rft.enable",
    "settings.llm.rft.objective",
    "settings.llm.rft.advantage",
    "settings.llm.train.learning_rate",
    "settings.llm.lora.enable",
    "settings.policy.num_simulations",
    "settings.policy.root_policy",
    "settings.policy.root_prior.mode",
    "settings.policy.root_prior.weighting",
    "settings.policy.root_prior.weight",
    "settings.policy.root_prior.temperature",
    "settings.policy.root_prior.reduction",
    "settings.policy.embed_dim",
    "settings.policy.num_layers",
    "settings.policy.learning_rate",
    "settings.policy.batch_size",
    "settings.policy.replay_ratio",
    "settings.policy.reanalyse_ratio",
    "settings.policy.burn_in",
    "schedule.wm_training_mode",
    "schedule.llm_train_freq",
    "schedule.off_policy_degree",
)
"""Columns of the HPARAMS table, the same in every run: TensorBoard takes the first run's for
all."""

RESULTS = (
    *(f"eval/{mode}/return_mean" for mode in MODES),
    "collect/episode_return_mean",
    "prior/kl_from_wm",
    "wm/wm_loss",
    "llm/sft_loss",
)
"""Curves whose last value stands beside them."""


class TensorBoard:
    """Event files of one run.

    Args:
        folder: where they go.
        guard: what the thread that writes them goes through.
    """

    name = "TensorBoard"

    def __init__(self, folder: Path, guard: Guard) -> None:
        from tensorboardX import SummaryWriter  # heavy; only where a run really writes

        self._writer = SummaryWriter(str(folder))
        # A thread writes the events. One that dies of a full disk leaves its queue full, and then
        # the run waits for it for ever.
        events = self._writer.file_writer.event_writer._ev_writer
        events.write_event = partial(guard, events.write_event)
        events.flush = partial(guard, events.flush)
        self._ending: Any = None

    def settings(self, config: Mapping[str, Any]) -> None:
        """See `Board.settings`."""
        from tensorboardX.summary import hparams

        text = json.dumps(config, indent=1, default=str)
        self.text("config", f"```json\n{text}\n```", 0)
        layout = {
            category: {chart: ["Multiline", curves] for chart, curves in charts.items()}
            for category, charts in LAYOUT.items()
        }
        self._writer.add_custom_scalars(layout)

        # Not `SummaryWriter.add_hparams`: it opens a second run in a folder of its own. The table
        # takes the results from this run's curves.
        experiment, session, self._ending = hparams(
            chosen_settings(config), dict.fromkeys(RESULTS, 0.0)
        )
        self._writer.file_writer.add_summary(experiment)
        self._writer.file_writer.add_summary(session)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Board.scalars`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Board.text`."""
        self._writer.add_text(tag, text, step)

    def flush(self) -> None:
        """See `Board.flush`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Board.close`."""
        if self._ending is not None:
            self._writer.file_writer.add_summary(self._ending)
        self._writer.close()


def chosen_settings(config: Mapping[str, Any]) -> dict[str, bool | float | str]:
    """The settings of `HPARAMS` that a run has, by name without `settings.` and `schedule.`."""
    chosen = {}
    for path in HPARAMS:
        place: Any = config
        for part in path.split("."):
            place = place.get(part) if isinstance(place, Mapping) else None
        if isinstance(place, list):
            place = ", ".join(map(str, place))
        if place is not None:  # another program's schedule may lack one
            chosen[path.split(".", 1)[1]] = place
    return chosen
