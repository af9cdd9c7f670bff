"""A run's decisions as prompts for ORZ: question and answer by hand."""

from __future__ import annotations

import json

import pytest
from transformers import AutoTokenizer

from priorzero.export_orz import PROMPTS, main
from priorzero.llm.prompts import system_text, user_text
from priorzero.settings.llm import PromptSettings
from tests.test_export_samples import ACTIONS, TARGETS, make_run, settings_of, state


@pytest.fixture(autouse=True)
def quiet_logging(monkeypatch):
    """The command's own handlers would outlive the test's terminal."""
    monkeypatch.setattr("priorzero.export_orz.setup_logging", lambda folder: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_llm):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llm)
    return make_run(tmp_path_factory.mktemp("orz") / "run", settings_of(tiny_llm), tokenizer)


def test_a_dialogue_is_what_was_asked_and_what_the_search_prefers(run, tmp_path):
    assert main([str(run), str(tmp_path / "out")]) == 0
    dialogues = json.loads((tmp_path / "out" / PROMPTS).read_text(encoding="utf-8"))
    facts = json.loads((tmp_path / "out" / "priorzero.json").read_text(encoding="utf-8"))
    assert (facts["decisions"], facts["format"], facts["game"]) == (2, "orz", "tw-simple")

    for step, best in ((0, "look"), (1, "take lamp")):
        parts = [text(state(step), PromptSettings()) for text in (system_text, user_text)]
        (found,) = [d for d in dialogues if d[0]["value"] == "\n\n".join(parts)]
        assert len(found) == 2
        truth = found[1]["ground_truth"]
        assert truth["value"] == best
        assert truth["valid_actions"] == list(ACTIONS[step])
        assert truth["target_policy"] == pytest.approx(TARGETS[step])


def test_what_cannot_be_written_is_told_and_leaves_nothing(run, tmp_path, caplog):
    out = tmp_path / "out"
    for arguments, told in (
        ((run, out, "--count=0"), "--count is 0"),
        ((run, run), "not empty"),
        ((tmp_path, out), "no run's folder"),
    ):
        caplog.clear()
        assert main([str(a) for a in arguments]) == 2
        assert told in caplog.text
    assert not out.exists()
