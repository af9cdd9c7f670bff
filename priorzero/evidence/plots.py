"""Pictures of the prior report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from priorzero.evidence.metrics import REDUCTIONS

Row = dict[str, Any]


def plot_ranks(path: Path, rows: Sequence[Row], uniform: Sequence[Row]) -> None:
    """MRR of every prompt variant and reduction: a panel per LLM and game, uniform order dashed."""
    llms, games = _values(rows, "llm"), _values(rows, "game")
    variants = _values(rows, "variant")
    figure, axes = _panels(len(llms), len(games))
    baseline = {row["game"]: row["mrr"] for row in uniform}

    width = 0.8 / len(REDUCTIONS)
    for axis, (llm, game) in zip(axes, [(m, g) for m in llms for g in games], strict=True):
        for number, reduction in enumerate(REDUCTIONS):
            # Ranks are the same at every temperature.
            values = {
                r["variant"]: r["mrr"]
                for r in rows
                if (r["llm"], r["game"], r["reduction"]) == (llm, game, reduction)
            }
            places = [i + (number - 1) * width for i in range(len(variants))]
            axis.bar(places, [values[v] for v in variants], width, label=reduction)
        axis.axhline(baseline[game], color="tab:gray", linestyle="--", label="uniform")
        axis.set(title=f"{game}\n{llm}", ylabel="mean reciprocal rank", ylim=(0, 1))
        axis.set_xticks(range(len(variants)), variants, fontsize="small")
        axis.legend(fontsize="x-small")
    _save(figure, path)


def plot_reliability(path: Path, curves: Sequence[Row]) -> None:
    """Reliability curves: a panel per LLM and variant, a line per reduction at its own temperature;
    the more decisions in a bin, the larger its dot.

    Args:
        curves: llm, variant, reduction, temperature, and `reliability` as
            `metrics.reliability` gives it.
    """
    panels = list(dict.fromkeys((row["llm"], row["variant"]) for row in curves))
    columns = len(_values(curves, "variant"))
    figure, axes = _panels(len(panels) // columns, columns)
    for axis, (llm, variant) in zip(axes, panels, strict=True):
        axis.plot([0, 1], [0, 1], color="tab:gray", linestyle="--")
        for row in curves:
            if (row["llm"], row["variant"]) == (llm, variant):
                bins = row["reliability"]
                label = f"{row['reduction']}, temperature {row['temperature']:g}"
                place = [b["confidence"] for b in bins], [b["right"] for b in bins]
                (line,) = axis.plot(*place, linewidth=1, label=label)
                sizes = [6 * b["decisions"] for b in bins]
                axis.scatter(*place, s=sizes, color=line.get_color(), alpha=0.6)
        axis.set(title=f"{variant}\n{llm}", xlabel="confidence", ylabel="favourite is right")
        axis.legend(fontsize="x-small")
    _save(figure, path)


def plot_play(path: Path, rows: Sequence[Row]) -> None:
    """Return against the share of steps into known states: a panel per game, a dot per player."""
    games = _values(rows, "game")
    figure, axes = _panels(1, len(games))
    for axis, game in zip(axes, games, strict=True):
        for row in rows:
            if row["game"] == game:
                marker = "X" if row["player"] == "uniform" else "o"
                label = f"{row['llm']}: {row['player']}".removeprefix("-: ")
                axis.plot(row["revisits"], row["return"], marker, label=label, alpha=0.7)
        axis.set(title=game, xlabel="steps into known states", ylabel="mean return")
        axis.set_xlim(-0.03, 1.03)
    # Every panel has the same players.
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(1, 0.95), fontsize=7
    )
    _save(figure, path)


def _values(rows: Sequence[Row], name: str) -> list[Any]:
    return list(dict.fromkeys(row[name] for row in rows))


def _panels(rows: int, columns: int):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.5 * columns, 3.8 * rows), squeeze=False
    )
    return figure, axes.flatten()


def _save(figure, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(figure)
