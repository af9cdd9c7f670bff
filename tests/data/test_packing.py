"""Segments through arrays and files come back with every bit and every type."""

from __future__ import annotations

import dataclasses
import io

import numpy as np
import pytest

from priorzero.data.packing import pack, unpack
from priorzero.data.segment import Segment
from priorzero.types import ActionScores, HistoryItem, TextState, TokenisedRequest
from tests.test_buffer import Episode


def rich_segments() -> list[Segment]:
    """Histories, odd texts, thoughts, missing answers, an empty segment and an open one."""
    plain = Episode(0, [0.1, -2.0, 0.0], "terminated", cuts=[2, 1])
    rich = Episode(1, [1 / 3, 1e-300, 5.0, 7.0], "running", cuts=[4])
    history = (
        HistoryItem("Ouvre la fenêtre! 開ける \ud800", "go", -0.5),
        HistoryItem("", "x", 2.0),
    )
    for t, step in enumerate(rich.steps):
        actions = ("drop some", *step.valid_actions)  # more than the search could choose from
        logprobs = tuple((-1 / (i + 3), -0.1 * t) for i in range(len(step.valid_actions)))
        changed = dict(
            state=TextState(f"room {t}", actions, history[: t % 3], "win", t / 7),
            request=TokenisedRequest((1, 2), (3,) * t, ((4, 5), (6,)), reasoning=t % 2 == 0),
            scores=None
            if t == 3
            else ActionScores(
                logprobs, t, (8,) * t, (-0.3 * t,) * t, cached=t == 2, thought_ended=t == 1
            ),
            prior_weight=t / 9,
            llm_target=np.arange(len(step.valid_actions)) / 7 if t % 2 else None,
        )
        rich.steps[t] = dataclasses.replace(step, **changed)
    rich.steps[1] = dataclasses.replace(rich.steps[1], request=None)
    opened = Segment(3, 9, 50)
    opened.record(dataclasses.replace(rich.steps[0]), np.array([7, 8, 9], np.float32))
    behind = Segment(3, 9, 50, before=rich.steps[1:3])
    behind.record(dataclasses.replace(rich.steps[3]), np.array([7, 8, 9], np.float32))
    return [*plain.segments(), *rich.segments(), Segment(2, 8, 5), opened, behind]


def assert_equal(one: Segment, two: Segment) -> None:
    names = ("env_id", "episode_id", "length", "done_kind")
    assert [getattr(one, n) for n in names] == [getattr(two, n) for n in names]
    assert (one.final_observation is None) == (two.final_observation is None)
    if one.final_observation is not None:
        np.testing.assert_array_equal(one.final_observation, two.final_observation)

    assert len(one) == len(two) and len(one.before) == len(two.before)
    for a, b in zip((*one.before, *one.steps), (*two.before, *two.steps), strict=True):
        for field in dataclasses.fields(a):
            left, right = getattr(a, field.name), getattr(b, field.name)
            assert type(left) is type(right), field.name
            if isinstance(left, np.ndarray):
                assert left.dtype == right.dtype and np.array_equal(left, right), field.name
            else:
                assert left == right, field.name
        if a.scores is not None:
            assert a.scores.cached == b.scores.cached  # equality of scores does not see it


def test_every_bit_comes_back_through_a_file():
    segments, file = rich_segments(), io.BytesIO()
    np.savez(file, **pack(segments))
    file.seek(0)
    with np.load(file, allow_pickle=False) as arrays:
        found = unpack(dict(arrays))
    assert len(found) == len(segments) == 6
    for one, two in zip(segments, found, strict=True):
        assert_equal(one, two)


def test_through_torch_with_its_restricted_loader():
    import torch

    segments, file = rich_segments(), io.BytesIO()
    torch.save({n: torch.from_numpy(np.array(v)) for n, v in pack(segments).items()}, file)
    file.seek(0)
    arrays = {n: v.numpy() for n, v in torch.load(file, weights_only=True).items()}
    for one, two in zip(segments, unpack(arrays), strict=True):
        assert_equal(one, two)


def test_files_from_before_it_was_known_who_ended_a_thought():
    arrays = pack(rich_segments())
    assert arrays.pop("scores_ended").any()
    steps = [step for segment in unpack(arrays) for step in segment.steps]
    assert not any(step.scores.thought_ended for step in steps if step.scores is not None)


def test_files_from_before_the_llm_had_targets_of_its_own():
    arrays = pack(rich_segments())
    assert arrays.pop("llm_target").any() and arrays.pop("llm_target_n").any()
    steps = [step for segment in unpack(arrays) for step in segment.steps]
    assert steps and all(step.llm_target is None for step in steps)


def test_none_at_all():
    assert unpack(pack([])) == []


def test_what_was_one_object_is_one_again_over_several_calls():
    """A buffer full of requests holds each once; see `LLMPrior.requests`."""
    episode, pool = Episode(1, [1.0, 2.0], "running"), {}
    same = episode.steps[0].request
    episode.steps[1] = dataclasses.replace(episode.steps[1], request=same)
    found = [unpack(pack(episode.segments()), pool)[0] for _ in range(2)]
    requests = {id(step.request) for segment in found for step in segment.steps}
    assert len(requests) == 1 and len(pack(episode.segments())["request_body"]) == 1


def test_an_open_segment_goes_on():
    opened = unpack(pack(rich_segments()))[-1]
    assert not opened.is_full() and opened.done_kind == "running"
    opened.record(opened.steps[0], np.zeros(3, np.float32))
    assert len(opened) == 2


@pytest.mark.parametrize("name", ["texts", "segment_steps", "logprobs"])
def test_what_does_not_fit_together_is_refused(name):
    arrays = pack(rich_segments())
    arrays[name] = arrays[name][:-1]
    with pytest.raises((ValueError, AssertionError)):
        unpack(arrays)
