"""Boards: what TensorBoard, W&B and the terminal really hold after a run wrote to them."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from rich.console import Console

from priorzero.run.boards import wandb as wandb_board
from priorzero.run.boards.live import LiveTable
from priorzero.run.boards.tensorboard import HPARAMS, LAYOUT, RESULTS
from priorzero.run.boards.wandb import open_wandb
from priorzero.run.metrics import MetricsWriter
from priorzero.settings.metrics import MetricsSettings
from priorzero.types import PriorZeroError
from priorzero_config import HybridTrainingConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config():
    return HybridTrainingConfig(env_id="tw-simple", seed=3).as_dict()


# ---- TensorBoard ---------------------------------------------------------------------------------


def _charts() -> list[str]:
    return [curve for charts in LAYOUT.values() for each in charts.values() for curve in each]


def test_every_curve_of_layout_and_table_is_explained():
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:collect|prior|wm|llm|eval|perf)/[\w*/]+)`", page)
    known = [name.replace("*", "world_model") for name in names]
    assert [c for c in _charts() if not any(re.search(c, name) for name in known)] == []
    explained = [re.sub(r"^eval/\w+/", "eval/world_model/", name) for name in RESULTS]
    assert set(explained) <= set(known)


def test_tensorboard_reads_layout_settings_and_results(tmp_path, config):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.plugins.hparams import plugin_data_pb2

    writer = MetricsWriter(tmp_path / "log")
    writer.settings(config)
    writer.scalars("wm", {"wm_loss": 4.5}, 10)
    writer.close()
    assert [path.name for path in (tmp_path / "log").iterdir() if path.is_dir()] == []

    read = EventAccumulator(str(tmp_path / "log")).Reload()
    assert [(e.step, e.value) for e in read.Scalars("wm/wm_loss")] == [(10, 4.5)]

    layout = layout_pb2.Layout()
    layout.ParseFromString(read.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    drawn = [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag]
    assert drawn == _charts()

    told = {}
    for tag, content in read.PluginTagToContent("hparams").items():
        told[tag] = plugin_data_pb2.HParamsPluginData()
        told[tag].ParseFromString(content)
    experiment = told["_hparams_/experiment"].experiment
    assert [metric.name.tag for metric in experiment.metric_infos] == list(RESULTS)
    chosen = told["_hparams_/session_start_info"].session_start_info.hparams
    assert set(chosen) == {path.split(".", 1)[1] for path in HPARAMS}  # none is misspelt
    assert chosen["env.env_id"].string_value == "tw-simple" and chosen["seed"].number_value == 3
    assert told["_hparams_/session_end_info"].session_end_info.status == 1  # STATUS_SUCCESS


# ---- W&B -----------------------------------------------------------------------------------------


@pytest.fixture
def no_account(tmp_path, monkeypatch):
    """Nobody is logged in, and no server answers."""
    wandb = pytest.importorskip("wandb")
    for name in [n for n in os.environ if n.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    wandb.teardown()
    yield
    wandb.teardown()


def _records(folder: Path) -> bytes:
    """What lies in W&B's files once its service is gone, as at the end of a process.

    The end of a run is only posted to the service, which writes its last block afterwards: a file
    read right after `close` may hold its 7-byte header alone.
    """
    pytest.importorskip("wandb").teardown()
    files = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
    assert files
    return b"".join(path.read_bytes() for path in files)


def test_wandb_offline_holds_the_names_of_tensorboard(tmp_path, no_account, config):
    folder = tmp_path / "my-run"
    for step in (10, 20):  # the second one is its resume
        boards = open_wandb(folder, MetricsSettings(wandb="auto", wandb_project="zork"))
        writer = MetricsWriter(folder / "log", boards)
        writer.settings(config)
        writer.scalars("wm", {"wm_loss": 4.5, "lost": float("nan")}, step)
        writer.scalars("eval", {"llm/return_mean": 2.0}, step - 5)  # an evaluation comes late
        writer.text("prior/sample", "look <b>", step)
        writer.close()
        assert writer.failures == 0

    held = _records(folder)
    for name in (b"wm/wm_loss", b"eval/llm/return_mean", b"env_steps", b"num_simulations", b"zork"):
        assert name in held, name
    assert b"wm/lost" not in held
    # MetricRecord: every name (glob_name "*") has the axis (step_metric) env_steps.
    assert b"\x12\x01*\x22\x09env_steps" in held
    runs = list(folder.glob("wandb/offline-run-*"))
    assert len({path.name.rsplit("-", 1)[1] for path in runs}) == 1  # one run for W&B
    [page, *_] = folder.glob("wandb/offline-run-*/files/media/html/prior/*.html")
    assert "look &lt;b&gt;" in page.read_text()


def test_wandb_online_without_an_account_or_a_network(tmp_path, no_account, monkeypatch, caplog):
    online = MetricsSettings(wandb="online")
    with pytest.raises(PriorZeroError, match="wandb login.*--wandb offline"):
        open_wandb(tmp_path / "run", online)

    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(PriorZeroError, match="wandb login"):
        open_wandb(tmp_path / "run", MetricsSettings(wandb="auto"))

    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr(wandb_board, "START_S", 2.0)
    started = time.monotonic()
    with caplog.at_level(logging.INFO, logger="priorzero"):
        [board] = open_wandb(tmp_path / "run", online)
    assert "written offline" in caplog.text
    board.scalars({"wm/wm_loss": 1.0}, 5)
    board.close()
    assert time.monotonic() - started < 30
    assert b"wm/wm_loss" in _records(tmp_path / "run")


class Broken:
    """A board whose server went away."""

    name = "a broken board"

    def __getattr__(self, method):
        def fail(*_):
            raise RuntimeError("gone")

        return fail


def test_a_broken_board_is_told_once_and_counted(tmp_path, caplog):
    writer = MetricsWriter(tmp_path, [board := Broken()])
    for step in range(3):
        writer.scalars("perf", {"memory_gb": 1.0}, step)
    writer.flush()
    assert writer.failures == 4
    assert caplog.text.count("metrics on a broken board could not be written") == 1
    writer.remove(board)
    assert writer.failures == 5
    writer.close()
    assert writer.failures == 5
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]


def test_impossible_settings_are_refused():
    for values, rule in ((dict(wandb="yes"), "wandb"), (dict(wandb_project=" "), "wandb_project")):
        with pytest.raises(PriorZeroError, match=f"metrics.{rule}"):
            HybridTrainingConfig(overrides=dict(metrics=values))


# ---- the live table ------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [120, 60])
def test_the_live_table_shows_what_was_told_last(width):
    console = Console(file=io.StringIO(), width=width)
    table = LiveTable("my-run", 3, 10, console)
    table.scalars({"collect/episode_return_mean": 1.0, "prior/kl_from_wm": 0.25}, 100)
    table.scalars({"collect/episode_return_mean": 7.5, "perf/seconds_collect": 12.3}, 140)
    table.scalars({"eval/llm/return_mean": 2.0, "perf/llm_cache_hit_rate": 0.7}, 120)
    table.advance()
    console.print(table)

    shown = console.file.getvalue()
    rows = [re.sub(r"\s+", " ", line) for line in shown.splitlines()]
    for words in ("training 7.50", "eval llm 2.00", "KL from the world model 0.250"):
        assert any(words in row for row in rows), (words, shown)
    for words in ("collect 12.3", "LLM scores 70%", "4/10 iterations", "140 steps"):
        assert any(words in row for row in rows), (words, shown)
    assert "Loss" not in shown  # nothing has trained yet


# What a run does on a terminal: log, numbers, iterations.
CODE = """
import logging, pathlib, sys
from priorzero.run.boards.live import terminal_progress
from priorzero.run.logs import setup_logging
from priorzero.run.metrics import MetricsWriter
setup_logging(None)
metrics = MetricsWriter(pathlib.Path(sys.argv[1]))
with terminal_progress(metrics, "my-run", 0, 2, sys.argv[2] == "table") as advance:
    for step in range(2):
        metrics.scalars("wm", {"wm_loss": 4.25}, step)
        logging.getLogger("priorzero").info("[Iter %d] Collecting data...", step)
        advance()
logging.getLogger("priorzero").info("Done")
assert metrics.failures == 0
metrics.close()
"""


def _on_terminal(tmp_path, kind: str) -> str:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), kind],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stderr=theirs,
        timeout=100,
        check=False,
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux: the end of a terminal nobody holds
            break
        if not part:
            break
        shown += part
    os.close(ours)
    assert done.returncode == 0, shown
    return shown.decode()


def _words(shown: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)


def test_on_a_terminal_the_log_stays_whole_above_the_table(tmp_path):
    shown = _on_terminal(tmp_path, "table")
    # The table's lines are erased, the log's takes their place, the table is drawn below it.
    assert "\x1b[2K[Iter 1] Collecting data..." in shown
    lines = [line.strip() for line in _words(shown).replace("\r", "\n").splitlines()]
    lines = [line for line in lines if line]
    assert lines.count("[Iter 0] Collecting data...") == 1
    assert lines.count("[Iter 1] Collecting data...") == 1
    table = [i for i, line in enumerate(lines) if "2/2 iterations" in line]
    assert any(re.match(r"world model\s+4\.2500", line) for line in lines)
    assert table and lines[-1] == "Done"


def test_a_bar_where_no_table_is_wanted(tmp_path):
    shown = _words(_on_terminal(tmp_path, "bar"))
    assert "2/2" in shown and "world model" not in shown


def test_plain_lines_without_a_terminal(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path), "table"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    assert done.stderr == "[Iter 0] Collecting data...\n[Iter 1] Collecting data...\nDone\n"
