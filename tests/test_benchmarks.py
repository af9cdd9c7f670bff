"""Every benchmark runs at its smallest size and says what it claims to say; the learning check's
numbers by hand.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

GAME = "tw-simple"


def last_line(capsys) -> dict:
    """The JSON at the end of stdout."""
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


# ---- world model ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_world_model_benchmark(capsys):
    from benchmarks import world_model

    sizes = (
        "--batch-size 2 --unroll 4 --embed-dim 32 --heads 2 --layers 1 --steps 8 --updates 3 "
        "--stock-updates 1 --settle 2 --also bfloat16"
    )
    assert (
        world_model.main(
            [*sizes.split(), "--max-seq-len", "32", "--env-id", GAME, "--device", "cpu"]
        )
        == 0
    )
    result = last_line(capsys)
    assert result["timed_updates"] == {"ours": 3, "ours bfloat16": 3, "padded": 1, "trimmed": 1}
    losses = result["losses"]
    assert losses["ours bfloat16"] == pytest.approx(losses["ours"], rel=0.1, abs=0.01)
    assert 0 < result["batch"]["share"] < 1
    assert result["stock_tokens"]["padded"] == 32
    assert (
        result["stock_encoder_gradients"] is False
    )  # LightZero's default; the docstring rests on it
    rates = result["updates_per_second"]
    assert result["speedup"] == pytest.approx(rates["ours"] / rates["padded"], rel=1e-3)
    assert result["ours_with_encoding"] < rates["ours"]


def test_stock_batches_hold_the_same_rows():
    """A stock row: the tokens of the window's observations, then of the episode's last text, never
    of the next one.
    """
    from types import SimpleNamespace

    from benchmarks.common import PlayedStep
    from benchmarks.world_model import stock_data
    from priorzero.types import TextState

    def step(text, after, episode, timestep):
        return PlayedStep(TextState(text, ("a",)), "a", 0.0, "running", after, episode, timestep)

    played = [
        step("one", "two", 0, 0),
        step("two", "end", 0, 1),
        step("other", "more", 1, 0),
        step("more", "last", 1, 1),
    ]
    tokens = {
        t: np.full(2, i) for i, t in enumerate(("one", "two", "end", "other", "more", "last"))
    }
    zeros = np.zeros((2, 2), dtype=np.float32)

    class Batch(SimpleNamespace):
        def __len__(self):
            return 2

    batch = Batch(
        indices=np.array([0, 1]),
        actions=zeros.astype(np.int64),
        mask_step=zeros + 1,
        rewards=zeros,
        returns=zeros,
        policies=np.ones((2, 2, 1), dtype=np.float32),
        weights=np.ones(2),
    )
    current, target, _ = stock_data(batch, played, tokens, SimpleNamespace(num_unroll_steps=2), 0)
    assert current[0].tolist() == [[0, 0, 1, 1, 2, 2], [1, 1, 2, 2, 2, 2]]
    assert current[3].tolist() == [[1, 1, 0], [1, 1, 0]] and target[2].shape == (2, 3, 1)


# ---- search --------------------------------------------------------------------------------------


def test_search_benchmark(capsys):
    from benchmarks import search

    sizes = "--roots 2,3 --widths 32 --actions 9 --valid 3 --simulations 4 --layers 1 --plans 2"
    assert search.main([*sizes.split(), "--device", "cpu", "--root-policy", "gumbel"]) == 0
    result = last_line(capsys)
    methods = ("fused", "plain", "lightzero")
    rows = {(row["method"], row["roots"]): row for row in result["results"]}
    assert set(rows) == {(m, roots) for m in methods for roots in (2, 3)}
    assert all(0 < row["best_ms"] <= row["ms"] for row in rows.values())
    assert result["settings"]["simulations"] == 4


# ---- collector -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_collect_benchmark(capsys):
    from benchmarks import collect

    sizes = (
        "--segments 1 --segment-length 4 --max-steps 4 --envs 1 --simulations 2 --embed-dim 32 "
        "--no-llm"
    )
    assert collect.main([*sizes.split(), "--env-id", GAME, "--device", "cpu"]) == 0
    result = last_line(capsys)
    assert set(result["results"]) == {"no_caches", "cold", "warm", "known"}
    for block in result["results"].values():
        assert block["steps"] == 4
        assert sum(block["ms_per_step"].values()) * block["steps"] / 1000 == pytest.approx(
            block["seconds"], rel=1e-2
        )
    # A text that was seen before, in an earlier episode or in the first part, is known to a cache
    # alone. (Without one, only a text that occurs twice in one call is computed once.)
    assert (
        result["results"]["no_caches"]["encoder_hit_rate"]
        < 0.1
        < result["results"]["warm"]["encoder_hit_rate"]
    )
    # It plays what the first part played.
    assert result["results"]["known"]["encoder_hit_rate"] == 1


@pytest.mark.slow
def test_collect_workers_benchmark(capsys, monkeypatch):
    import importlib.util

    from benchmarks import collect_workers

    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # it is set there
    workers = "0 2" if importlib.util.find_spec("ray") else "0"
    sizes = (
        "--segments 2 --segment-length 4 --max-steps 8 --envs 2 --simulations 2 --embed-dim 32 "
        f"--rounds 2 --repeats 2 --no-llm --workers {workers}"
    )
    assert collect_workers.main([*sizes.split(), "--env-id", GAME]) == 0
    result = last_line(capsys)
    assert set(result["results"]) == set(workers.split())
    for one in result["results"].values():
        assert [run["steps"] for run in one["runs"]] == [16, 16] and one["speedup"] > 0
        assert all(sum(run["seconds_per_stage"].values()) < run["seconds"] for run in one["runs"])


def test_a_block_of_jericho_without_cache_lists_every_state(story):
    """`own_state_cache(envs, None)` really switches the cache of valid actions off."""
    from benchmarks.collect import own_state_cache
    from priorzero.games.env import TextGameEnv
    from priorzero.games.group import GameEnvGroup

    env = TextGameEnv({"env_id": story("detective.z5"), "action_cache": None})
    envs = GameEnvGroup([env])
    try:
        own_state_cache(envs, None)
        for _ in range(3):
            env.reset()
        assert env.stats()["state_misses"] == 3 and env.stats()["state_hits"] == 0
    finally:
        envs.close()


# ---- LLM prior -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_prior_benchmark_and_its_sweep(capsys, tmp_path):
    from benchmarks import prior

    sizes = (
        "--model random:tiny --prompt-tokens 300 --actions 4 --states 2 --play-steps 12 "
        "--dtype float32"
    )
    sweep = "--sweep --sweep-actions 2,6 --sweep-prompt-tokens 400 --sweep-states 1"
    arguments = [
        *sizes.split(),
        "--device",
        "cpu",
        *sweep.split(),
        "--methods",
        "per_action,shared,cached",
    ]
    assert prior.main([*arguments, "--out", str(tmp_path), "--env-id", GAME]) == 0
    result = last_line(capsys)
    assert (
        set(result["states_per_second"]) == {"per_action", "shared", "cached"}
        and result["failed"] == {}
    )
    assert result["largest_difference"] < 1e-3
    speed = result["states_per_second"]
    assert result["speedup_over_per_action"]["shared"] == pytest.approx(
        speed["shared"] / speed["per_action"], rel=1e-3
    )
    assert speed["cached"] > speed["shared"]
    lines = (tmp_path / "prior_sweep.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 5  # three ways at the base point and at four others
    assert (tmp_path / "prior_sweep.png").stat().st_size > 1000


def test_prompts_have_the_length_asked_for():
    from benchmarks.common import PlayedStep
    from benchmarks.prior_states import make_requests
    from priorzero.llm.scoring.requests import Tokeniser
    from priorzero.types import TextState

    class Words:
        """One token per four characters."""

        chat_template = bos_token = None
        eos_token_id = 1
        added_tokens_decoder: dict = {}

        def __call__(self, text, **_):
            if isinstance(text, list):
                return {"input_ids": [self(t)["input_ids"] for t in text]}
            return {
                "input_ids": [2 + sum(text[i : i + 4].encode()) for i in range(0, len(text), 4)]
            }

    states = [
        TextState(f"You are in room number {i}, dark and cold.", ("go east", "go west"))
        for i in range(6)
    ]
    played = [
        PlayedStep(state, "go east", 0.0, "running", "next", 0, i) for i, state in enumerate(states)
    ]
    tokeniser = Tokeniser(Words(), 2000)
    inputs = make_requests(tokeniser, played, 700, 5, 4)
    requests = [*inputs.states, *inputs.warm_up]
    assert len(requests) == 8 and len({r.body_ids for r in requests}) == 8
    both = tokeniser.requests([("", "x")], [("go east", "go west")])[0].action_ids
    for request in requests:
        assert 690 <= request.num_prompt_tokens <= 700
        assert len(set(request.action_ids)) == 5 and set(both) <= set(request.action_ids)
    # Nothing but the head is common to two prompts, so no prefix cache is served more than in a
    # run.
    first, second = (r.body_ids for r in requests[:2])
    assert first[:2] != second[:2]


# ---- learning check ------------------------------------------------------------------------------


def learning_arguments(tmp_path, *more: str):
    from benchmarks.learning_check import parse_arguments

    return parse_arguments(
        ["--out", str(tmp_path / "out"), "--games", GAME, "--seeds", "0", "1", "--debug", *more]
    )


def test_both_runs_of_a_seed_differ_by_the_llm_alone(tmp_path):
    """The commands are read by the entry's own parser, and their settings compared."""
    import priorzero_orz_entry
    from benchmarks.learning_check import sweep_settings
    from priorzero.sweeping.plan import planned_runs

    args = learning_arguments(
        tmp_path, "--set", "policy.num_simulations=7", "--set", "llm.sft.samples=3"
    )
    settings = {}
    for run in planned_runs(sweep_settings(args)):
        parsed = priorzero_orz_entry.parse_arguments(run.command(run.name)[2:])
        config = priorzero_orz_entry.config_from(parsed, debug_mode=False)
        settings[run.variant, run.seed] = config
        assert config.debug_mode
    assert len(settings) == 4
    with_llm, without = (settings[method, 1].priorzero_cfg for method in ("priorzero", "unizero"))
    assert with_llm.llm.enable and not without.llm.enable and with_llm.llm.sft.samples == 3
    assert with_llm.env == without.env and with_llm.seed == without.seed == 1
    assert with_llm.policy.num_simulations == without.policy.num_simulations == 7
    own, other = (
        {k: v for k, v in c.policy.as_dict().items() if k != "root_prior"}
        for c in (with_llm, without)
    )
    assert own == other
    assert "random" in without.eval.modes and {"world_model_llm", "llm"} <= set(with_llm.eval.modes)


def write_run(folder, method: str, seed: int, evaluations: list[dict]) -> None:
    folder = folder / "runs" / f"{method}{seed}"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"game": GAME, "variant": method, "seed": seed, "status": 0})
    )
    (folder / "summary.json").write_text(json.dumps({"evaluations": evaluations}))


def played(*returns: float) -> dict:
    return {"returns": list(returns), "lengths": [5] * len(returns)}


def test_report_by_hand(tmp_path, capsys):
    """Two seeds; seed 1 of UniZero was cut off after 100 steps, so everything is compared there."""
    from benchmarks import learning_check

    for seed in (0, 1):
        write_run(
            tmp_path,
            "priorzero",
            seed,
            [
                {
                    "iteration": n,
                    "env_steps": 100 * n,
                    "world_model_llm": played(n, n + 2 * seed),
                    "llm": played(1 + n),
                    "world_model": played(0),
                }
                for n in range(3)
            ],
        )
        write_run(
            tmp_path,
            "unizero",
            seed,
            [
                {
                    "iteration": n,
                    "env_steps": 100 * n,
                    "world_model": played(3 * seed, 3 * seed),
                    "random": played(0.5),
                }
                for n in range(3 - seed)
            ],
        )
    assert learning_check.main(["--out", str(tmp_path), "--plot-only"]) == 0
    table = {e["method"]: e for e in last_line(capsys)["final"]}
    assert {e["env_steps"] for e in table.values()} == {0, 100}
    # PriorZero at 100 steps: seed 0 plays 1, 1 and seed 1 plays 1, 3, so the seeds' means are 1 and
    # 2.
    assert (table["PriorZero"]["mean"], table["PriorZero"]["std"]) == (1.5, 0.5)
    assert (table["UniZero"]["mean"], table["UniZero"]["std"]) == (1.5, 1.5)
    assert table["LLM alone, untrained"]["mean"] == 1 and table["LLM alone, trained"]["mean"] == 2
    assert table["random"]["mean"] == 0.5
    rows = (tmp_path / "runs.csv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 3 * 3 + (3 + 2) * 2
    assert (
        "| tw-simple | PriorZero | 100 | 2 | 1.50 ± 0.50 |" in (tmp_path / "summary.md").read_text()
    )
    assert (tmp_path / "learning_curves.png").stat().st_size > 1000


def test_a_killed_run_is_read_from_its_metrics(tmp_path):
    from benchmarks.learning_report import collect_rows

    folder = tmp_path / "runs" / "killed"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(
        json.dumps({"game": GAME, "variant": "unizero", "seed": 4, "status": -9})
    )
    line = {
        "namespace": "eval",
        "step": 60,
        "world_model/return_mean": 2.5,
        "world_model/return_std": 0.5,
        "world_model/episodes": 3.0,
    }
    (folder / "metrics.jsonl").write_text(json.dumps(line) + '\n{"namespace": "ev')
    (row,) = collect_rows(tmp_path)
    assert (row.method, row.seed, row.env_steps, row.return_mean, row.episodes) == (
        "UniZero",
        4,
        60,
        2.5,
        3,
    )


@pytest.mark.slow
def test_learning_check_end_to_end(tmp_path, capsys):
    from benchmarks import learning_check

    tiny = [
        "env.max_steps=6",
        "env.collector_env_num=1",
        "env.evaluator_env_num=1",
        "policy.num_simulations=2",
        "policy.num_segments=1",
        "policy.game_segment_length=6",
        "policy.embed_dim=32",
        "policy.batch_size=4",
    ]
    out = tmp_path / "out"
    status = learning_check.main(
        [
            "--out",
            str(out),
            "--games",
            GAME,
            "--seeds",
            "0",
            "--methods",
            "unizero",
            "--iterations",
            "1",
            "--eval-freq",
            "1",
            "--episodes",
            "1",
            "--debug",
            "--commit",
            "abc",
            *(part for s in tiny for part in ("--set", s)),
        ]
    )
    result = last_line(capsys)
    assert status == 0 and result["not_completed"] == []
    methods = {e["method"]: e for e in result["final"]}
    assert set(methods) == {"UniZero", "random"} and methods["UniZero"]["env_steps"] == 6
    assert "Commit abc" in (out / "README.md").read_text()
    assert json.loads((out / "compare/compare.json").read_text())["games"][0]["minutes"] > 0
    kept = "".join(p.read_text() for p in out.glob("runs/*/*.json*"))
    assert "/tmp" not in kept and str(tmp_path) not in kept


# ---- training and evaluation beside collection ---------------------------------------------------


@pytest.mark.slow
def test_background_benchmark(capsys):
    from benchmarks import background
    from tests.test_entry import SETTINGS

    sizes = "--iterations 2 --repeats 1 --eval-freq 1 --llm none"
    arguments = [*sizes.split(), "--variants=0 1 -1e", *SETTINGS, "--env-id", GAME]
    assert background.main([*arguments, "--device", "cpu"]) == 0
    results = last_line(capsys)["results"]["none"]
    assert list(results) == ["0", "1", "-1e"] and results["0"]["speedup"] == 1.0
    for variant, result in results.items():
        (run,) = result["runs"]
        assert run["updates"] > 0 and run["llm_phases"] == 0
        assert run["env_steps_per_second"] == pytest.approx(
            run["env_steps"] / run["seconds"], rel=1e-3
        )
        assert (run["degree"] > 0) == (variant != "0")
        assert run["seconds_evaluate"] > 0
    assert results["0"]["runs"][0]["seconds_overlap"] == 0


def test_background_benchmark_speeds_by_hand():
    from benchmarks.background import compared

    runs = {"0": [2.0, 4.0, 9.0], "1": [8.0, 1.0, 6.0]}
    rows = {v: [{"env_steps_per_second": x} for x in own] for v, own in runs.items()}
    found = compared(rows)
    assert (found["0"]["env_steps_per_second"], found["0"]["speedup"]) == (4.0, 1.0)
    assert (found["1"]["env_steps_per_second"], found["1"]["speedup"]) == (6.0, 1.5)


def test_background_benchmark_refuses_what_is_no_variant(capsys):
    from benchmarks.background import parse_arguments

    with pytest.raises(SystemExit):
        parse_arguments(["--variants", "0 two"])
    assert "variant 'two' is not like" in capsys.readouterr().err


# ---- recording of decisions ----------------------------------------------------------------------


@pytest.mark.slow
def test_decisions_benchmark_of_whole_runs(capsys, monkeypatch):
    """What is recorded changes nothing of the run but what it writes."""
    from benchmarks import decisions

    whole = "evaluations and 100 %"
    kept = {name: decisions.RECORDED[name] for name in ("nothing", whole)}
    monkeypatch.setattr(decisions, "RECORDED", kept)
    sizes = "--whole-run 1 --rounds 1 --simulations 4 --embed-dim 32 --no-llm"
    assert decisions.main([*sizes.split(), "--env-id", GAME]) == 0

    told = last_line(capsys)
    (nothing,), (everything,) = told["rounds"]["nothing"], told["rounds"][whole]
    assert nothing["decisions"] == 0 and nothing["env_steps"] == everything["env_steps"] == 40
    # 40 of the collection, and two evaluations of two episodes of at most 25 moves each.
    assert 40 < everything["decisions"] <= 40 + 100
    assert everything["thread_cpu_s"] > nothing["thread_cpu_s"] >= 0
    cost = told["cost"][whole]
    assert cost["share"] == pytest.approx(everything["cpu_s"] / nothing["cpu_s"] - 1, abs=1e-3)


# ---- warm prior ----------------------------------------------------------------------------------


def test_warm_prior_leaves_families_out_and_tells_before_and_after(monkeypatch, tmp_path):
    """The numbers by hand; training and report stand aside, which have tests of their own."""
    from benchmarks import warm_prior

    trained = []

    def one_group(args, family, games, also, source):
        trained.append((family, games, also))
        rows = [
            {"game": g, "llm": llm, "reduction": r, "mrr": mrr, "mrr_error": 0.1, "log_loss": loss}
            for g in games + also
            for llm, mrr, loss in (("cold", 0.25, 3.0), ("cold", 0.25, 2.0), ("warm", 0.5, 1.0))
            for r in ("sum", "mean")
        ]
        return {"uniform": [{"game": g, "mrr": 0.2} for g in games + also], "prior": rows}

    monkeypatch.setattr(warm_prior, "one_group", one_group)
    command = ["--judge", "tw-coin:seed=1", "tw-simple:seed=2", "tw-coin:seed=3", "--commit", "abc"]
    command += ["--also", "tw-cooking:seed=4", "--out", str(tmp_path)]
    assert warm_prior.main(command) == 0
    assert trained == [
        ("tw-coin", ["tw-coin:seed=1", "tw-coin:seed=3"], ["tw-cooking:seed=4"]),
        ("tw-simple", ["tw-simple:seed=2"], []),
    ]
    table = (tmp_path / "table.md").read_text()
    assert "sum: MRR +0.250 in the mean, better on 4 of 4 games" in table
    assert "| tw-coin:seed=3 | sum | 0.200 | 0.250 ± 0.100 | 0.500 ± 0.100 | 2.00 | 1.00 |" in table

    # A second start does nothing again.
    assert warm_prior.main(command) == 0 and len(trained) == 2

    # Two families out of one warm-up.
    trained.clear()
    assert warm_prior.main([*command, "--together", "2", "--out", str(tmp_path / "two")]) == 0
    games = ["tw-coin:seed=1", "tw-coin:seed=3", "tw-simple:seed=2"]
    assert trained == [("tw-coin, tw-simple", games, ["tw-cooking:seed=4"])]


# ---- ORZ's trainer against the built-in one ------------------------------------------------------


def test_orz_direction_by_hand():
    """What is drawn, and what moved, by the sign of the advantage; training itself needs ORZ
    (docs/ORZ.md).
    """
    from benchmarks.orz_direction import clearest, moves
    from priorzero.settings.experiment import ExperimentSettings
    from priorzero.types import ActionScores
    from tests.llm.decisions import REQUESTS, sample

    settings = ExperimentSettings()
    settings.llm.rft.advantage, settings.policy.root_prior.reduction = "raw", "sum"
    samples = [
        sample(REQUESTS[0], action_index=index, value_target=value)
        for index, value in ((0, 2.0), (1, -1.0), (0, 1.0))
    ]
    drawn = clearest([*samples, *[sample(REQUESTS[1], value_target=0.1 * i) for i in range(9)]], 2)
    assert [s.request for s in drawn] == [REQUESTS[0]] * 2
    assert [s.advantage for s in drawn] == [1.5, -1.0]  # the first was taken twice
    before = [ActionScores(((-1.0, -1.0), (-2.0,)))] * 3
    after = [
        ActionScores(((-1.0, -0.5), (-1.0,))),  # both likelier, the other one by more
        ActionScores(((-1.0, -1.0), (-3.0,))),
        ActionScores(((-0.5, -0.5), (-2.0,))),
    ]
    told = moves(samples, before, after, settings, {})
    assert (told["positive"], told["negative"]) == (2, 1)
    assert told["advantages"] == [2.0, -1.0, 1.0]
    assert told["tokens"]["changes"] == pytest.approx([0.5, -1.0, 1.0])
    assert told["tokens"]["positive"] == pytest.approx([0.75])
    assert told["tokens"]["negative"] == [-1.0]
    later = moves(samples, before, before, settings, told)
    assert later["tokens"]["negative"] == [-1.0, 0.0]

    def among(first: float, second: float) -> float:
        return first - np.log(np.exp(first) + np.exp(second))

    changes = [
        among(-1.5, -1.0) - among(-2.0, -2.0),
        among(-3.0, -2.0) - among(-2.0, -2.0),
        among(-1.0, -2.0) - among(-2.0, -2.0),
    ]
    assert told["policy"]["changes"] == pytest.approx(changes)
    assert told["policy"]["positive_rising"] == 0.5
    assert told["policy"]["negative_falling"] == 1.0
