"""Growing and shrinking arrays against plain lists."""

from __future__ import annotations

import numpy as np
import pytest

from priorzero.data.columns import Column, VectorTable


@pytest.mark.parametrize("seed", range(4))
def test_a_column_is_a_list_whose_oldest_entries_go(seed):
    """Through several growths and moves; entries keep their running numbers."""
    rng = np.random.default_rng(seed)
    column, truth, first = Column(np.float64, (2,), first=7), [], 7
    for _ in range(400):
        values = rng.normal(size=(int(rng.integers(0, 40)), 2))
        column.append(values)
        truth += values.tolist()

        if len(truth) > 900 or rng.random() < 0.1:
            gone = int(rng.integers(0, len(truth) + 1))
            column.drop(first + gone)
            first, truth = first + gone, truth[gone:]

        assert (column.first, column.end) == (first, first + len(truth))
        np.testing.assert_array_equal(column.held(), np.array(truth).reshape(-1, 2))
        if truth:
            at = rng.integers(len(truth), size=(3, 2))
            np.testing.assert_array_equal(column[first + at], np.array(truth)[at])
            column[first + at[:, 0]] = 1.5
            for i in at[:, 0].tolist():
                truth[i] = [1.5, 1.5]


def test_what_is_dropped_costs_no_room():
    column = Column(np.int64)
    for start in range(0, 200_000, 100):
        column.append(np.arange(start, start + 100))
        column.drop(max(0, start - 800))
    assert column.held().base.nbytes <= 8 * 4096
    assert column.held().tolist() == list(range(column.first, 200_000))


@pytest.mark.parametrize("seed", range(4))
def test_equal_vectors_share_a_row_until_nobody_names_it(seed):
    rng = np.random.default_rng(seed)
    known = rng.normal(size=(300, 5)).astype(np.float32)
    table, held = VectorTable(5), []  # of (row, which vector)
    for _ in range(60):
        which = rng.integers(300, size=20)
        held += list(zip(table.add(known[i] for i in which).tolist(), which.tolist(), strict=True))

        while len(held) > 250:
            cut = held[:30]
            del held[:30]
            table.release(np.array([row for row, _ in cut]))

        rows, vectors = (np.array(x) for x in zip(*held, strict=True))
        np.testing.assert_array_equal(table[rows[:, None]], known[vectors[:, None]])
        assert len(table) == len(set(vectors.tolist())) == len(set(rows.tolist()))
    table.release(rows)
    assert len(table) == 0


def test_more_users_than_there_are_cannot_leave():
    table = VectorTable(1)
    rows = table.add([np.ones(1, np.float32)] * 2)
    assert rows.tolist() == [rows[0]] * 2
    with pytest.raises(AssertionError):
        table.release(np.array([rows[0]] * 3))
