"""Alternatives that are files: a module in a plug-in folder is found by its file name.

The folders are `priorzero/search/root_policies`, `priorzero/loop/schedules`,
`priorzero/llm/update/trainers`, `priorzero/llm/update/objectives` and `priorzero/games/kinds`. A
setting names the file, so that a new root policy, schedule, trainer, objective or kind of game is
one new file and no other change.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from types import ModuleType

from priorzero.types import PriorZeroError


def names(package: str) -> tuple[str, ...]:
    """What a plug-in folder offers, sorted; its modules are not imported.

    Args:
        package: dotted name of the folder. Modules that start with an underscore do not count.
    """
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations is not None, package
    found = pkgutil.iter_modules(spec.submodule_search_locations)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def load(package: str, name: str) -> ModuleType:
    """Import one of them.

    Args:
        package: dotted name of the folder. name: the file's name without `.py`.

    Raises:
        PriorZeroError: there is no such file; the message names those there are.
    """
    known = names(package)
    if name not in known:
        folder = package.replace(".", "/")
        raise PriorZeroError(f"{folder} has no {name!r}; there are {', '.join(known) or 'none'}")
    return importlib.import_module(f"{package}.{name}")
