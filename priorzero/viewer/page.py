"""Puts the page together: what `assets/` holds, the plotting library, and the runs' data, all in
one file. Data and library are compressed; the browser unpacks an episode when somebody opens it,
and the library when a plot comes into view.
"""

from __future__ import annotations

import base64
import html
import importlib.util
import json
import zlib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from priorzero.types import PriorZeroError
from priorzero.viewer.runs import ShownRun

_SCRIPTS = ("core.js", "curves.js", "episodes.js", "tree.js", "findings.js", "settings.js")
_LEVEL = 6  # of zlib: the last per cent of size is not worth the wait


def make_page(runs: Sequence[ShownRun], stamp: str | None = None) -> str:
    """The page as HTML.

    Args:
        runs: one, or two to stand beside each other.
        stamp: of the data, where a server shows a run that goes on: the page asks whether there is
            a newer one.

    Raises:
        PriorZeroError: the plotting library is not installed.
    """
    summary = {"runs": [run.summary for run in runs], "stamp": stamp}
    data = [_packed("summary", _as_json(summary)), _packed("plotly", plotly())]
    for place, run in enumerate(runs):
        data += [
            _packed(f"episode-{place}-{number}", _as_json(steps))
            for number, steps in enumerate(run.episodes)
        ]

    parts = {
        "TITLE": html.escape(" and ".join(run.summary["name"] for run in runs)),
        "STYLE": _asset("page.css"),
        "DATA": "\n".join(data),
        "SCRIPT": "\n".join(_asset(name) for name in _SCRIPTS),
    }
    page = _asset("page.html")
    for name, text in parts.items():
        page = page.replace(f"<!--{name}-->", text)
    return page


def plotly() -> str:
    """plotly.js (MIT licence, which stands at its beginning), as the package `plotly` ships it.

    Raises:
        PriorZeroError: it is not installed.
    """
    # Found, not imported: the package would import a second's worth of modules for one file.
    spec = importlib.util.find_spec("plotly")
    for folder in spec.submodule_search_locations or () if spec else ():
        path = Path(folder) / "package_data" / "plotly.min.js"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    raise PriorZeroError(
        "the page's plots need the package plotly, which is not installed here; any mode of "
        "./run_priorzero_orz.sh installs what requirements/ names"
    )


def _asset(name: str) -> str:
    return (resources.files("priorzero.viewer") / "assets" / name).read_text(encoding="utf-8")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _packed(name: str, text: str) -> str:
    """A text as an element that the browser does not run, compressed (zlib) in base64."""
    packed = zlib.compress(text.encode("utf-8", "replace"), _LEVEL)
    return (
        f'<script type="text/plain" id="data-{name}">{base64.b64encode(packed).decode()}</script>'
    )
