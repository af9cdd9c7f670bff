"""Nested settings: overlays on documented defaults, with every name and type checked.

The settings themselves stand in `priorzero_config.py`; this module knows only how to merge and
reject.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from priorzero.types import PriorZeroError


def overlay(
    defaults: Mapping[str, Any], *layers: Mapping[str, Any], path: str = ""
) -> dict[str, Any]:
    """`defaults` with each layer laid over it, recursively.

    Raises:
        PriorZeroError: a layer names a setting that the defaults do not have, or gives a value of
            another type.
    """
    result = copy.deepcopy(dict(defaults))
    # Merged first: a value's type is checked against the documented default, not against another
    # layer's value.
    for key, value in merge(*layers).items():
        where = f"{path}{key}"
        if key not in result:
            close = difflib.get_close_matches(key, result, n=3)
            hint = (
                f"did you mean {' or '.join(close)}?"
                if close
                else f"known here: {', '.join(sorted(result))}"
            )
            raise PriorZeroError(f"setting {where!r} does not exist; {hint}")
        old = result[key]
        if isinstance(old, dict) and old:
            if not isinstance(value, Mapping):
                raise PriorZeroError(
                    f"setting {where!r} is a group of settings, not the value {value!r}"
                )
            result[key] = overlay(old, value, path=where + ".")
        else:
            result[key] = _checked(where, old, value)
    return result


def _checked(where: str, old: Any, value: Any) -> Any:
    """`value` if its type fits the default's; integers pass as floats, None defaults accept
    anything.
    """
    if old is None or isinstance(old, dict):
        return copy.deepcopy(value)
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(old) is not type(value):
        raise PriorZeroError(
            f"setting {where!r} is {value!r} ({type(value).__name__}); it must be like {old!r} "
            f"({type(old).__name__})"
        )
    return copy.deepcopy(value)


def merge(*layers: Mapping[str, Any]) -> dict[str, Any]:
    """Several nested dictionaries as one; later ones win. Nothing is checked here, `overlay` does
    that.
    """
    result: dict[str, Any] = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), dict)
            result[key] = merge(result[key], value) if both else copy.deepcopy(value)
    return result


def require(rules: Mapping[str, tuple[Any, bool, str]]) -> None:
    """Check `name -> (value, holds, rule)` and report all that fail at once.

    Raises:
        PriorZeroError: naming value, rule and setting of each failure.
    """
    broken = [
        f"{name} is {value!r}, but {rule}"
        for name, (value, holds, rule) in rules.items()
        if not holds
    ]
    if broken:
        raise PriorZeroError("these settings are impossible:\n  " + "\n  ".join(broken))


def parse_assignment(text: str) -> dict[str, Any]:
    """`a.b.c=value` of the command line -> nested dictionary; the value is read as JSON, else as a
    string.

    Raises:
        PriorZeroError: there is no `=`.
    """
    import json

    path, sign, raw = text.partition("=")
    if not sign or not path:
        raise PriorZeroError(f"--set {text!r} is not of the form group.setting=value")
    try:
        value = json.loads(raw)
    except json.JSONDecodeError:
        value = raw
    for key in reversed(path.split(".")):
        value = {key: value}
    return value
