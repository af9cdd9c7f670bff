"""The terminal: a table below the log that shows where a run stands, while it trains."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from priorzero.run.metrics import MetricsWriter
from priorzero.settings.evaluation import MODES

_STAGES = ("collect", "train_wm", "train_llm", "evaluate", "save")
_CACHES = {
    "valid actions": "perf/valid_action_hit_rate",
    "texts": "perf/encoder_hit_rate",
    "LLM scores": "perf/llm_cache_hit_rate",
}
_RETURNS = {
    "training": "collect/episode_return_mean",
    **{f"eval {mode}": f"eval/{mode}/return_mean" for mode in MODES},
}
_PRIOR = {
    "KL from the world model": "prior/kl_from_wm",
    "overruled by the search": "prior/overridden",
    "the LLM's share": "prior/weight",
}
_LOSSES = {"world model": "wm/wm_loss", "LLM, SFT": "llm/sft_loss", "LLM, RFT": "llm/rft_loss"}


class LiveTable:
    """Return, prior effect, losses, stage times and cache hits, each as it was told last.

    Args:
        title: names the run.
        done, total: iterations at the start, and of the run.
        console: where it is drawn.
    """

    name = "the live table"

    def __init__(self, title: str, done: int, total: int, console: Console) -> None:
        self._latest: dict[str, float] = {}
        self._step = 0
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("iterations"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[steps]} steps"),
            console=console,
        )
        self._task = self._progress.add_task(title, completed=done, total=total, steps=0)
        self._live = Live(self, console=console, refresh_per_second=2)
        self._handlers: list[logging.StreamHandler] = []  # those that were led past the table
        self._terminal = sys.stderr

    def __rich__(self) -> Group:
        """What is drawn; called by rich's thread as often as it draws."""
        tables = [
            self._column("Return", _RETURNS, "{:.2f}"),
            self._column("Prior", _PRIOR, "{:.3f}"),
            self._column("Loss", _LOSSES, "{:.4f}"),
            self._column("Seconds", {s: f"perf/seconds_{s}" for s in _STAGES}, "{:.1f}"),
            self._column("Cache hits", _CACHES, "{:.0%}"),
        ]
        known = [table for table in tables if table.row_count]
        return Group(Columns(known, padding=(0, 4)), self._progress)

    def _column(self, title: str, names: Mapping[str, str], form: str) -> Table:
        """The values that are known so far."""
        latest = self._latest  # a new dictionary at every write: no change while this one is read
        column = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        column.add_column(title, no_wrap=True)
        column.add_column(no_wrap=True, justify="right")
        for label, name in names.items():
            if name in latest:
                column.add_row(label, form.format(latest[name]))
        return column

    def start(self) -> None:
        """Draw from now on, below the log.

        The log's lines pass through rich's stand-in for stderr meanwhile; they would be written
        into the table otherwise.
        """
        self._terminal = sys.stderr
        self._live.start()
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is self._terminal:
                handler.setStream(sys.stderr)
                self._handlers.append(handler)

    def advance(self) -> None:
        """An iteration is done."""
        self._progress.advance(self._task)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Board.scalars`."""
        self._latest = {**self._latest, **values}
        self._step = max(self._step, step)
        self._progress.update(self._task, steps=self._step)

    def settings(self, config: Mapping[str, Any]) -> None:
        """See `Board.settings`; the banner in the log has told them."""

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Board.text`; a prompt has no place here."""

    def flush(self) -> None:
        """See `Board.flush`; it is drawn by a clock."""

    def close(self) -> None:
        """See `Board.close`: the table stays as it is, the log goes on below it."""
        for handler in self._handlers:
            handler.setStream(self._terminal)
        self._live.stop()


@contextmanager
def terminal_progress(
    metrics: MetricsWriter, title: str, done: int, total: int, live: bool
) -> Iterator[Callable[[], Any]]:
    """Show how far the run is while the context lasts, on a terminal only.

    Args:
        metrics: whose numbers the table shows.
        title, done, total: see `LiveTable`.
        live: the table; else a bar.

    Returns:
        what to call after each iteration.
    """
    terminal = sys.stderr.isatty()
    if not (terminal and live):
        bar = tqdm(total=total, initial=done, unit="iter", disable=not terminal)
        with logging_redirect_tqdm(), bar:
            yield bar.update
        return

    table = LiveTable(title, done, total, Console(stderr=True))
    metrics.add(table)
    try:
        table.start()
        yield table.advance
    finally:
        metrics.remove(table)
