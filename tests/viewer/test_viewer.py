"""What the page is told: curves, findings, which episodes, and its command."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from priorzero.decisions.reader import RecordedEpisode
from priorzero.types import PriorZeroError
from priorzero.view import main, stamp_of
from priorzero.viewer.curves import read_curves
from priorzero.viewer.findings import find, returns_to_go
from priorzero.viewer.runs import read_run
from priorzero.viewer.server import make_server
from tests.viewer.made_run import CHOSEN, make_run, reward_of


def metrics(folder: Path, rows) -> Path:
    (folder / "log").mkdir()
    text = "".join(
        json.dumps({"namespace": namespace, "step": step, **values}) + "\n"
        for namespace, step, values in rows
    )
    (folder / "log" / "metrics.jsonl").write_text(text + '{"namespace": "wm", "st')
    return folder


def test_curves_leave_out_what_a_resume_played_again(tmp_path):
    rows = [("wm", s, {"loss": s + 0.5}) for s in (0, 10, 20, 30)]
    rows += [("eval", 0, {"llm/return_mean": 7.0})]  # an older checkpoint, evaluated again
    rows += [("wm", s, {"loss": -1.0}) for s in (20, 30, 40)]
    curves = read_curves(metrics(tmp_path, rows))
    assert curves == {
        "wm/loss": ([0, 10, 20, 30, 40], [0.5, 10.5, -1.0, -1.0, -1.0]),
        "eval/llm/return_mean": ([0], [7.0]),
    }


def test_long_curves_are_thinned_to_means(tmp_path):
    rows = [("wm", s, {"loss": float(s)}) for s in range(1000)]
    ((steps, values),) = read_curves(metrics(tmp_path, rows)).values()
    assert steps[:2] == [2, 5] and values[:2] == [1.0, 4.0]
    assert (steps[-1], values[-1]) == (999, 999.0) and len(steps) == 334


def step(number, reward=0.0, *, llm=None, improved=None, value=0.0, predicted=0.0, chosen=0):
    fields = {
        "step": number,
        "reward": reward,
        "chosen": chosen,
        "commands": ["a", "b", "c", "d"],
        "value": value,
        "predicted_value": predicted,
        "visits": [1, 0, 0, 0],
        "improved": improved or [0.25] * 4,
    }
    return fields | ({"llm": llm} if llm else {})


def test_returns_are_discounted_from_the_end():
    assert returns_to_go([1.0, 0.0, 4.0], 0.5) == [2.0, 2.0, 4.0]


def test_overruled_and_right():
    for_a, for_b = [0.7, 0.1, 0.1, 0.1], [0.1, 0.7, 0.1, 0.1]
    steps = [
        step(0, llm=for_b, predicted=1.0),  # overruled, and 4 / 4 is what was expected
        step(1, llm=for_b, predicted=0.5),  # overruled: 4 / 2 instead of a half
        step(2, reward=4.0, llm=for_a),  # the LLM wanted it too
        step(3, llm=for_b, predicted=-1.0),  # nothing was earned
        step(4, reward=9.0, predicted=0.0),  # nobody was asked
    ]
    steps[4]["reward"], steps[3]["reward"] = 0.0, 0.0
    found = find([RecordedEpisode("e", steps)], 0.5)["overruled"]
    assert found == [(0, 1, 1.5)]


def test_surprises_are_beyond_twice_the_spread():
    steps = [step(n, value=0.1) for n in range(9)] + [step(9, value=-5.0)]
    found = find([RecordedEpisode("x", [step(0)]), RecordedEpisode("e", steps)], 1.0)
    assert found["surprise"] == [(1, 9, 5.0)]


def test_a_wrong_prior_gave_less_than_chance_to_what_the_search_is_sure_of():
    sure, unsure = [0.1, 0.6, 0.2, 0.1], [0.2, 0.4, 0.2, 0.2]
    low, lower, fair = [0.4, 0.2, 0.2, 0.2], [0.7, 0.05, 0.15, 0.1], [0.25] * 4
    told = [(sure, low), (sure, lower), (sure, fair), (unsure, lower)]
    steps = [step(n, improved=i, llm=p) for n, (i, p) in enumerate(told)]
    found = find([RecordedEpisode("e", steps)], 1.0)["prior_wrong"]
    assert [(f.step, pytest.approx(f.size)) for f in found] == [(1, 0.2), (0, 0.05)]


def test_a_run_is_told_with_its_newest_evaluations_first(tmp_path):
    run = read_run(make_run(tmp_path / "run", episodes=8, length=4), most=5)
    names = [e["name"] for e in run.summary["episodes"]]
    # All four of the evaluation, and the newest that was collected, in the order of the training.
    evaluated = [f"iter000010/world_model_llm/{n}" for n in range(4)]
    assert names == [*evaluated[:3], "collect/3", evaluated[3]]
    assert run.summary["recorded"] == 8 and len(run.episodes) == 5
    heading = run.summary["episodes"][0]
    assert (heading["length"], heading["return"], heading["end"]) == (4, 2.0, "terminated")
    assert [s["chosen"] for s in run.episodes[0]] == list(CHOSEN[:4])
    gamma = run.summary["discount"]
    assert run.episodes[0][0]["to_go"] == pytest.approx(gamma**3 * reward_of(3))

    (evaluation,) = run.summary["evaluations"]
    assert evaluation["returns"] == [2.0] * 4 and evaluation["length"] == 4


def test_games_are_told_apart(tmp_path):
    run = read_run(make_run(tmp_path / "run", episodes=4, length=4, games=("a.z5", "b.z5")), 9)
    assert run.summary["game"] == "a.z5 + b.z5"
    told = {(e["mode"], e["game"]) for e in run.summary["episodes"]}
    assert told == {("collect", "a.z5"), ("world_model_llm", "b.z5")}
    assert [row["game"] for row in run.summary["evaluations"]] == ["b.z5"]


def test_a_run_whose_decisions_were_not_kept_has_the_rest(tmp_path):
    """As the runs of results/: settings, metrics and summary."""
    run = make_run(tmp_path / "run", episodes=2)
    recorded = read_run(run, 9).summary
    shutil.rmtree(run / "decisions")
    kept = read_run(run, 9)
    assert kept.summary["curves"] == recorded["curves"] and kept.episodes == []
    assert kept.summary["game"] == "tw-simple"

    # Without metrics there is the summary, of one game or of several.
    shutil.rmtree(run / "log")
    with pytest.raises(PriorZeroError, match="no recorded decisions"):
        read_run(run, 9)
    rows = [
        {"llm": {"returns": [1.0, 4.0], "lengths": [3, 5]}},
        {
            "llm": {
                "returns": [2.0],
                "lengths": [8],
                "games": {"b": {"returns": [6], "lengths": [7]}},
            }
        },
    ]
    told = [{"iteration": 10 * n, "env_steps": 400 * n} | row for n, row in enumerate(rows)]
    (run / "summary.json").write_text(json.dumps({"game": "a", "evaluations": told}))
    shown = read_run(run, 9).summary
    assert shown["game"] == "a"
    keys = ("label", "mode", "game", "env_steps", "returns", "length")
    assert [tuple(row[key] for key in keys) for row in shown["evaluations"]] == [
        ("iter000000", "llm", "a", 0, [1.0, 4.0], 4),
        ("iter000010", "llm", "b", 400, [6], 7),
    ]


def test_the_command_tells_what_is_wrong(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    (tmp_path / "config.json").write_text(json.dumps({"settings": {}}))
    assert main([str(tmp_path)]) == 2
    run = make_run(tmp_path / "run", episodes=2)
    assert main([str(run), "--episodes", "0"]) == 2
    (tmp_path / "file").write_text("")
    assert main([str(run), "--out", str(tmp_path / "file" / "page.html")]) == 2
    told = capsys.readouterr().err
    for words in (
        "is no run's folder",
        "not what a run writes",
        "must be positive",
        "name another",
    ):
        assert words in told
    assert main([str(run)]) == 0 and (run / "decisions.html").stat().st_size > 10_000


def test_a_served_page_tells_when_there_is_more(tmp_path):
    run = make_run(tmp_path / "run", episodes=2)
    pages = iter(["first", "second"])
    with make_server(0, lambda: stamp_of([run]), lambda: next(pages)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def ask(path):
            url = f"http://127.0.0.1:{server.server_address[1]}{path}"
            with urllib.request.urlopen(url) as answer:
                return answer.read().decode()

        assert ask("/") == "first"
        before = ask("/stamp")
        assert ask("/stamp") == before
        with (run / "log" / "metrics.jsonl").open("a") as lines:
            lines.write("{}\n")
        assert ask("/stamp") != before and ask("/?again") == "second"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask("/config.json")
        server.shutdown()
