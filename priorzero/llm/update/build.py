"""The objectives of a run, from its settings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from priorzero import plugins
from priorzero.llm.update.objective import Objective
from priorzero.llm.update.rft import RFT
from priorzero.llm.update.sft import SFT

if TYPE_CHECKING:
    from priorzero.settings.llm import LLMSettings

OBJECTIVES = "priorzero.llm.update.objectives"


def make_objectives(settings: LLMSettings, reduction: str) -> dict[str, Objective]:
    """The objectives that are switched on, by name, in the order in which they are trained.

    Args:
        reduction: how token log-probabilities become one number per action, "sum" or "mean"; the
            same as the root prior's.
    """
    objectives: dict[str, Objective] = {}
    if settings.sft.enable:
        objectives["sft"] = SFT(settings.train.objective, reduction, settings.sft.temperature)
    if settings.rft.enable:
        rating = plugins.load(OBJECTIVES, settings.rft.objective)
        objectives["rft"] = RFT(
            settings.rft,
            settings.train,
            reduction,
            rating.make(reduction, settings.rft.cot_weight),
        )
    return objectives
