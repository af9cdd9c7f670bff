"""The record of a warm-up, `priorzero.json` in the folder: what it saw and what it brought."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from priorzero.evidence.walk import Walk
from priorzero.games.families import kinship
from priorzero.llm.seen import Seen, SeenGame
from priorzero.settings.warmup import WarmupSettings
from priorzero.warmup.tune import Tuned

BY = "warm-up"


def seen_games(walks: Sequence[Walk]) -> Seen:
    """What has to be told of these games: held out ones too, since they decided when to end."""
    kin = [kinship(walk.game) for walk in walks]
    return Seen(tuple(sorted({SeenGame(one.game, one.family, BY) for one in kin})))


def record(
    tuned: Tuned,
    settings: WarmupSettings,
    train: Sequence[Walk],
    held_out: Sequence[Walk],
    left_out: Mapping[str, str],
    source: Mapping[str, Any],
    before: Seen,
) -> dict[str, Any]:
    """What `priorzero.json` says.

    Args:
        left_out: game -> why.
        source: base model, form, command, commit, machine, date.
        before: games the base model had been trained on already.
    """
    seen = seen_games([*train, *held_out]) | before
    decisions = Counter()
    for walk in (*train, *held_out):
        decisions[kinship(walk.game).family] += len(walk.steps)
    return {
        **source,
        "seen": seen.as_list(),
        "families": dict(sorted(decisions.items())),
        "held_out": sorted(kinship(walk.game).game for walk in held_out),
        "left_out": dict(left_out),
        "reduction": settings.reduction,
        "prompts": settings.prompts,
        "figures": {
            "before": tuned.before,
            "after": tuned.after,
            "curve": tuned.curve,
            "ended": tuned.ended,
            "steps": tuned.steps,
            "decisions": tuned.decisions,
            "seconds": tuned.seconds,
        },
        "settings": settings.as_dict(),
    }
