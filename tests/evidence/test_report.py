"""The prior report from end to end, with a tiny LLM on tw-simple."""

from __future__ import annotations

import json
import logging
import re
import shlex
from pathlib import Path

import pytest

from priorzero.evidence.metrics import REDUCTIONS
from priorzero.evidence.page import page
from priorzero.prior_report import main, parse_arguments, plan_from
from priorzero.types import PriorZeroError

ROOT = Path(__file__).resolve().parents[2]
TEMPERATURES = [0.5, 1.0]
VARIANTS = ["bare", "history+list"]


@pytest.fixture(scope="module")
def folder(tiny_llm, tmp_path_factory) -> Path:
    """What the command wrote."""
    import asyncio

    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRIORZERO_CACHE", str(tmp_path_factory.mktemp("cache")))
        handlers = logging.getLogger().handlers[:]
        command = (
            f"--llm {tiny_llm} --games tw-simple tw-coin:level=1,seed=1 --out {folder} --steps 3 "
            "--variants bare history+list --temperatures 0.5 1 --episodes 2 --play-steps 3 "
            "--play-reductions sum pmi --max-prompt-tokens 700 --device cpu --commit abc"
        )
        assert asyncio.run(main(shlex.split(command))) == 0
        logging.getLogger().handlers[:] = handlers
    return folder


@pytest.fixture(scope="module")
def report(folder) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_everything_is_measured(report):
    games = ["tw-simple", "tw-coin:level=1,seed=1"]
    assert [g["game"] for g in report["games"]] == games
    simple = report["games"][0]
    assert (simple["walked"], simple["decisions"], simple["missing"]) == (3, 3, 0)
    assert simple["family"] == "textworld" and not simple["judging_only"]

    told = [(r["game"], r["variant"], r["reduction"], r["temperature"]) for r in report["prior"]]
    wanted = {
        (g, v, r, t) for g in games for v in VARIANTS for r in REDUCTIONS for t in TEMPERATURES
    }
    assert len(told) == len(wanted) and set(told) == wanted
    assert {(r["variant"], r["reduction"]) for r in report["reliability"]} == {
        (v, r) for v in VARIANTS for r in REDUCTIONS
    }
    assert all(0 <= r["mass_outside"] <= 1 for r in report["mass"])
    assert len(report["mass"]) == len(games) * len(VARIANTS)


def test_a_game_is_walked_once(tiny_llm, tmp_path, monkeypatch):
    import asyncio

    from priorzero.evidence import walk

    monkeypatch.setenv("PRIORZERO_CACHE", str(tmp_path / "cache"))
    handlers = logging.getLogger().handlers[:]

    def walked(name: str, steps: int) -> dict:
        command = f"--llm {tiny_llm} --games tw-coin:level=1,seed=1 --variants bare --episodes 0 "
        command += f"--temperatures 1 --device cpu --commit abc --steps {steps}"
        assert asyncio.run(main(shlex.split(f"{command} --out {tmp_path / name}"))) == 0
        logging.getLogger().handlers[:] = handlers
        return json.loads((tmp_path / name / "report.json").read_text(encoding="utf-8"))

    first = walked("first", 1)
    monkeypatch.setattr(walk, "GameProcess", None)
    again = walked("again", 1)
    for part in ("games", "uniform", "prior", "mass"):
        assert again[part] == first[part]
    with pytest.raises(TypeError):
        walked("more", 2)
    logging.getLogger().handlers[:] = handlers


def test_figures_belong_together(report):
    for row in report["prior"]:
        assert 0 <= row["top1"] <= row["top3"] <= row["top5"] <= 1
        assert row["top1"] <= row["mrr"] <= 1 and row["rank"] >= 1
        assert 0 < row["probability"] <= 1 and row["log_loss"] >= 0 and 0 <= row["ece"] <= 1
    for game in report["games"]:
        (uniform,) = [r for r in report["uniform"] if r["game"] == game["game"]]
        assert uniform["decisions"] == game["decisions"]


def test_every_player_plays_every_game(report):
    players = [r["player"] for r in report["play"] if r["game"] == "tw-simple"]
    assert players == ["uniform"] + [
        f"LLM, {variant}, {reduction}, {drawn}"
        for variant in ("bare", "history")
        for reduction in ("sum", "pmi")
        for drawn in ("greedy", "drawn at 1")
    ]
    assert {r["episodes"] for r in report["play"]} == {2}
    assert {r["length"] for r in report["play"] if r["game"] == "tw-simple"} == {3.0}


def test_the_best_settings_are_on_the_page(folder, report):
    text = (folder / "README.md").read_text(encoding="utf-8")
    (best,) = [row for row in report["best"] if row["best"]]
    assert f"by rank **{best['reduction']}** with prompt `{best['variant']}`" in text
    baseline = sum(r["mrr"] for r in report["uniform"]) / 2
    assert f"uniform order {baseline:.3f}" in text
    assert "Commit abc" in text and report["command"] in text
    assert len(report["held_out"]) == len(VARIANTS) * 2
    assert all(
        (folder / name).stat().st_size > 5000 for name in re.findall(r"\((\w+\.png)\)", text)
    )
    table = (folder / "table.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + len(report["prior"])


def test_games_for_judging_are_marked_and_not_chosen_on(report):
    from priorzero.evidence.choice import best_settings

    marked = json.loads(json.dumps(report))
    for name in ("games", "uniform", "prior", "mass", "play"):
        for row in marked[name]:
            row["judging_only"] = True
    marked |= {"best": best_settings(marked["prior"]), "held_out": []}
    text = page(marked)
    assert "All games of this report are for judging only, so nothing was chosen." in text
    assert "| tw-simple (judging only) |" in text


def test_every_figure_is_explained(report):
    """docs/METRICS.md against the report: names of its rows, in both directions."""
    page = (ROOT / "docs" / "METRICS.md").read_text(encoding="utf-8")
    section = page.split("## Prior report")[1].split("\n## ")[0]
    explained = set(re.findall(r"^\| (.+?) \|", section, re.M))
    explained = {name for cell in explained for name in re.findall(r"`(\w+)`", cell)}
    places = {"llm", "game", "title", "family", "variant", "reduction", "temperature", "player"}
    written = {
        name
        for part in ("games", "uniform", "prior", "reliability", "mass", "play", "held_out")
        for row in report[part]
        for name in row
    }
    parts_by_name = {"search", "seen"} & report.keys()
    of_a_run = {"dropped"}  # a row of `search`, which is empty without --run
    assert explained == (written - places) | parts_by_name | of_a_run


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--temperatures 2 4", "with 1 among them"),
        ("--temperatures 0 1", "must be positive"),
        ("--history-length 0", "history-length"),
        ("--play-steps 0 --steps -1", "play-steps"),
        ("--max-prompt-tokens 5", "at least 32"),
    ],
)
def test_impossible_options_are_refused(options, message):
    args = parse_arguments(["--games", "tw-simple", "--out", "x", *options.split()])
    with pytest.raises(PriorZeroError, match=message):
        plan_from(args)


async def test_a_fault_of_the_user_is_one_message(tmp_path, capsys):
    handlers = logging.getLogger().handlers[:]
    try:
        assert await main(["--games", "no-such-game", "--out", str(tmp_path / "r")]) == 2
    finally:
        logging.getLogger().handlers[:] = handlers
    assert "no-such-game" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_repeated_names_are_measured_once():
    args = parse_arguments("--llm a b a --games g g h --out x".split())
    plan = plan_from(args)
    assert plan.llms == ("a", "b") and plan.games == ("g", "h")
