"""Every number of a run's metrics.jsonl as a curve that a page can hold."""

from __future__ import annotations

import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

_POINTS = 400  # of a curve; more cannot be told apart on a screen

# Steps and values, equally long.
Curve = tuple[list[int], list[float]]


def read_curves(folder: Path) -> dict[str, Curve]:
    """The curves of a run by `namespace/name`; empty where it wrote none."""
    found: dict[str, Curve] = {}
    last = 0
    for path in (folder / "log" / "metrics.jsonl", folder / "metrics.jsonl"):
        if path.is_file():
            break
    else:
        return {}

    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            namespace, step = row.pop("namespace"), row.pop("step")
        except (ValueError, KeyError, TypeError, AttributeError):
            logger.warning("%s: a damaged line is left out", path)
            continue

        # A resumed run goes back to its checkpoint and plays some steps again. An evaluation of an
        # older checkpoint goes back too, and changes nothing but its own curve.
        if namespace != "eval":
            if step < last:
                found = {name: _before(curve, step) for name, curve in found.items()}
            last = step
        for name, value in row.items():
            steps, values = found.setdefault(f"{namespace}/{name}", ([], []))
            steps.append(step)
            values.append(value)
    return {name: _thinned(_in_order(curve)) for name, curve in found.items() if curve[0]}


def _before(curve: Curve, step: int) -> Curve:
    kept = [(s, v) for s, v in zip(*curve, strict=True) if s < step]
    return [s for s, _ in kept], [v for _, v in kept]


def _in_order(curve: Curve) -> Curve:
    steps, values = curve
    order = sorted(range(len(steps)), key=steps.__getitem__)
    return [steps[i] for i in order], [values[i] for i in order]


def _thinned(curve: Curve) -> Curve:
    """Means of neighbours, where there are too many points."""
    steps, values = curve
    width = -(-len(steps) // _POINTS)
    if width == 1:
        return curve
    starts = range(0, len(steps), width)
    return (
        [steps[min(at + width, len(steps)) - 1] for at in starts],
        [sum(values[at : at + width]) / len(values[at : at + width]) for at in starts],
    )
