"""`python -m priorzero.compare` over made-up runs whose numbers are known."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path

import pytest

from priorzero.compare import main
from priorzero.comparison.figures import area_under, common_place, compare, reached, value_at
from priorzero.comparison.plots import joined, plot_curves
from priorzero.comparison.runs import group_runs, read_runs
from priorzero.run.metrics import MetricsWriter
from priorzero.settings.experiment import ExperimentSettings
from priorzero.types import PriorZeroError

MODE = "world_model_llm"
METRIC = f"eval/{MODE}/return_mean"


@pytest.fixture(autouse=True)
def log(monkeypatch):
    """The command replaces the root logger's handlers."""
    monkeypatch.setattr("priorzero.compare.setup_logging", lambda folder: None)


def write_config(folder: Path, seed: int, weight=0.5, game="tw-simple", **schedule) -> None:
    """What the settings of a run say."""
    settings = ExperimentSettings(exp_name=str(folder), seed=seed)
    settings.policy.root_prior.weight = weight
    settings.env.env_id = game
    folder.mkdir(parents=True)
    config = {
        "schedule": {"iterations": 2, "resume": False} | schedule,
        "settings": settings.as_dict(),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def write_lines(folder: Path, rows) -> None:
    """Rows (namespace, step, value): an evaluation, an iteration's seconds, a loss."""
    names = {"eval": f"{MODE}/return_mean", "perf": "seconds_iteration", "wm": "wm_loss"}
    metrics = MetricsWriter(folder / "log")
    for namespace, step, value in rows:
        metrics.scalars(namespace, {names[namespace]: value}, step)
    metrics.close()


def make_run(folder: Path, seed: int, values, *, seconds=60.0, distance=100, **config) -> Path:
    """Evaluations `distance` steps and one iteration apart, beginning with step 0."""
    write_config(folder, seed, **config)
    rows = [("eval", 0, values[0])]
    for number, value in enumerate(values[1:], 1):
        rows += [("perf", number * distance, seconds), ("eval", number * distance, value)]
    write_lines(folder, rows)
    return folder


@pytest.fixture
def folders(tmp_path) -> list[Path]:
    """Four runs with weight 0.5 that end at 2, 4, 6, 20; two with 0.9, at half the speed, that end
    at 5 and 3.
    """
    quick = [make_run(tmp_path / f"a{i}", i, (0, 4, x)) for i, x in enumerate((2, 4, 6, 20))]
    slow = [
        make_run(tmp_path / f"b{i}", i, (0, 10, x), seconds=120.0, weight=0.9)
        for i, x in enumerate((5, 3))
    ]
    return [*quick, *slow]


def game_of(folders, metric=None, **places) -> dict:
    (game,) = compare(group_runs(read_runs(folders, metric)), **places)["games"]
    return game


# ---- figures -------------------------------------------------------------------------------------


def test_groups_and_their_labels(folders):
    groups = group_runs(read_runs(folders))["tw-simple"]
    assert [[run.seed for run in group.runs] for group in groups] == [[0, 1, 2, 3], [0, 1]]
    assert [g.label for g in groups] == [
        "policy.root_prior.weight=0.5",
        "policy.root_prior.weight=0.9",
    ]
    assert {g.metric for g in groups} == {METRIC}


def test_runs_of_a_sweep_are_grouped_by_variant(folders):
    """Also where variants have equal settings; runs that are of no sweep get numbers as names."""
    for folder, variant in zip(folders, ("one", "one", "two", "two", "slow", "slow"), strict=True):
        (folder / "run.json").write_text(json.dumps({"variant": variant}), encoding="utf-8")
    groups = group_runs(read_runs(folders))["tw-simple"]
    assert [(g.name, [run.seed for run in g.runs]) for g in groups] == [
        ("one", [0, 1]),
        ("two", [2, 3]),
        ("slow", [0, 1]),
    ]
    (folders[5] / "run.json").unlink()
    assert [g.name for g in group_runs(read_runs(folders))["tw-simple"]] == ["G1", "G2", "G3", "G4"]


def test_values_at_equal_steps_and_equal_time(folders):
    """At 200 steps the first group's middle two are 4 and 6, and the mean heights (0 + 4) / 4 +
    (4 + x) / 4 are 2.5, 3, 3.5, 7. After 2 minutes the slow group is at its second evaluation.
    """
    game = game_of(folders)
    assert (game["steps"], game["minutes"]) == (200, 2)
    quick, slow = game["groups"]
    assert quick["steps"]["value"]["value"] == 5 and quick["steps"]["area"]["value"] == 3.25
    assert quick["minutes"]["value"]["value"] == 5 and quick["minutes"]["area"]["value"] == 3.25
    assert slow["steps"]["value"]["value"] == 4 and slow["steps"]["area"]["value"] == 5 + 1
    assert slow["minutes"]["value"]["value"] == 10 and slow["minutes"]["area"]["value"] == 5

    # 4 > 3; 6 and 20 above both. After 2 minutes only 20 is above 10.
    (pair,) = game["pairs"]
    assert pair["steps"]["value"] == 5 / 8 and pair["minutes"]["value"] == 2 / 8
    assert game["notes"] == []


def test_places_can_be_asked_for(folders):
    game = game_of(folders, steps=150, minutes=1.0)
    quick, slow = game["groups"]
    # At 150 steps every run's last evaluation is that at 100; the curves are level from there.
    assert quick["steps"]["value"]["value"] == 4
    assert quick["steps"]["area"]["value"] == pytest.approx((2 * 100 + 4 * 50) / 150)
    assert slow["minutes"]["value"]["value"] == 0 and quick["minutes"]["value"]["value"] == 4


def test_steps_that_differ_a_little_are_the_same_place():
    one, other = [(0, 1.0), (1000, 2.0), (1960, 3.0)], [(0, 1.0), (1040, 4.0), (2000, 5.0)]
    assert common_place([one, other]) == 2000
    assert reached(one, 2000) and value_at(one, 2000) == 3
    # A run that ended early is not judged by what it was then, and it moves the common place.
    assert not reached(one, 3000) and common_place([one, [(0, 0.0), (1040, 4.0)]]) == 1040
    assert not reached([(500, 1.0)], 400) and common_place([[]]) is None


def test_area_is_level_outside_the_evaluations():
    points = [(10, 2.0), (20, 4.0), (40, 0.0)]
    assert area_under(points, 30) == pytest.approx((2 * 10 + 3 * 10 + 4 * 10) / 30)
    assert area_under([(0, 7.0)], 0) == 7


def test_curves_are_joined_where_all_runs_are():
    places, estimates = joined([[(0, 0.0), (10, 10.0)], [(4, 2.0), (12, 2.0)]])
    assert places == [4, 10] and [one.value for one in estimates] == [3, 6]
    assert joined([[(0, 0.0), (10, 1.0)], [(20, 0.0)]]) == ([], [])

    many, estimates = joined([[(x, 2.0 * x) for x in range(1001)]])
    assert len(many) == 200 and (many[0], many[-1]) == (0, 1000)
    assert [one.value for one in estimates] == [2 * x for x in many]


# ---- files of runs -------------------------------------------------------------------------------


def test_a_resumed_run_counts_what_it_repeated_once(tmp_path):
    """Killed at step 160, resumed at 80; then `eval` adds an evaluation of the last checkpoint and
    one of an older.
    """
    write_config(tmp_path / "run", 0)
    before = [("eval", 0, 0), ("perf", 40, 60), ("wm", 80, 8), ("perf", 80, 60), ("eval", 80, 1)]
    lost = [("wm", 120, 9), ("perf", 120, 600), ("perf", 160, 600), ("eval", 160, 5)]
    again = [("eval", 80, 99), ("wm", 120, 7), ("perf", 120, 30), ("perf", 160, 30)]
    after = [("eval", 160, 6), ("eval", 160, 55), ("eval", 80, 77)]
    write_lines(tmp_path / "run", before + lost + again + after)

    (run,) = read_runs([tmp_path / "run"])
    told = [(p.step, p.minutes, p.value) for p in run.points]
    assert told == [(0, 0, 0), (80, 2, 1), (160, 3, 6)]
    (losses,) = read_runs([tmp_path / "run"], "wm/wm_loss")
    assert [(p.step, p.value) for p in losses.points] == [(80, 8), (120, 7)]


def test_an_evaluation_that_ended_later_stands_at_its_own_place(tmp_path):
    """Played beside training: that of step 40 was written after step 120 was reached."""
    write_config(tmp_path / "run", 0, async_eval=True)
    rows = [("perf", 40, 60), ("eval", 0, 1), ("perf", 80, 60), ("perf", 120, 30)]
    rows += [("eval", 40, 5), ("eval", 40, 55), ("perf", 160, 30), ("eval", 160, 7)]
    rows += [("eval", 120, 6), ("eval", 0, 99)]
    write_lines(tmp_path / "run", rows)
    (run,) = read_runs([tmp_path / "run"], METRIC)
    found = [(point.step, point.minutes, point.value) for point in run.points]
    assert found == [(0, 0.0, 1.0), (40, 1.0, 5.0), (120, 2.5, 6.0), (160, 3.0, 7.0)]


def test_a_resumed_run_stays_in_its_group(tmp_path):
    one = make_run(tmp_path / "one", 0, (0, 1))
    other = make_run(tmp_path / "other", 1, (0, 2), resume=True)
    assert len(group_runs(read_runs([one, other]))["tw-simple"]) == 1


def test_a_run_of_several_games_stands_under_each_of_them(tmp_path):
    """Beside runs of that game alone, and in no group with them."""
    both = ["zork1.z5", "tw-simple"]
    write_config(tmp_path / "both", 0, game=both)
    metrics = MetricsWriter(tmp_path / "both" / "log")
    told = {f"zork1/{MODE}": 40.0, f"tw-simple/{MODE}": 2.0, MODE: 21.0}
    metrics.scalars("eval", {f"{name}/return_mean": v for name, v in told.items()}, 100)
    metrics.close()
    alone = make_run(tmp_path / "alone", 1, (0.0, 5.0), game="tw-simple")

    games = group_runs(read_runs([tmp_path / "both", alone]))
    assert list(games) == ["zork1.z5 + tw-simple", "zork1.z5", "tw-simple"]
    values = {name: [g.runs[0].points[-1].value for g in groups] for name, groups in games.items()}
    assert values == {
        "zork1.z5": [40.0],
        "tw-simple": [2.0, 5.0],
        "zork1.z5 + tw-simple": [21.0],
    }
    labels = [group.label for group in games["tw-simple"]]
    assert labels == ['env.env_id=["zork1.z5", "tw-simple"]', "env.env_id=(not there)"]


def test_games_that_are_evaluated_only_stand_under_their_names(tmp_path):
    """From a summary alone."""
    write_config(tmp_path / "run", 0)
    games = {"tw-simple": 3.0, "tw-coin": 1.0}
    told = {n: {"returns": [v], "lengths": [1]} for n, v in games.items()}
    row = {"env_steps": 8, MODE: {"returns": [3.0, 1.0], "lengths": [1, 1], "games": told}}
    summary = {
        "game": "tw-simple",
        "games": ["tw-simple"],
        "eval_games": list(games),
        "evaluations": [row],
    }
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    found = {run.game: run.points[0].value for run in read_runs([tmp_path / "run"])}
    assert found == games


def test_a_summary_alone_gives_no_times(tmp_path):
    write_config(tmp_path / "run", 0, game="auto")
    episodes = {"returns": [1.0, 4.0], "lengths": [3, 5]}
    summary = {"game": "tw-coin", "evaluations": [{"env_steps": 8, MODE: episodes}]}
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary), encoding="utf-8")

    game = game_of([tmp_path / "run"])
    assert (game["game"], game["steps"], game["minutes"]) == ("tw-coin", 8, None)
    assert game["groups"][0]["steps"]["value"] == {"value": 2.5, "low": None, "high": None}
    assert game["groups"][0]["label"] == "all runs" and "No run left times" in game["notes"][0]
    for name, value in {
        "return_std": 1.5,
        "return_best": 4,
        "return_worst": 1,
        "length": 4,
    }.items():
        (run,) = read_runs([tmp_path / "run"], f"eval/{MODE}/{name}")
        assert run.points[0].value == value
    # With a run beside it that has times, it alone is left out there.
    other = make_run(tmp_path / "other", 1, (0, 1), game="tw-coin", distance=8)
    notes = game_of([tmp_path / "run", other])["notes"]
    assert len(notes) == 1 and "left no times" in notes[0]


def test_damaged_lines_are_left_out(tmp_path, caplog):
    folder = make_run(tmp_path / "run", 0, (0, 1))
    with (folder / "log" / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"namespace": "eval", "step": 200, "world_mo')
    (run,) = read_runs([folder])
    assert len(run.points) == 2 and "a damaged line" in caplog.text


def test_a_run_without_the_metric_gets_a_line(tmp_path, folders):
    write_config(tmp_path / "empty", 5)
    game = game_of([*folders, tmp_path / "empty"])
    assert game["groups"][0]["steps"]["runs"] == 4 and game["steps"] == 200
    assert game["notes"] == [f"{tmp_path / 'empty'} (G1, seed 5) has no {METRIC} and is left out."]


def test_a_run_that_ended_early_gets_a_line(folders, tmp_path):
    short = make_run(tmp_path / "short", 7, (0, 4))
    game = game_of([*folders, short], steps=200)
    assert game["groups"][0]["steps"]["value"]["value"] == 5 and len(game["notes"]) == 1
    assert (
        "not compared at 200 steps: its evaluations lie between 0 steps and 100 steps"
        in (game["notes"][0])
    )


def test_games_are_told_apart_and_copies_are_noticed(folders, tmp_path):
    other = make_run(tmp_path / "other", 0, (1, 2), game="tw-coin")
    copy = make_run(tmp_path / "copy", 0, (0, 4, 2))
    simple, coin = compare(group_runs(read_runs([*folders, other, copy, other])))["games"]
    assert (simple["game"], coin["game"], coin["steps"]) == ("tw-simple", "tw-coin", 100)
    assert len(coin["groups"][0]["runs"]) == 1  # the folder was given twice
    assert simple["notes"][0].startswith("G1 has seed 0 2 times")


def test_what_is_no_run_is_refused(folders, tmp_path):
    with pytest.raises(PriorZeroError, match=r"no run is in .*nothing.*config\.json"):
        read_runs([*folders, tmp_path / "nothing"])
    with pytest.raises(PriorZeroError, match="has no namespace"):
        read_runs(folders, "return_mean")
    with pytest.raises(PriorZeroError, match="no run has eval/random/return_mean"):
        game_of(folders, "eval/random/return_mean")

    for text, told in (
        ("{", "cannot be read"),
        ("[]", "not what a run writes"),
        ("{}", "settings"),
    ):
        (folders[0] / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(PriorZeroError, match=told):
            read_runs(folders)


# ---- the command ---------------------------------------------------------------------------------


def test_page_and_files(folders, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([*map(str, folders), "--metric", METRIC, "--out", str(out)]) == 0
    page = capsys.readouterr().out
    assert (out / "README.md").read_text(encoding="utf-8").startswith(page)
    assert "| group | metric | runs | at 200 steps | up to 200 steps | at 2.00 minutes |" in page
    assert f"| G1 | `{METRIC}` | 4 | 5 [" in page and "| P(G1 > G2) | 0.625 [" in page

    with (out / "runs.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["value_at_steps"] for row in rows] == ["2.0", "4.0", "6.0", "20.0", "5.0", "3.0"]
    assert [float(row["area_to_minutes"]) for row in rows] == [2.5, 3, 3.5, 7, 5, 5]
    report = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    assert report["games"][0]["pairs"][0]["steps"]["value"] == 0.625
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_nowhere_together_can_be_drawn(tmp_path, capsys):
    """The first ended before the second was evaluated; another game has no evaluation at all."""
    early, late = make_run(tmp_path / "early", 0, (0, 1)), tmp_path / "late"
    write_config(late, 1)
    write_lines(late, [("perf", 300, 60), ("eval", 300, 4)])
    write_config(tmp_path / "none", 0, game="tw-coin")

    folders = [early, late, tmp_path / "none"]
    assert main([*map(str, folders), "--out", str(tmp_path / "out")]) == 0
    page = capsys.readouterr().out
    assert "| at 100 steps | up to 100 steps |" in page and "| 2 (steps: 1, minutes: 2) |" in page
    assert "late (G1, seed 1) is not compared at 100 steps" in page
    assert "none (G1, seed 0) has no" in page and "No run left times" not in page


def test_every_group_has_a_colour_of_its_own_and_one_legend_names_them(tmp_path, monkeypatch):
    """With eleven groups, of which the first has no times and so no curve over them."""
    from matplotlib import pyplot

    closed = []
    monkeypatch.setattr(pyplot, "close", closed.append)
    folders = [make_run(tmp_path / f"a{i}", 0, (0, i), weight=i / 100) for i in range(1, 11)]
    timeless = tmp_path / "timeless"
    write_config(timeless, 0, weight=0.99)
    write_lines(timeless, [("eval", 0, 1), ("eval", 100, 2)])

    games = group_runs(read_runs([timeless, *folders]))
    plot_curves(tmp_path / "curves.png", games, compare(games))
    over_steps, over_minutes = closed[0].axes
    colours = {
        panel: {
            line.get_label(): tuple(line.get_color())
            for line in panel.get_lines()
            if not line.get_label().startswith("_")  # the dotted line
        }
        for panel in (over_steps, over_minutes)
    }
    assert len(set(colours[over_steps].values())) == 11 and len(colours[over_minutes]) == 10
    assert colours[over_minutes].items() <= colours[over_steps].items()
    assert over_steps.get_legend() is None
    named = [text.get_text() for text in over_minutes.get_legend().get_texts()]
    assert len(named) == 11 and named[0].startswith("G1 (1): policy.root_prior.weight=0.99")


def test_faults_are_told(folders, tmp_path, caplog):
    with caplog.at_level(logging.ERROR):
        assert main([str(tmp_path / "nothing")]) == 2
        assert main([str(folders[0]), "--steps", "-1"]) == 2
    assert "no run is in" in caplog.text and "--steps is -1" in caplog.text
