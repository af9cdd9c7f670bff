"""Which reduction and temperature do best, by family of games, and what that choice is worth on a
game it was not made on.

A family is a kind of games (`priorzero.games.kinds`): written stories and generated games differ in
what their commands are like. Games that are for judging only are never chosen on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from statistics import mean
from typing import Any

Row = dict[str, Any]
"""One line of the prior's table: llm, game, family, judging_only, variant, reduction, temperature,
and `metrics.figures`.
"""


def best_settings(rows: Sequence[Row]) -> list[Row]:
    """Per LLM, family and prompt variant: the reduction with the highest mean MRR over the games,
    then its temperature with the lowest mean log loss.

    Returns:
        one line each: llm, family, variant, reduction, temperature, games, decisions, mrr and its
        mrr_error, top1, log_loss; under `all` per reduction its mean MRR; `best` marks the variant
        with the highest MRR of its LLM and family.
    """
    found = []
    groups = _grouped([r for r in rows if not r["judging_only"]], "llm", "family", "variant")
    for (llm, family, variant), own in groups.items():
        chosen = _choose(own)
        found.append(
            {
                "llm": llm,
                "family": family,
                "variant": variant,
                **chosen,
                "games": sorted({r["game"] for r in own}),
                "all": _by_reduction(own),
            }
        )
    for _, own in _grouped(found, "llm", "family").items():
        top = max(own, key=lambda r: r["mrr"])
        for row in own:
            row["best"] = row is top
    return found


def held_out(rows: Sequence[Row]) -> list[Row]:
    """Per LLM, variant and game: the settings chosen on the family's other games (those that are
    not for judging), and what they give on this one, beside what hindsight gives.

    Games whose family has no other game at hand are left out.
    """
    found = []
    for (llm, family, variant, game), own in _grouped(
        rows, "llm", "family", "variant", "game"
    ).items():
        others = [
            r
            for r in rows
            if (r["llm"], r["family"], r["variant"]) == (llm, family, variant)
            and r["game"] != game
            and not r["judging_only"]
        ]
        if not others:
            continue

        chosen, hindsight = _choose(others), _choose(own)
        given = _row(own, chosen["reduction"], chosen["temperature"])
        found.append(
            {
                "llm": llm,
                "family": family,
                "variant": variant,
                "game": game,
                "reduction": chosen["reduction"],
                "temperature": chosen["temperature"],
                "mrr": given["mrr"],
                "log_loss": given["log_loss"],
                "hindsight_reduction": hindsight["reduction"],
                "hindsight_mrr": hindsight["mrr"],
            }
        )
    return found


def _choose(rows: Sequence[Row]) -> Row:
    by_reduction = _by_reduction(rows)
    reduction = max(by_reduction, key=lambda name: by_reduction[name])
    own = _grouped([r for r in rows if r["reduction"] == reduction], "temperature")
    losses = {t: mean(r["log_loss"] for r in same) for (t,), same in own.items()}
    temperature = min(losses, key=lambda t: losses[t])
    found = own[(temperature,)]
    return {
        "reduction": reduction,
        "temperature": temperature,
        "decisions": sum(r["decisions"] for r in found),
        "mrr": by_reduction[reduction],
        "mrr_error": sum(r["mrr_error"] ** 2 for r in found) ** 0.5 / len(found),
        "top1": mean(r["top1"] for r in found),
        "log_loss": losses[temperature],
    }


def _by_reduction(rows: Sequence[Row]) -> dict[str, float]:
    """Mean MRR over games. Ranks know no temperature, so any one stands for all."""
    return {
        name: mean(r["mrr"] for r in own) for (name,), own in _grouped(rows, "reduction").items()
    }


def _row(rows: Sequence[Row], reduction: str, temperature: float) -> Row:
    (found,) = [r for r in rows if r["reduction"] == reduction and r["temperature"] == temperature]
    return found


def _grouped(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """Rows that agree in these names, in the order in which they come."""
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        groups[tuple(row[name] for name in names)].append(row)
    return groups
