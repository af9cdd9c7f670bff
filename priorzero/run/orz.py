"""Whether Open-Reasoner-Zero lies on the Python path. Nothing trains with it yet."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

TRAINER = "RayPPOTrainer"


def orz_status() -> tuple[bool, str]:
    """Whether a clone of Open-Reasoner-Zero is found, and where or why not.

    The trainer's class is looked for in its source: a package named `orz` proves nothing (PyPI has
    an unrelated one, and any folder of that name imports), and importing the real one takes Ray,
    DeepSpeed and vLLM, in versions that no longer fit together.

    Returns:
        found: the file orz/ppo/trainer.py defines the trainer. reason: one line for a user.
    """
    try:
        spec = importlib.util.find_spec("orz")
    except ValueError:  # a module of that name that was made by hand
        spec = None
    if spec is None:
        return False, "not on PYTHONPATH"

    for folder in spec.submodule_search_locations or []:
        source = Path(folder) / "ppo" / "trainer.py"
        if source.is_file() and _defines(source, TRAINER):
            return True, str(source.parent)
    place = ", ".join(spec.submodule_search_locations or [str(spec.origin)])
    return False, f"{place} is not Open-Reasoner-Zero: it has no ppo/trainer.py with {TRAINER}"


def _defines(source: Path, name: str) -> bool:
    """Whether a Python file defines a class of this name at its top level."""
    try:
        tree = ast.parse(source.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.ClassDef) and node.name == name for node in tree.body)


ORZ_AVAILABLE, ORZ_REASON = orz_status()
