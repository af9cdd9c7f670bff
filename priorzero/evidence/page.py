"""The prior report as files: report.json, table.md, README.md (one page) and pictures."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from priorzero.evidence.plots import plot_play, plot_ranks, plot_reliability

Row = dict[str, Any]

_UNIFORM = "uniform"
_MISSING_SHOWN = 12  # commands on the page; report.json has all


def write_report(out: Path, report: Mapping[str, Any]) -> None:
    """Write everything into the folder `out`.

    Args:
        report: what `measure.measure` returns, and where it comes from.
    """
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_rounded(report), indent=1, ensure_ascii=False)
    (out / "report.json").write_text(text + "\n", encoding="utf-8")
    (out / "table.md").write_text(_full_table(report), encoding="utf-8")
    (out / "README.md").write_text(page(report), encoding="utf-8")

    plot_ranks(out / "ranks.png", report["prior"], report["uniform"])
    plot_reliability(out / "reliability.png", report["reliability"])
    if report["play"]:
        plot_play(out / "play.png", report["play"])


def page(report: Mapping[str, Any]) -> str:
    """The one page, in Markdown."""
    machine = report["machine"]
    parts = [
        "# Prior report",
        "```\n" + report["command"] + "\n```",
        f"Commit {report['commit']}, {report['date']}, {report['minutes']:.1f} minutes on "
        f"{machine['cores']} cores ({machine['threads']} threads) of {machine['cpu']}, "
        f"{machine['gpu'] or 'no GPU'}; Python {machine['python']}, torch {machine['torch']}. "
        "Nothing was trained, and no default was changed. `docs/METRICS.md` explains the figures; "
        "`report.json` has all of them, `table.md` those of every temperature.",
        *_seen(report["seen"]),
        "## Best settings by family of games",
        *_best(report),
        "## What was walked",
        *_games(report["games"]),
        "## Rank, probability and calibration of the right command",
        "At temperature 1; ± is the standard error over decisions. The last columns: at the "
        "temperature with the lowest log loss, found on the same decisions.",
        _prior(report),
        "![mean reciprocal rank](ranks.png)",
        "![reliability](reliability.png)",
        "## Mass outside the valid commands",
        "The probability that the LLM, left to itself, types none of the listed commands; and the "
        "walkthrough's commands that are in no list, which no agent can type.",
        _mass(report["mass"]),
        *_missing(report["games"]),
    ]

    # Search and play are left out where they were not asked for.
    if report["search"]:
        parts += ["## What the search makes of the prior", *_search(report["search"])]
    if report["play"]:
        parts += ["## Play without a search", _play(report["play"]), "![play](play.png)"]
    return "\n\n".join(parts) + "\n"


def _seen(rows: Sequence[Row]) -> list[str]:
    """Loud where an LLM had been trained on what it is judged on."""
    if not rows:
        return []
    lines = (f"- **{row['llm']}, {row['game']}: {row['warning']}**" for row in rows)
    return ["## Trained on what is judged here\n\n" + "\n".join(lines)]


def _search(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    dropped = f", {first['dropped']} more have no place in the vocabulary" * bool(first["dropped"])
    words = (
        f"The agent of {first['run']} ({first['checkpoint']}, {first['env_steps']} environment "
        f"steps) along the walkthrough of {_game(first)}; {first['decisions']} decisions{dropped}. "
        "Each row is a distribution over the same commands, from the LLM to what is played."
    )
    table = _table(
        ("distribution", "top-1", "top-3", "top-5", "MRR", "probability", "log loss"),
        ((row["stage"], *_ranks(row)) for row in rows),
    )
    return [words, table]


def _best(report: Mapping[str, Any]) -> list[str]:
    """The verdict in words, then the table behind it."""
    if not report["best"]:
        return ["All games of this report are for judging only, so nothing was chosen."]

    tried = {row["temperature"] for row in report["prior"]}
    words = []
    for row in report["best"]:
        at_the_end = " (an end of the tried range)" * (
            row["temperature"] in (min(tried), max(tried))
        )
        if row["best"]:
            words.append(
                f"- **{row['family']}**, {row['llm']}: by rank **{row['reduction']}** with prompt "
                f"`{row['variant']}` (MRR {row['mrr']:.3f} ± {row['mrr_error']:.3f}, uniform order "
                f"{_uniform_mrr(report, row):.3f}), temperature {row['temperature']:g} by log loss"
                f"{at_the_end}; {row['decisions']} decisions of {', '.join(row['games'])}. "
                f"{_over_prompts(report, row)}{_best_play(report, row)}"
            )
    words.append(
        "\nThese were chosen on the games they are reported on, by mean over games; games for "
        "judging only take no part. ± is the standard error: reductions and prompts that differ "
        "by less are not told apart."
    )

    table = _table(
        (
            "LLM",
            "family",
            "prompt",
            "best reduction",
            "temperature",
            "MRR by reduction",
            "log loss",
        ),
        (
            (
                row["llm"],
                row["family"],
                row["variant"],
                row["reduction"],
                f"{row['temperature']:g}",
                ", ".join(f"{name} {mrr:.3f}" for name, mrr in row["all"].items()),
                f"{row['log_loss']:.2f}",
            )
            for row in sorted(report["best"], key=lambda r: (r["llm"], r["family"]))
        ),
    )
    return ["\n".join(words), table, *_held_out(report["held_out"])]


def _uniform_mrr(report: Mapping[str, Any], best: Row) -> float:
    return mean(r["mrr"] for r in report["uniform"] if r["game"] in best["games"])


def _over_prompts(report: Mapping[str, Any], best: Row) -> str:
    """Each reduction's MRR over all prompts of the LLM and family."""
    same = ("llm", "family")
    rows = [r for r in report["best"] if all(r[n] == best[n] for n in same)]
    means = {name: mean(r["all"][name] for r in rows) for name in best["all"]}
    return "Over all prompts: " + ", ".join(f"{n} {mrr:.3f}" for n, mrr in means.items()) + "."


def _best_play(report: Mapping[str, Any], best: Row) -> str:
    """Per game of a family: which of the LLM's players earned most without a search."""
    told = []
    for game in best["games"]:
        own = [r for r in report["play"] if r["game"] == game]
        players = [r for r in own if r["llm"] == best["llm"]]
        if players:
            top = max(players, key=lambda r: r["return"])
            (uniform,) = [r for r in own if r["player"] == _UNIFORM]
            told.append(
                f"{top['return']:.2f} on {game} as `{top['player']}`, where uniform play earns "
                f"{uniform['return']:.2f}"
            )
    return f" Alone it earns at best {'; '.join(told)}." if told else ""


def _held_out(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["No family has two games, so no choice could be tried on a game held out of it."]
    table = _table(
        ("LLM", "prompt", "game held out", "chosen on the others", "MRR", "log loss", "hindsight"),
        (
            (
                row["llm"],
                row["variant"],
                row["game"],
                f"{row['reduction']} at {row['temperature']:g}",
                f"{row['mrr']:.3f}",
                f"{row['log_loss']:.2f}",
                f"{row['hindsight_reduction']} {row['hindsight_mrr']:.3f}",
            )
            for row in rows
        ),
    )
    return ["Chosen on the family's other games, tried on the one held out:", table]


def _games(games: Sequence[Row]) -> list[str]:
    table = _table(
        ("game", "family", "walked", "judged", "missing", "idle", "other spelling", "note"),
        (
            (
                g["game"],
                g["family"],
                f"{g['walked']} of {g['walkthrough']}",
                g["decisions"],
                g["missing"],
                g["idle"],
                g["respelled"],
                "; ".join(filter(None, (g["judging_only"] and "judging only", g["fault"]))),
            )
            for g in games
        ),
    )
    words = (
        "Walked: commands of the walkthrough. Judged: those that a valid command equals and that "
        "change something. Missing: in no list of valid commands. Idle: they leave the game as it "
        "was. Other spelling: judged ones that the list spells differently, known by the state "
        "they lead to."
    )
    return [table, words]


def _prior(report: Mapping[str, Any]) -> str:
    lines = []
    for game in report["games"]:
        name = _game(game)
        for row in report["uniform"]:
            if row["game"] == game["game"]:
                lines.append((name, "", _UNIFORM, *_ranks(row), "", "", "", ""))

        own = [r for r in report["prior"] if r["game"] == game["game"]]
        for row in own:
            if row["temperature"] != 1:
                continue
            same = [r for r in own if _names(r) == _names(row)]
            best = min(same, key=lambda r: r["log_loss"])
            lines.append(
                (
                    name,
                    f"{row['llm']}, {row['variant']}",
                    row["reduction"],
                    *_ranks(row),
                    f"{row['ece']:.3f}",
                    f"{best['temperature']:g}",
                    f"{best['log_loss']:.2f}",
                    f"{best['ece']:.3f}",
                )
            )
    header = ("game", "LLM, prompt", "reduction", "top-1", "top-3", "top-5", "MRR", "probability")
    return _table((*header, "log loss", "ECE", "best T", "log loss there", "ECE there"), lines)


def _game(row: Row) -> str:
    return row["game"] + (" (judging only)" if row["judging_only"] else "")


def _ranks(row: Row) -> tuple[str, ...]:
    error = f" ± {row['mrr_error']:.3f}" if "mrr_error" in row else ""
    return (
        *(f"{row[name]:.3f}" for name in ("top1", "top3", "top5")),
        f"{row['mrr']:.3f}{error}",
        f"{row['probability']:.3f}",
        f"{row['log_loss']:.2f}",
    )


def _names(row: Row) -> tuple:
    return row["llm"], row["variant"], row["reduction"]


def _mass(rows: Sequence[Row]) -> str:
    return _table(
        ("game", "LLM", "prompt", "mass outside"),
        ((_game(r), r["llm"], r["variant"], f"{r['mass_outside']:.3f}") for r in rows),
    )


def _missing(games: Sequence[Row]) -> list[str]:
    lines = []
    for game in games:
        commands = [f"`{c}`" for c in game["missing_commands"]]
        if commands:
            more = f" and {len(commands) - _MISSING_SHOWN} more" * (len(commands) > _MISSING_SHOWN)
            lines.append(f"- {game['game']}: {', '.join(commands[:_MISSING_SHOWN])}{more}")
    return ["Missing from the lists:\n\n" + "\n".join(lines)] if lines else []


def _play(rows: Sequence[Row]) -> str:
    return _table(
        (
            "game",
            "LLM",
            "player",
            "episodes",
            "return",
            "best",
            "length",
            "steps into known states",
        ),
        (
            (
                _game(r),
                r["llm"],
                r["player"],
                r["episodes"],
                f"{r['return']:.2f} ± {r['return_std']:.2f}",
                f"{r['return_best']:g}",
                f"{r['length']:.1f}",
                f"{r['revisits']:.3f}",
            )
            for r in rows
        ),
    )


def _full_table(report: Mapping[str, Any]) -> str:
    """Every figure at every temperature."""
    names = [n for n in report["prior"][0] if n not in ("llm", "family", "judging_only")]
    header = ("llm", "judging only", *names)
    lines = (
        (
            r["llm"],
            "yes" if r["judging_only"] else "",
            *(f"{r[n]:.4g}" if isinstance(r[n], float) else r[n] for n in names),
        )
        for r in report["prior"]
    )
    return _table(header, lines) + "\n"


def _table(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows)


def _rounded(value: Any) -> Any:
    """Floats with five significant digits, all the way down."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(v) for v in value]
    return value
