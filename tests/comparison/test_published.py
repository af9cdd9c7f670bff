"""Published scores: the file is sound, and `compare` puts ours beside them on one scale."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from priorzero.compare import main
from priorzero.comparison import published
from priorzero.comparison.figures import compare
from priorzero.comparison.runs import group_runs, read_runs
from priorzero.games.jericho_stories import STORIES
from priorzero.games.judging import JUDGING_GAMES
from priorzero_config import HybridTrainingConfig
from tests.comparison.test_compare import log, make_run, write_config, write_lines  # noqa: F401

FILE = json.loads(Path(published.__file__).with_name("published.json").read_text(encoding="utf-8"))


def limit_episodes(folder: Path, steps: int) -> Path:
    """As if the run had been started with this env.max_steps."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["settings"]["env"]["max_steps"] = steps
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def published_of(folders, metric=None):
    (game,) = compare(group_runs(read_runs(folders, metric)))["games"]
    return game["published"]


def test_every_figure_has_protocol_source_and_a_possible_score():
    assert len(FILE["figures"]) > 200
    for figure in FILE["figures"]:
        assert figure["protocol"] in FILE["protocols"] and figure["source"] in FILE["sources"]
        assert figure["score"] is None or -10 <= figure["score"] <= figure["max_score"], figure
        if figure["game"] in STORIES:
            assert figure["max_score"] == STORIES[figure["game"]].max_score, figure
        else:
            assert figure["game"].startswith(("sw-", "twx-", "jericho-*")), figure
    twice = Counter((f["game"], f["method"]) for f in FILE["figures"])
    assert [key for key, count in twice.items() if count > 1] == []
    assert not {f["game"] for f in FILE["figures"]} & set(JUDGING_GAMES)
    assert len({f["game"] for f in FILE["figures"] if f["game"].startswith("sw-")}) == 30 + 1


def test_ours_stands_beside_theirs_as_a_share_of_the_maximum(tmp_path):
    """35 of 350 points; DRRN's 32.6 are its published share."""
    folders = [
        limit_episodes(make_run(tmp_path / f"a{i}", i, (0, 10, x), game="zork1.z5"), 50)
        for i, x in enumerate((30, 40))
    ]
    found = published_of(folders)
    (ours,) = found["ours"]
    assert (found["max_score"], ours["score"], ours["share"]) == (350, 35, 10)
    assert (ours["env_steps"], ours["max_steps"], ours["seeds"]) == (200, 50, 2)

    theirs = {row["who"]: row for row in found["theirs"]}
    assert theirs["DRRN"]["share"] == pytest.approx(100 * 32.6 / 350)
    assert theirs["XTX"]["score"] == 103 and "gpt-4o (mean of all games)" in theirs
    assert "CALM" not in theirs  # a slot that is not filled

    said = next(line for line in found["differences"] if line.startswith("`drrn`"))
    assert "0.025 % of its 800,000 steps" in said and "have 100 steps, ours 50" in said
    assert set(found["sources"]) == {row["source"] for row in found["theirs"]}


@pytest.mark.parametrize(
    "game, who",
    [
        ("/stories/zork1.z5", "DRRN"),
        ("zork1", "DRRN"),
        ("sw-boil:simplify=easy", "KG-A2C"),
        ("twx-coin:seed=3", "o3 (medium) (mean of all games)"),
        ("curses.z5", "o3 (medium) (mean of all games)"),
        ("tw-coin:level=5,seed=3", None),
        ("tw-simple", None),
    ],
)
def test_games_are_known_by_their_names(tmp_path, game, who):
    found = published_of([make_run(tmp_path / "run", 0, (0, 1), game=game)])
    assert (found is None) if who is None else (who in {row["who"] for row in found["theirs"]})


def test_the_games_of_one_family_together_stand_beside_its_means(tmp_path):
    games = ["twx-coin:seed=20000", "twx-sorting:seed=20000"]

    run = make_run(tmp_path / "run", 0, (0, 40))
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))

    def together(played, evaluated):
        config["settings"]["env"] |= {"env_id": played, "eval_env_id": evaluated}
        (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return published_of([run])

    found = together("twx-coin", games)
    assert [(row["score"], row["share"]) for row in found["ours"]] == [(40, 40)]
    assert {row["protocol"] for row in found["theirs"]} == {"tales"}
    assert ("o3 (medium) (mean of all games)", 91.9) in [
        (row["who"], row["share"]) for row in found["theirs"]
    ]
    assert together(["zork1.z5", "detective.z5"], None) is None  # points of one are not the other's
    assert together("twx-coin", [*games, "sw-boil"]) is None


def test_only_returns_are_compared(tmp_path):
    run = make_run(tmp_path / "run", 0, (0, 1), game="zork1.z5")
    write_lines(run, [("wm", 100, 5.0)])
    assert published_of([run], "wm/wm_loss") is None


def test_the_page_has_both_and_many_groups_make_a_table_of_pairs(tmp_path, capsys):
    runs = [
        make_run(tmp_path / f"a{i}", 0, (0, i), game="zork1.z5", weight=i / 10) for i in range(1, 6)
    ]
    assert main(list(map(str, runs))) == 0
    page = capsys.readouterr().out
    assert "### Beside published scores\n\nMaximum: 350." in page
    assert "| DRRN | 32.6 | 9.3 % | 800,000 | 100 | – | `drrn` | hausknecht2019 |" in page
    assert "| **G5: search with the LLM's prior** | 5 | 1.4 % | 100 | – | 1 | ours |  |" in page
    assert "| MC-DML (GPT-3.5) | 48.7 ± 1.89 | 13.9 % |" in page
    assert "| at 100 steps | G2 | G3 | G4 | G5 |" in page
    assert "| P(G4 > …) |  |  |  | 0 |\n" in page and "| P(G1 > …) | 0 | 0 | 0 | 0 |\n" in page


def test_a_run_that_ended_at_its_start_does_not_decide_the_place(tmp_path):
    """Until now everything was compared at 0 steps, where nothing has been learnt."""
    whole = [make_run(tmp_path / f"a{i}", i, (0, 4, 6)) for i in (0, 1)]
    cut = make_run(tmp_path / "cut", 2, (0,))
    (game,) = compare(group_runs(read_runs([*whole, cut])))["games"]
    assert game["steps"] == 200 and game["groups"][0]["steps"]["runs"] == 2
    assert any("its only evaluation is at 0 steps" in note for note in game["notes"])

    (game,) = compare(group_runs(read_runs([cut])))["games"]
    assert game["steps"] == 0


def test_a_run_of_several_games_has_a_name(tmp_path):
    write_config(tmp_path / "run", 0)
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["settings"]["env"]["env_id"] = ["zork1.z5", "tw-simple"]
    path.write_text(json.dumps(config), encoding="utf-8")
    (run,) = read_runs([tmp_path / "run"])
    assert run.game == "zork1.z5 + tw-simple"


def test_the_preset_is_the_protocol():
    protocol = FILE["protocols"]["drrn"]
    plan = HybridTrainingConfig(presets=("jericho_protocol",))
    policy, env = plan.priorzero_cfg.policy, plan.priorzero_cfg.env
    a_time = policy.num_segments * policy.game_segment_length
    assert plan.iterations * a_time == protocol["env_steps"] == env.collector_env_num * 100_000
    assert env.max_steps == protocol["max_steps"]
