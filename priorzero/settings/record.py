"""What every group of settings can do: refuse unknown names and wrong types, check its rules, be
overlaid and be written down.

A group is a dataclass that derives from `Settings`. Its fields say name, type and default, the
docstring under each says what it does, and `rules` says what values are possible. Values may be
overwritten until a run starts; `validate` is called on construction and again at the start. Nothing
heavy is imported here.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from priorzero import plugins
from priorzero.types import PriorZeroError


class Rule(NamedTuple):
    """One condition on a group's values."""

    name: str
    """The setting it is about, seen from the group: `weight`, or `root_prior.mode`."""
    holds: bool
    """Whether the present value fulfils it."""
    text: str
    """The rule in words: `it must be positive`."""


@dataclasses.dataclass(kw_only=True)
class Settings:
    """Base of all groups of settings.

    Raises:
        PriorZeroError: on construction and by `validate`, for a value of another type or against a
            rule; on assignment, for a name that does not exist.
    """

    def __post_init__(self) -> None:
        self.validate()

    def __setattr__(self, name: str, value: Any) -> None:
        known = _types(type(self))
        if name not in known:
            raise PriorZeroError(_unknown(f"{type(self).__name__}.{name}", name, known))
        if type(value) is int and _real(known[name]):
            value = float(value)
        object.__setattr__(self, name, value)

    def rules(self) -> Iterator[Rule]:
        """The conditions on this group's own values; those of nested groups are asked of them."""
        yield from ()

    def validate(self, path: str = "") -> None:
        """Check all types, then all rules, of this group and the nested ones.

        Args:
            path: what stands before the names in a message, such as `policy.`.

        Raises:
            PriorZeroError: names every fault, not the first one only.
        """
        # A rule may calculate with its values, so that types come first.
        wrong = list(self._type_faults(path))
        if wrong:
            raise PriorZeroError("\n".join(wrong))
        _refuse(self._broken_rules(path))

    def as_dict(self) -> dict[str, Any]:
        """Nested dictionaries with copies of all values."""
        return dataclasses.asdict(self)

    def _groups(self) -> Iterator[tuple[str, Settings]]:
        for name in _types(type(self)):
            value = getattr(self, name)
            if isinstance(value, Settings):
                yield name, value

    def _type_faults(self, path: str) -> Iterator[str]:
        for name, kind in _types(type(self)).items():
            value, where = getattr(self, name), path + name
            if not _fits(value, kind):
                yield _wrong_type(where, value, kind, _defaults(type(self))[name])
            elif isinstance(value, Settings):
                yield from value._type_faults(where + ".")

    def _broken_rules(self, path: str) -> Iterator[str]:
        for rule in self.rules():
            if not rule.holds:
                value = functools.reduce(getattr, rule.name.split("."), self)
                yield _broken(path + rule.name, value, rule.text)
        for name, group in self._groups():
            yield from group._broken_rules(f"{path}{name}.")


# ---- rules that many groups need -----------------------------------------------------------------


def positive(group: Settings, *names: str) -> Iterator[Rule]:
    """Each of these must be greater than zero."""
    for name in names:
        yield Rule(name, getattr(group, name) > 0, "it must be positive")


def not_negative(group: Settings, *names: str) -> Iterator[Rule]:
    """Each of these must be zero or more."""
    for name in names:
        yield Rule(name, getattr(group, name) >= 0, "it must not be negative")


def in_unit_interval(group: Settings, *names: str) -> Iterator[Rule]:
    """Each of these must lie in [0, 1]."""
    for name in names:
        yield Rule(name, 0.0 <= getattr(group, name) <= 1.0, "it must lie in [0, 1]")


def one_of(group: Settings, name: str, *choices: str) -> Iterator[Rule]:
    """The setting must be one of `choices`."""
    *most, last = choices
    words = f"{', '.join(most)} or {last}" if most else last
    yield Rule(name, getattr(group, name) in choices, f"it must be {words}")


def a_file_of(group: Settings, name: str, package: str) -> Iterator[Rule]:
    """The setting must name a file of a plug-in folder."""
    known = plugins.names(package)
    folder = package.replace(".", "/")
    yield Rule(name, getattr(group, name) in known, f"{folder} holds {', '.join(known)}")


# ---- layers over settings ------------------------------------------------------------------------

Group = typing.TypeVar("Group", bound=Settings)


def overlay(settings: Group, *layers: Mapping[str, Any], path: str = "") -> Group:
    """A copy of `settings` with each layer laid over it; later ones win.

    Types are checked at once, rules are not: several values may have to change together, after
    which `validate` is called.

    Args:
        layers: nested dictionaries with the names of the settings.
        path: what stands before the names in a message.

    Raises:
        PriorZeroError: a layer names a setting that does not exist, or gives a value of another
            type.
    """
    result = copy.deepcopy(settings)
    known = _types(type(result))

    for name, value in merge(*layers).items():
        where = f"{path}{name}"
        if name not in known:
            raise PriorZeroError(_unknown(where, name, known))
        if isinstance(value, Mapping) and _is_group(known[name]):
            value = overlay(getattr(result, name), value, path=where + ".")
        elif not _fits(value, known[name]):
            default = _defaults(type(result))[name]
            raise PriorZeroError(_wrong_type(where, value, known[name], default))
        setattr(result, name, value)
    return result


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


def parse_assignment(text: str) -> dict[str, Any]:
    """`a.b.c=value` of the command line -> nested dictionary; the value is read as JSON, else as a
    string.

    Raises:
        PriorZeroError: there is no `=`.
    """
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


def require(rules: Mapping[str, tuple[Any, bool, str]]) -> None:
    """Check `name -> (value, holds, rule)` and report all that fail at once.

    Raises:
        PriorZeroError: naming value, rule and setting of each failure.
    """
    _refuse(_broken(name, value, rule) for name, (value, holds, rule) in rules.items() if not holds)


# ---- helpers -------------------------------------------------------------------------------------


@functools.cache
def _types(group: type[Settings]) -> dict[str, Any]:
    """Field name -> type."""
    hints = typing.get_type_hints(group)
    return {field.name: hints[field.name] for field in dataclasses.fields(group)}


@functools.cache
def _defaults(group: type[Settings]) -> dict[str, Any]:
    """Field name -> default."""
    return {
        field.name: field.default
        if field.default_factory is dataclasses.MISSING
        else field.default_factory()
        for field in dataclasses.fields(group)
    }


def _is_group(kind: Any) -> bool:
    """Whether a field of this type is a nested group."""
    return isinstance(kind, type) and issubclass(kind, Settings)


def _real(kind: Any) -> bool:
    """Whether a number in a field of this type is a float: 8 is written down as 8.0."""
    return kind is float or kind == float | str


def _fits(value: Any, kind: Any) -> bool:
    """Whether `value` is of the type `kind`; integers pass as floats, booleans never as numbers."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, one) for one in kind.__args__)
    if typing.get_origin(kind) is list:
        (item,) = typing.get_args(kind)
        return isinstance(value, list) and all(_fits(one, item) for one in value)
    if kind is float:
        return type(value) in (int, float)
    if kind is int:
        return type(value) is int
    return isinstance(value, kind)


def _wrong_type(where: str, value: Any, kind: Any, default: Any) -> str:
    if _is_group(kind):
        return f"setting {where!r} is a group of settings, not the value {value!r}"
    if isinstance(kind, types.UnionType):
        names = ["None" if one is types.NoneType else one.__name__ for one in kind.__args__]
        wanted = f"{', '.join(names[:-1])} or {names[-1]}"
    else:
        wanted = f"like {default!r} ({type(default).__name__})"
    return f"setting {where!r} is {value!r} ({type(value).__name__}); it must be {wanted}"


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else f"known here: {', '.join(known)}"
    return f"setting {where!r} does not exist; {hint}"


def _broken(name: str, value: Any, rule: str) -> str:
    return f"{name} is {value!r}, but {rule}"


def _refuse(broken: Iterable[str]) -> None:
    faults = list(broken)
    if faults:
        raise PriorZeroError("these settings are impossible:\n  " + "\n  ".join(faults))
