"""Whether Open-Reasoner-Zero can be used here, and where its source lies.

Nothing of it is imported to find out: that takes seconds, and mends of other packages
(`priorzero/llm/update/orz/mends.py`) which a run without it should not see.
"""

from __future__ import annotations

import ast
import importlib.util
import os
from pathlib import Path

TRAINER = "RayPPOTrainer"
HOME = "ORZ_HOME"
NEEDED = ("ray", "deepspeed", "omegaconf", "loguru", "peft", "tqdm", "tensorboard")
INSTALL = "pip install --no-deps --no-build-isolation -r requirements/orz.lock"


def find_source() -> tuple[Path | None, str]:
    """The folder that has to be on the Python path for `import orz`, or None; and where it is or
    why not, in a line for a user.

    `$ORZ_HOME` is looked into first, then the path. The trainer's class is looked for in the
    source: a package named `orz` proves nothing (PyPI has an unrelated one, an ordinary
    installation of the repository leaves all but an empty file out, and any folder of that name
    imports).
    """
    home = os.environ.get(HOME)
    if home:
        places, told = [Path(home).expanduser() / "orz"], f"{HOME}={home}"
    else:
        places, told = _on_the_path()
        if not places:
            return None, told

    for place in places:
        source = place / "ppo" / "trainer.py"
        if source.is_file() and _defines(source, TRAINER):
            return place.parent.resolve(), str(source.parent)
    return None, f"{told} is not Open-Reasoner-Zero: it has no ppo/trainer.py with {TRAINER}"


def orz_status() -> tuple[bool, str]:
    """Whether Open-Reasoner-Zero can be used.

    Returns:
        found: its source is there and so are the packages it needs. reason: where, or what is
            missing, in a line for a user.
    """
    folder, reason = find_source()
    if folder is None:
        return False, reason
    missing = [name for name in NEEDED if _absent(name)]
    if missing:
        return False, f"{reason} is there, {', '.join(missing)} not installed: {INSTALL}"
    return True, reason


def _on_the_path() -> tuple[list[Path], str]:
    """Folders named orz on the Python path, and a word for them."""
    try:
        spec = importlib.util.find_spec("orz")
    except ValueError:  # a module of that name that was made by hand
        spec = None
    if spec is None:
        return [], f"not on PYTHONPATH, and {HOME} is not set"
    folders = [Path(folder) for folder in spec.submodule_search_locations or []]
    return folders or [Path(str(spec.origin))], ", ".join(map(str, folders)) or str(spec.origin)


def _absent(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is None
    except ValueError:
        return True


def _defines(source: Path, name: str) -> bool:
    """Whether a Python file defines a class of this name at its top level."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


ORZ_AVAILABLE, ORZ_REASON = orz_status()
