"""A run's decisions as rows of TRL and verl: ids, texts, weights and values by hand."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from game_buffer_priorzero import PriorZeroGameBuffer
from priorzero.data.archive import SegmentArchive
from priorzero.data.segment import Segment, StepRecord
from priorzero.export_samples import main
from priorzero.llm.prompts import ACTION_MARKER, build_prompt, system_text, user_text
from priorzero.llm.scoring.requests import Tokeniser
from priorzero.llm.update.rows import drawn_actions
from priorzero.run.checkpoint import CheckpointStore
from priorzero.settings.experiment import ExperimentSettings
from priorzero.settings.llm import PromptSettings
from priorzero.types import ActionScores, TextState

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("A small room.", "A lamp is here.", "The end is near.")
ACTIONS = (("go north", "look"), ("take lamp", "look", "open the door"), ("wait",))
TARGETS = ((0.3, 0.7), (0.5, 0.25, 0.25), (1.0,))
PLAYED = (1, 2, 0)
THOUGHT = " A door is a way out."


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    """The command's own handlers would outlive the test's terminal."""
    monkeypatch.setattr("priorzero.export_samples.setup_logging", lambda folder: None)


@pytest.fixture(scope="module")
def tokenizer(tiny_llm):
    return AutoTokenizer.from_pretrained(tiny_llm)


def settings_of(llm: str, **prompt) -> ExperimentSettings:
    settings = ExperimentSettings()
    settings.policy.td_steps, settings.policy.discount_factor = 2, 0.5
    settings.llm.model, settings.llm.prompt = llm, PromptSettings(**prompt)
    return settings


def state(step: int) -> TextState:
    return TextState(ROOMS[step], ACTIONS[step], goal="Get out.")


def scores(tokeniser: Tokeniser, request, step: int, thinks: bool) -> ActionScores | None:
    """The second step's engine did not answer, unless it thinks."""
    if step == 1 and not thinks:
        return None
    written = tokeniser.ids(THOUGHT) if thinks else ()
    marker = tokeniser.ids(f"\n{ACTION_MARKER}") if thinks else ()
    logprobs = tuple(
        tuple(-float(i + j) for j in range(len(ids))) for i, ids in enumerate(request.action_ids, 1)
    )
    return ActionScores(logprobs, 3, written + marker, tuple(-0.5 for _ in written))


def played(settings: ExperimentSettings, tokenizer) -> Segment:
    """An episode of three steps that earn 1, 2, 4, with values 10, 20, 30 of the search and 1, 2, 3
    expected. The last one has no choice.
    """
    tokeniser, thinks = Tokeniser(tokenizer, 1024), settings.llm.prompt.use_cot
    segment = Segment(0, 0, 5)
    for t, actions in enumerate(ACTIONS):
        prompt = build_prompt(state(t), settings.llm.prompt, tokenizer)
        (request,) = tokeniser.requests([(prompt.head, prompt.body)], [actions], reasoning=thinks)
        step = StepRecord(
            state=state(t),
            observation=np.zeros(4, np.float32),
            valid_actions=actions,
            valid_ids=np.arange(len(actions)),
            action_index=PLAYED[t],
            visit_counts=np.ones(len(actions)),
            behaviour=np.full(len(actions), 1 / len(actions)),
            target_policy=np.array(TARGETS[t]),
            root_value=10.0 * (t + 1),
            predicted_value=float(t + 1),
            reward=float(2**t),
            done_kind="terminated" if t == 2 else "running",
            timestep=t,
            request=request,
            scores=scores(tokeniser, request, t, thinks),
        )
        segment.record(step, np.zeros(4, np.float32))
    return segment


def make_run(folder: Path, settings: ExperimentSettings, tokenizer, saved: bool = True) -> Path:
    """What a run with one episode in its buffer leaves; `saved`: whether the buffer was."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"settings": settings.as_dict()}))
    buffer = PriorZeroGameBuffer(settings.policy, 4, seed=0)
    buffer.push_game_segments([played(settings, tokenizer)])
    archive = SegmentArchive(folder / "replay", 2**30 if saved else 0)
    replay = {
        "chunks": archive.write(buffer.numbered_segments()),
        "buffer": buffer.state_dict(),
    }
    CheckpointStore(folder / "ckpt").save(7, {"replay": replay}, None, {"game": "tw-simple"})
    return folder


@pytest.fixture
def run(tmp_path, tiny_llm, tokenizer) -> Path:
    return make_run(tmp_path / "run", settings_of(tiny_llm), tokenizer)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def exported(run: Path, file: str, *options: str) -> list[dict]:
    """The rows of one file."""
    out, form = run.parent / file, "verl" if file == "train" else "trl"
    assert main([str(run), str(out), f"--format={form}", *options]) == 0
    return read(out / f"{file}.jsonl")


def by_room(rows: list[dict], step: int) -> list[dict]:
    """Those of one of the episode's states; the third is no decision."""
    assert not any(ROOMS[2] in str(row["prompt"]) for row in rows)
    return [row for row in rows if ROOMS[step] in str(row["prompt"])]


# ---- TRL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0, 1])
def test_sft_rows_are_the_targets_shares(run, tokenizer, step):
    rows = by_room(exported(run, "sft", "--draws=20"), step)
    prompt = build_prompt(state(step), PromptSettings(), tokenizer).text
    assert {row["prompt"] for row in rows} == {prompt}
    end = "<|im_end|>"
    counts = {a: sum(row["completion"] == f" {a}{end}" for row in rows) for a in ACTIONS[step]}
    assert list(counts.values()) == [round(20 * p) for p in TARGETS[step]]

    for row in rows:
        assert row["input_ids"] == tokenizer(prompt + row["completion"])["input_ids"]
        learnt = [i for i, m in zip(row["input_ids"], row["completion_mask"], strict=True) if m]
        assert tokenizer.decode(learnt) == row["completion"]
        assert sorted(row["completion_mask"]) == row["completion_mask"]
        assert row["target"] == TARGETS[step][ACTIONS[step].index(row["completion"][1 : -len(end)])]


def test_draws_have_the_target_as_their_mean():
    target = (0.07, 0.0, 0.6, 0.33)
    counts = np.zeros(4)
    for place in (np.arange(1000) + 0.5) / 1000:
        drawn = drawn_actions(target, 3, SimpleNamespace(random=lambda place=place: place))
        own = np.bincount(drawn, minlength=4)
        counts += own
        assert (np.abs(own - 3 * np.array(target)) < 1).all()
    assert counts / 3000 == pytest.approx(target, abs=1e-3)
    assert drawn_actions((0.0, 1.0 - 1e-4), 5, np.random.default_rng(0)) == [1] * 5


def test_unpaired_rows_by_hand(run, tokenizer):
    """Returns with discount 0.5 over two steps: 1 + 2 / 2 + 30 / 4 = 9.5, expected 1; 2 + 4 / 2 at
    the end = 4, expected 2. So the advantages are 8.5 and 2, and their mean is 5.25.
    """
    rows = exported(run, "unpaired")
    (first,), (second,) = by_room(rows, 0), by_room(rows, 1)
    assert (first["value_target"], first["advantage"], first["label"]) == (9.5, 8.5, True)
    assert (second["value_target"], second["advantage"], second["label"]) == (4, 2, False)
    assert (first["behaviour"], first["target"], first["policy_version"]) == (0.5, 0.7, 3)
    assert first["completion"] == " look<|im_end|>"
    for row in (first, second):
        assert tokenizer(row["prompt"])["input_ids"] == row["prompt_ids"]
        assert tokenizer(row["completion"])["input_ids"] == row["completion_ids"]
    # Action 2 of its state; the second state's engine did not answer.
    assert first["completion_logprobs"] == [-2.0 - j for j in range(len(first["completion_ids"]))]
    assert second["completion_logprobs"] is None


def test_a_thought_is_context_of_sft_and_completion_of_reinforcement(tmp_path, tiny_llm, tokenizer):
    settings = settings_of(tiny_llm, use_cot=True)
    run = make_run(tmp_path / "run", settings, tokenizer)
    asked = build_prompt(state(1), settings.llm.prompt, tokenizer).text
    behind = f"{THOUGHT}\n{ACTION_MARKER}"

    row = by_room(exported(run, "sft"), 1)[0]
    assert row["prompt"] == asked + behind and row["completion"].startswith(" ")
    assert sum(row["completion_mask"]) == len(tokenizer(row["completion"])["input_ids"])

    (row,) = by_room(exported(run, "unpaired"), 1)
    assert row["prompt"] == asked and row["completion"] == f"{behind} open the door<|im_end|>"
    written, marker = (len(tokenizer(t)["input_ids"]) for t in (THOUGHT, f"\n{ACTION_MARKER}"))
    action = len(row["completion_ids"]) - written - marker
    known = [-0.5] * written + [None] * marker + [-3.0 - j for j in range(action)]
    assert row["completion_logprobs"] == known

    (row,) = by_room(exported(run, "train"), 1)
    messages = [
        system_text(state(1), settings.llm.prompt),
        user_text(state(1), settings.llm.prompt),
    ]
    assert [m["content"] for m in row["prompt"]] == messages
    assert tokenizer.decode(row["extra_info"]["thought_ids"]) == behind
    assert row["extra_info"]["thought_logprobs"] == [-0.5] * written


# ---- verl ----------------------------------------------------------------------------------------


def test_verl_rows_have_its_schema_and_our_decision(run, tokenizer):
    (row,) = by_room(exported(run, "train"), 0)
    assert list(row) == ["data_source", "prompt", "ability", "reward_model", "extra_info"]
    assert row["data_source"] == "priorzero/tw-simple"
    assert row["reward_model"] == {"style": "rule", "ground_truth": "look"}
    assert row["prompt"] == [
        {"role": "system", "content": system_text(state(0), PromptSettings())},
        {"role": "user", "content": user_text(state(0), PromptSettings())},
    ]
    extra = row["extra_info"]
    assert extra["valid_actions"] == list(ACTIONS[0]) and extra["target_policy"] == [0.3, 0.7]
    assert (extra["action_index"], extra["advantage"], extra["split"]) == (1, 8.5, "train")
    # What verl makes of the messages, and the word that a run puts there.
    made = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    assert tokenizer(made + ACTION_MARKER)["input_ids"] == extra["prompt_ids"]
    assert [len(ids) for ids in extra["action_ids"]] == [len(p) for p in extra["action_logprobs"]]


def test_the_manuals_reward_is_the_searchs_policy(run):
    manual = (ROOT / "PRIORZERO_ORZ_EXECUTABLE.md").read_text(encoding="utf-8")
    section = manual.split("## Exporting its samples")[1]
    scope: dict = {}
    exec(re.search(r"```python\n(.*?)```", section, re.S)[1], scope)
    (row,) = by_room(exported(run, "train"), 0)

    def reward(said: str) -> float:
        truth = row["reward_model"]["ground_truth"]
        return scope["compute_score"](row["data_source"], said, truth, row["extra_info"])

    assert reward("Action: look") == 1 and reward("Action: go north ") == pytest.approx(3 / 7)
    assert reward("Action: fly") == 0


# ---- what is refused -----------------------------------------------------------------------------


def refused(caplog, *arguments: object) -> str:
    caplog.clear()
    assert main([str(a) for a in arguments]) == 2
    (error,) = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
    return error


def test_what_cannot_be_written_is_told_and_leaves_nothing(
    run, tmp_path, caplog, monkeypatch, tiny_llm, tokenizer
):
    out = tmp_path / "out"
    assert "--draws is 0" in refused(caplog, run, out, "--format=trl", "--draws=0")
    assert "not empty" in refused(caplog, run, run, "--format=trl")
    assert "no run's folder" in refused(caplog, tmp_path, out, "--format=trl")
    assert "no checkpoint 'best'" in refused(caplog, run, out, "--format=trl", "--checkpoint=best")

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == "pyarrow" else find(n))
    assert "pip install pyarrow" in refused(caplog, run, out, "--format=trl", "--parquet")

    unsaved = make_run(tmp_path / "unsaved", settings_of(tiny_llm), tokenizer, saved=False)
    assert "no decision" in refused(caplog, unsaved, out, "--format=trl")
    assert not out.exists()


def test_another_tokenizer_is_refused(run, tmp_path, caplog, tokenizer):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60_000)} | {"?": 60_000}, "?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = type(tokenizer)(tokenizer_object=words)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{}")
    options = ["--format=trl", f"--tokenizer={tmp_path / 'other'}"]
    assert "were not made with the tokenizer" in refused(caplog, run, tmp_path / "out", *options)


def test_a_share_of_the_decisions(run):
    assert len(exported(run, "unpaired", "--count=1")) == 1
