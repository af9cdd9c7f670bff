"""Segments as plain arrays and back, for files: nothing is pickled and nothing is rounded.

What steps share (texts, embeddings, token ids) is written once: a table holds the distinct values
and the columns hold positions in it. Ragged columns are two arrays, the values of all rows in a
row and `<name>_n`, how many belong to each.

Letters: `N` steps of all segments together, `E` embedding width.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from priorzero.data.segment import DONE_KINDS, Segment, StepRecord
from priorzero.types import ActionScores, HistoryItem, TextState, TokenisedRequest

Arrays = dict[str, np.ndarray]
Pool = dict[Any, Any]
T = TypeVar("T", bound=Hashable)

_PER_ACTION = ("valid_ids", "visit_counts", "behaviour", "target_policy")  # `[A]` of each step
_SCALARS = {
    "action_index": np.int64,
    "root_value": np.float64,
    "predicted_value": np.float64,
    "reward": np.float64,
    "timestep": np.int64,
    "prior_weight": np.float64,
}
_NONE = -1  # position of what is not there


class _Table:
    """Distinct values in order of first sight."""

    def __init__(self) -> None:
        self._positions: dict[Any, int] = {}

    def add(self, value: Hashable) -> int:
        return self._positions.setdefault(value, len(self._positions))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._positions)


def pack(segments: Sequence[Segment]) -> Arrays:
    """All of these segments but their successors; `unpack` undoes it.

    Returns:
        arrays without objects, so that `np.load(allow_pickle=False)` and `torch.load(
        weights_only=True)` take them.
    """
    steps = [step for segment in segments for step in (*segment.before, *segment.steps)]
    texts, vectors = _Table(), _Table()

    arrays = _pack_steps(steps, vectors)
    arrays |= _pack_states([step.state for step in steps], [s.valid_actions for s in steps], texts)
    arrays |= _pack_llm(steps)
    arrays |= _pack_segments(segments, vectors, texts)

    arrays["texts"] = np.frombuffer(json.dumps(list(texts)).encode("ascii"), dtype=np.uint8)
    flat = np.frombuffer(b"".join(vectors), dtype=np.float32)
    arrays["vectors"] = flat.reshape(len(list(vectors)), -1) if len(flat) else flat.reshape(0, 0)
    return arrays


def _pack_segments(segments: Sequence[Segment], vectors: _Table, texts: _Table) -> Arrays:
    final = [s.final_observation for s in segments]
    return {
        "segment_env": np.array([s.env_id for s in segments], dtype=np.int64),
        "segment_episode": np.array([s.episode_id for s in segments], dtype=np.int64),
        "segment_length": np.array([s.length for s in segments], dtype=np.int64),
        "segment_before": np.array([len(s.before) for s in segments], dtype=np.int64),
        "segment_steps": np.array([len(s) for s in segments], dtype=np.int64),
        "segment_game": np.array(
            [texts.add(s.game) if s.game else _NONE for s in segments], dtype=np.int64
        ),
        "segment_final": np.array(
            [_NONE if v is None else vectors.add(_bytes(v)) for v in final], dtype=np.int64
        ),
    }


def _pack_steps(steps: Sequence[StepRecord], vectors: _Table) -> Arrays:
    """Numbers of each step."""
    arrays: Arrays = {
        name: np.array([getattr(s, name) for s in steps], dtype=kind)
        for name, kind in _SCALARS.items()
    }
    arrays["observation"] = np.array([vectors.add(_bytes(s.observation)) for s in steps], np.int64)
    arrays["done_kind"] = np.array([DONE_KINDS.index(s.done_kind) for s in steps], np.int64)
    for name in _PER_ACTION:
        rows = [getattr(s, name) for s in steps]
        arrays[name] = np.concatenate(rows) if rows else np.zeros(0)
    arrays["actions_n"] = np.array([len(s.valid_actions) for s in steps], np.int64)
    own = [() if s.llm_target is None else s.llm_target for s in steps]
    return arrays | _ragged("llm_target", own, np.float64)


def _pack_states(
    states: Sequence[TextState], valid: Sequence[tuple[str, ...]], texts: _Table
) -> Arrays:
    """What the LLM was shown, and the actions that the search could choose from."""
    items = _Table()
    arrays: Arrays = {
        "state_text": np.array([texts.add(s.observation) for s in states], np.int64),
        "state_goal": np.array([texts.add(s.goal) for s in states], np.int64),
        "state_score": np.array([s.score for s in states], np.float64),
    }
    arrays |= _ragged("state_actions", ([texts.add(a) for a in s.valid_actions] for s in states))
    arrays |= _ragged("valid_actions", ([texts.add(a) for a in own] for own in valid))
    arrays |= _ragged("state_history", ([items.add(i) for i in s.history] for s in states))
    arrays["item_text"] = np.array([texts.add(i.observation) for i in items], np.int64)
    arrays["item_action"] = np.array([texts.add(i.action) for i in items], np.int64)
    arrays["item_reward"] = np.array([i.reward for i in items], np.float64)
    return arrays


def _pack_llm(steps: Sequence[StepRecord]) -> Arrays:
    """Requests and scores; steps that share one hold the same position."""
    tokens, requests = _Table(), _Table()
    asked = [_NONE if s.request is None else requests.add(s.request) for s in steps]

    # The tuples themselves live in the steps, so that their ids tell them apart.
    answers: dict[int, tuple[int, tuple[tuple[float, ...], ...]]] = {}
    answered, versions, thoughts, written, ended, cached = [], [], [], [], [], []
    for step in steps:
        scores = step.scores or ActionScores(())
        logprobs = scores.token_logprobs
        position = answers.setdefault(id(logprobs), (len(answers), logprobs))[0]
        answered.append(_NONE if step.scores is None else position)
        versions.append(scores.weights_version)
        thoughts.append(tokens.add(scores.thought_ids))
        written.append(scores.thought_logprobs)
        ended.append(scores.thought_ended)
        cached.append(scores.cached)

    rows = [logprobs for _, logprobs in answers.values()]
    arrays: Arrays = {
        "request": np.array(asked, np.int64),
        "scores": np.array(answered, np.int64),
        "scores_version": np.array(versions, np.int64),
        "scores_thought": np.array(thoughts, np.int64),
        "scores_ended": np.array(ended, bool),
        "scores_cached": np.array(cached, bool),
        "request_head": np.array([tokens.add(r.head_ids) for r in requests], np.int64),
        "request_body": np.array([tokens.add(r.body_ids) for r in requests], np.int64),
        "request_reasoning": np.array([r.reasoning for r in requests], bool),
    }
    arrays |= _ragged("request_actions", ([tokens.add(a) for a in r.action_ids] for r in requests))
    arrays |= _ragged("tokens", tokens)
    arrays |= _ragged("thought_logprobs", written, np.float64)
    arrays["answers_n"] = np.array([len(row) for row in rows], np.int64)
    return arrays | _ragged("logprobs", (part for row in rows for part in row), np.float64)


def _bytes(vector: np.ndarray) -> bytes:
    assert vector.dtype == np.float32, vector.dtype
    return vector.tobytes()


def _ragged(name: str, rows: Iterable[Sequence], kind: type = np.int64) -> Arrays:
    rows = list(rows)
    values = [value for row in rows for value in row]
    lengths = [len(row) for row in rows]
    return {name: np.array(values, kind), f"{name}_n": np.array(lengths, np.int64)}


# ---- the way back --------------------------------------------------------------------------------


def unpack(arrays: Mapping[str, np.ndarray], pool: Pool | None = None) -> list[Segment]:
    """The segments of `pack`, without successors.

    Args:
        pool: values met so far, by themselves; given to several calls, their equal texts, states
            and requests become one object each.
    """
    pool = {} if pool is None else pool
    texts = [_pooled(pool, t) for t in json.loads(arrays["texts"].tobytes().decode("ascii"))]
    steps = _unpack_steps(arrays, texts, pool)
    vectors = arrays["vectors"]
    # Earlier files do not tell.
    games = arrays.get("segment_game", np.full(len(arrays["segment_env"]), _NONE)).tolist()

    segments, start = [], 0
    columns = ("env", "episode", "length", "before", "steps", "final")
    for env, episode, length, before, count, final, game in zip(
        *(arrays[f"segment_{c}"].tolist() for c in columns), games, strict=True
    ):
        first = start + before
        name = "" if game == _NONE else texts[game]
        segment = Segment(env, episode, length, steps[start:first], name)
        segment.steps = steps[first : first + count]
        segment.final_observation = None if final == _NONE else vectors[final]
        segments.append(segment)
        start = first + count
    assert start == len(steps)
    return segments


def _unpack_steps(
    arrays: Mapping[str, np.ndarray], texts: Sequence[str], pool: Pool
) -> list[StepRecord]:
    states = _unpack_states(arrays, texts, pool)
    requests = _unpack_requests(arrays, pool)
    scores = _unpack_scores(arrays, pool)

    vectors, valid = arrays["vectors"], _rows(arrays, "valid_actions")
    scalars = {name: arrays[name].tolist() for name in _SCALARS}
    actions = {name: _cut(arrays[name], arrays["actions_n"]) for name in _PER_ACTION}
    observations, kinds = arrays["observation"].tolist(), arrays["done_kind"].tolist()
    asked = arrays["request"].tolist()
    # Earlier files have no targets of the LLM's own.
    own = [None] * len(states)
    if "llm_target" in arrays:
        own = _cut(arrays["llm_target"], arrays["llm_target_n"])
    return [
        StepRecord(
            state=states[i],
            observation=vectors[observations[i]],
            valid_actions=_pooled(pool, tuple(texts[a] for a in valid[i])),
            done_kind=DONE_KINDS[kinds[i]],
            request=None if asked[i] == _NONE else requests[asked[i]],
            scores=scores[i],
            llm_target=own[i] if own[i] is not None and len(own[i]) else None,
            **{name: column[i] for name, column in (scalars | actions).items()},
        )
        for i in range(len(states))
    ]


def _unpack_states(
    arrays: Mapping[str, np.ndarray], texts: Sequence[str], pool: Pool
) -> list[TextState]:
    columns = ("item_text", "item_action", "item_reward")
    items = [
        _pooled(pool, HistoryItem(texts[text], texts[action], reward))
        for text, action, reward in zip(*(arrays[c].tolist() for c in columns), strict=True)
    ]
    columns = ("state_text", "state_goal", "state_score")
    plain = zip(*(arrays[c].tolist() for c in columns), strict=True)
    ragged = zip(_rows(arrays, "state_actions"), _rows(arrays, "state_history"), strict=True)
    return [
        TextState(
            texts[text],
            _pooled(pool, tuple(texts[a] for a in valid)),
            tuple(items[i] for i in history),
            texts[goal],
            score,
        )
        for (text, goal, score), (valid, history) in zip(plain, ragged, strict=True)
    ]


def _unpack_requests(arrays: Mapping[str, np.ndarray], pool: Pool) -> list[TokenisedRequest]:
    tokens = [_pooled(pool, tuple(row)) for row in _rows(arrays, "tokens")]
    columns = ("request_head", "request_body", "request_reasoning")
    plain = zip(*(arrays[c].tolist() for c in columns), strict=True)
    return [
        _pooled(
            pool,
            TokenisedRequest(
                tokens[head], tokens[body], tuple(tokens[a] for a in actions), reasoning
            ),
        )
        for (head, body, reasoning), actions in zip(
            plain, _rows(arrays, "request_actions"), strict=True
        )
    ]


def _unpack_scores(arrays: Mapping[str, np.ndarray], pool: Pool) -> list[ActionScores | None]:
    """One per step."""
    tokens = _rows(arrays, "tokens")
    parts = [tuple(row) for row in _rows(arrays, "logprobs")]
    ends = np.cumsum(arrays["answers_n"]).tolist()
    answers = [tuple(parts[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
    written = _rows(arrays, "thought_logprobs")
    # Earlier files do not tell.
    ended = arrays.get("scores_ended", np.zeros(len(arrays["scores"]), bool))
    columns = ("scores", "scores_version", "scores_thought", "scores_cached")
    return [
        None
        if answer == _NONE
        else ActionScores(
            token_logprobs=answers[answer],
            weights_version=version,
            thought_ids=_pooled(pool, tuple(tokens[thought])),
            thought_logprobs=tuple(own),
            thought_ended=closed,
            cached=cached,
        )
        for answer, version, thought, cached, closed, own in zip(
            *(arrays[c].tolist() for c in columns), ended.tolist(), written, strict=True
        )
    ]


def _pooled(pool: Pool, value: T) -> T:
    return pool.setdefault(value, value)


def _cut(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    ends = np.cumsum(lengths).tolist()
    assert (ends[-1] if ends else 0) == len(values)
    return [values[a:b] for a, b in zip([0, *ends], ends, strict=False)]


def _rows(arrays: Mapping[str, np.ndarray], name: str) -> list[list]:
    return [row.tolist() for row in _cut(arrays[name], arrays[f"{name}_n"])]
