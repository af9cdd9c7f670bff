"""A setting's default stands once: in `priorzero/settings`."""

from __future__ import annotations

import ast
import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.record import Settings

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [
    path
    for path in sorted([*ROOT.glob("*.py"), *(ROOT / "priorzero").rglob("*.py")])
    if ROOT / "priorzero" / "settings" not in path.parents
]
# Names of settings that mean something else elsewhere: a cache's capacity, a sample's weight.
ORDINARY = {
    "capacity",
    "device",
    "overflow",
    "policy",
    "ray_address",  # the schedule's is that of collectors too
    "reward",
    "seed",
    "temperature",
    "value",
    "weight",
}


def settings_of(group: Settings) -> Iterator[tuple[str, object]]:
    """Name and default of every setting, those of nested groups included."""
    for field in dataclasses.fields(group):
        value = getattr(group, field.name)
        if isinstance(value, Settings):
            yield from settings_of(value)
        else:
            yield field.name, value


def of_classes(source: str) -> Iterator[tuple[int, str, object]]:
    """Line, name and value of the literal defaults that classes state: attributes (fields of
    dataclasses too) and entries of a `config` dictionary.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                    yield from literal(item.target.id, item.value)
                elif isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name):
                    yield from literal(item.targets[0].id, item.value)
                    yield from entries(item.value)


def of_functions(source: str) -> Iterator[tuple[int, str, object]]:
    """The same of the defaults of arguments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = node.args
            placed = [*arguments.posonlyargs, *arguments.args]
            with_default = placed[len(placed) - len(arguments.defaults) :]
            for argument, default in [
                *zip(with_default, arguments.defaults, strict=True),
                *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
            ]:
                yield from literal(argument.arg, default)


def entries(node: ast.expr) -> Iterator[tuple[int, str, object]]:
    """Those of `dict(name=...)` and `{"name": ...}`, nested ones too."""
    for part in ast.walk(node):
        if isinstance(part, ast.Call) and getattr(part.func, "id", "") == "dict":
            for keyword in part.keywords:
                yield from literal(keyword.arg or "", keyword.value)
        elif isinstance(part, ast.Dict):
            for key, value in zip(part.keys, part.values, strict=True):
                if isinstance(key, ast.Constant):
                    yield from literal(str(key.value), value)


def literal(name: str, node: ast.expr | None) -> Iterator[tuple[int, str, object]]:
    try:
        value = ast.literal_eval(node) if node is not None else None
    except ValueError:
        return
    if value is not None:
        yield node.lineno, name, value


def second_defaults(source: str) -> list[str]:
    """`line: name = value` of each setting that a class states again, or a function differently."""
    owned = defaultdict(list)
    for name, default in settings_of(ExperimentSettings()):
        if name not in ORDINARY:
            owned[name].append(default)
    found = [one for one in of_classes(source) if one[1] in owned]
    found += [
        one for one in of_functions(source) if one[1] in owned and one[2] not in owned[one[1]]
    ]
    return [f"{line}: {name} = {value!r}, not {owned[name]}" for line, name, value in found]


def test_the_search_for_second_defaults_finds_them():
    source = """
@dataclass
class Search:
    num_simulations: int = 25
    colour: str = "red"
    td_steps: int

class Policy:
    config = dict(discount_factor=0.9, inner={"batch_size": 3})

def play(episodes, learning_rate=1e-2, *, td_steps=None, use_cot=False): ...
"""
    found = [line.split(" = ")[0] for line in second_defaults(source)]
    assert sorted(found) == [
        "11: learning_rate",
        "4: num_simulations",
        "9: batch_size",
        "9: discount_factor",
    ]


@pytest.mark.parametrize("name", [str(path.relative_to(ROOT)) for path in SOURCES])
def test_no_module_states_a_default_again(name):
    found = second_defaults((ROOT / name).read_text(encoding="utf-8"))
    assert found == []
