"""Weights & Biases: the same names as in TensorBoard, over the same axis.

Without network the run is written to `wandb/offline-run-…` in the run's folder, for `wandb sync`.
"""

from __future__ import annotations

import html
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from priorzero.settings.metrics import MetricsSettings
from priorzero.types import PriorZeroError

logger = logging.getLogger(__name__)

# Seconds that a server which does not answer may cost at the start, and at the end.
START_S, END_S = 30.0, 60.0


class WandB:
    """One run of W&B.

    Args:
        folder: the run's folder; its name is the run's name. A resumed run goes on under its id.
        settings: `wandb` must not be "off".

    Raises:
        PriorZeroError: "online" without being logged in.
    """

    name = "W&B"

    def __init__(self, folder: Path, settings: MetricsSettings) -> None:
        import wandb  # heavy; only where it is asked for

        self._wandb = wandb
        self._folder = folder
        self._project = settings.wandb_project
        mode = self._mode(settings.wandb)
        try:
            self._run = self._start(mode)
        except Exception as error:  # of any kind: wandb's own differ by version
            if mode == "offline":
                raise
            logger.warning(
                "W&B could not be reached (%s: %s); this run is written offline, to %s: see "
                "`wandb sync`",
                type(error).__name__,
                error,
                folder / "wandb",
            )
            # Its service still holds the id for the start that failed.
            wandb.teardown()
            mode = "offline"
            self._run = self._start(mode)

        # Evaluations may come later than the steps they are of: the axis is a value, not wandb's
        # own step, which must not go back.
        self._run.define_metric("env_steps")
        self._run.define_metric("*", step_metric="env_steps")
        place = self._run.url if mode == "online" else folder / "wandb"
        logger.info("W&B:             %s, in %s", mode, place)

    def _mode(self, asked: str) -> str:
        """online or offline; nothing is asked on the terminal."""
        if asked == "auto":
            asked = os.environ.get("WANDB_MODE", asked)
        if asked not in ("auto", "online"):
            return asked

        from wandb.sdk.lib import wbauth

        host = self._wandb.setup().settings.base_url
        known = wbauth.authenticate_session(
            host=host, source="priorzero", prompt=False, update_session=False
        )
        if known is None and asked == "online":
            raise PriorZeroError(
                f"W&B is to be online, and nobody is logged in to {host}; run `wandb login`, set "
                "WANDB_API_KEY, or take --wandb offline"
            )
        return "online" if known is not None else "offline"

    def _start(self, mode: str) -> Any:
        wandb = self._wandb
        place = self._folder / "wandb"
        place.mkdir(parents=True, exist_ok=True)
        known = place / "run_id"
        if not known.exists():
            known.write_text(uuid4().hex[:8], encoding="utf-8")

        return wandb.init(
            project=self._project,
            name=self._folder.name,
            id=known.read_text(encoding="utf-8"),
            resume=None if mode == "offline" else "allow",
            dir=str(self._folder),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(
                console="off",  # the log is ours
                silent=True,
                init_timeout=START_S,
                finish_timeout=END_S,
            ),
        )

    def settings(self, config: Mapping[str, Any]) -> None:
        """See `Board.settings`."""
        self._run.config.update(dict(config), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Board.scalars`."""
        self._run.log({**values, "env_steps": step})

    def text(self, tag: str, text: str, step: int) -> None:
        """See `Board.text`."""
        page = self._wandb.Html(f"<pre>{html.escape(text)}</pre>", inject=False)
        self._run.log({tag: page, "env_steps": step})

    def flush(self) -> None:
        """See `Board.flush`; wandb sends by itself."""

    def close(self) -> None:
        """See `Board.close`.

        wandb's service writes its last records a moment later: before the process exits, or at
        `wandb.teardown()`, which would end the caller's own runs too and is therefore not ours.
        """
        self._run.finish()


def open_wandb(folder: Path, settings: MetricsSettings) -> list[WandB]:
    """The board that the settings ask for, or none; see `WandB`.

    A fault that the user cannot mend here is told, and the run goes on without W&B.
    """
    if settings.wandb == "off":
        return []
    try:
        return [WandB(folder, settings)]
    except PriorZeroError:
        raise
    except Exception as error:  # of any kind: no board is worth a run
        logger.error(
            "W&B could not be started (%s: %s); the run goes on without it",
            type(error).__name__,
            error,
        )
        return []
