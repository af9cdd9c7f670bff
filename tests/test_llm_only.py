"""The preset llm_only from the command line, on a real game: a resumed run is the uninterrupted
one, and the real small LLM goes through all of it.
"""

from __future__ import annotations

import fnmatch

import pytest

from tests.test_docs import documented_metrics
from tests.test_entry import SETTINGS, experiment, metrics, read_json, run
from tests.test_resume import both, computed

pytestmark = pytest.mark.slow

# A coin in the next room: some of the short episodes find it.
ALONE = [
    "--preset=llm_only",
    "--env-id=tw-coin:level=2",
    "--exp-name=tiny",
    "--engine=transformers",
    *SETTINGS,
    "--set=env.max_steps=6",
    "--set=policy.game_segment_length=2",
    "--set=llm.lora.last_layers=1",
    "--set=llm.rft.samples=4",
    "--set=eval.temperature=1",
]


def test_a_resumed_run_is_the_uninterrupted_one(tiny_llm, tmp_path):
    """Interrupted in the midst of the first round."""
    whole, parts, _ = both(
        tmp_path,
        *ALONE,
        "--set=policy.num_segments=3",
        "--llm-only-episodes=4",
        f"--llm={tiny_llm}",
        "--eval-freq=2",
        "--save-freq=1",
        tiny=False,
    )
    names = ("collect", "prior", "llm", "eval")
    rows = computed(whole, *names)
    assert computed(parts, *names) == rows
    assert any("rft_loss" in row for row in rows)
    rounds = [r for r in metrics(experiment(whole)) if r["namespace"] == "perf"]
    assert rounds[1]["round_running"] > 0

    told = [read_json(experiment(cwd) / "summary.json") for cwd in (whole, parts)]
    for name in ("env_steps", "first_losses", "last_losses", "evaluations"):
        assert told[0][name] == told[1][name], name


def test_the_real_llm_plays_alone_and_learns(tmp_path):
    result = run(
        tmp_path,
        *ALONE,
        "--llm=embedded",
        "--iterations=1",
        "--set=env.collector_env_num=8",
        "--set=policy.num_segments=99",
        "--llm-only-episodes=8",
        "--eval-freq=1",
        tiny=False,
    )
    assert result.status == 0, result.output
    told = "Training mode:   llm_only: rounds of 8 episodes of the LLM alone, which then trains"
    assert told in result.lines and "World model:     neither plays nor learns" in result.lines
    assert "Round over: 8 episodes of these weights" in result.output

    folder = experiment(tmp_path)
    rows = {name: [] for name in ("collect", "prior", "llm", "eval", "perf")}
    for row in metrics(folder):
        rows[row["namespace"]].append(row)  # KeyError: it wrote what it should not, such as wm
    assert rows["collect"][0]["episodes"] == rows["llm"][0]["rft_group_episodes"] == 8
    returns = rows["collect"][0]["episode_return_mean"]
    assert rows["llm"][0]["rft_group_return"] == pytest.approx(returns)
    assert rows["llm"][0]["rft_samples"] == 4 and rows["llm"][0]["rft_staleness"] == 0
    assert rows["llm"][0]["push_version"] == 1 and rows["llm"][0]["push_canary_diff"] < 0.8
    assert [set(r) & {"llm/return_mean"} for r in rows["eval"]].count({"llm/return_mean"}) == 2
    assert len(list((folder / "transcripts").glob("*_llm_*"))) == 2
    assert (folder / "ckpt" / "iter_00000001" / "llm.pt").is_file()

    patterns = documented_metrics()
    written = {f"{r['namespace']}/{n}" for own in rows.values() for r in own for n in r}
    unknown = {
        name
        for name in written
        if not name.endswith(("/namespace", "/step"))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
    }
    assert unknown == set()
