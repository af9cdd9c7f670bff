"""Arrays that grow at one end and shrink at the other, and a table of vectors that keeps equal ones
once. `store.py` is made of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np


class Column:
    """A growing array whose oldest entries go. An entry is known by its running number, from the
    first ever appended.

    The entries lie in one piece, so that reading many of them is one indexing operation. The piece
    doubles when it is full, and moves to the front once half of it is gone.

    Args:
        dtype: of the entries.
        shape: of one entry.
        first: running number of the first entry to come.
    """

    def __init__(self, dtype: type, shape: tuple[int, ...] = (), first: int = 0) -> None:
        self._values = np.zeros((1024, *shape), dtype=dtype)
        self._first = self._offset = self._end = first  # _offset: running number of _values[0]

    @property
    def first(self) -> int:
        """Running number of the oldest entry that is held."""
        return self._first

    @property
    def end(self) -> int:
        """Running number of the next entry."""
        return self._end

    def append(self, values: np.ndarray) -> None:
        """Add entries `[n, ...]`."""
        self._reserve(len(values))
        start = self._end - self._offset
        self._values[start : start + len(values)] = values
        self._end += len(values)

    def drop(self, until: int) -> None:
        """Forget all entries before this running number."""
        assert self._first <= until <= self._end
        self._first = until

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        """Copies of entries by running number, of any shape; they must still be held."""
        return self._values[numbers - self._offset]

    def __setitem__(self, numbers: np.ndarray | int, values: np.ndarray | float) -> None:
        self._values[numbers - self._offset] = values

    def held(self) -> np.ndarray:
        """A view of all entries, oldest first, until the next `append`."""
        return self._values[self._first - self._offset : self._end - self._offset]

    def _reserve(self, more: int) -> None:
        """Make room for so many entries at the end."""
        held, capacity = self.held(), len(self._values)
        if self._end - self._offset + more <= capacity:
            return
        if 2 * (len(held) + more) > capacity:
            capacity = max(2 * capacity, len(held) + more)
        values = np.zeros((capacity, *self._values.shape[1:]), dtype=self._values.dtype)
        values[: len(held)] = held
        self._values, self._offset = values, self._first


class VectorTable:
    """Vectors `[E]` in one array, equal ones once.

    Text games show the same few texts again and again, so that steps name a row here instead of
    holding a vector each. A row is reused when nobody names it any more.

    Args:
        dim: `E`.
    """

    def __init__(self, dim: int) -> None:
        self._rows = np.zeros((64, dim), dtype=np.float32)
        self._users = np.zeros(64, dtype=np.int64)
        self._free = list(range(63, -1, -1))
        self._row_of: dict[bytes, int] = {}
        self._digests = [b""] * 64

    def __len__(self) -> int:
        """Distinct vectors in use."""
        return len(self._row_of)

    def add(self, vectors: Iterable[np.ndarray]) -> np.ndarray:
        """Rows int32 `[n]` of these float32 vectors, each with one user more."""
        return np.array([self._add(vector) for vector in vectors], dtype=np.int32)

    def _add(self, vector: np.ndarray) -> int:
        assert vector.dtype == np.float32 and vector.shape == self._rows.shape[1:]
        digest = hashlib.blake2b(vector.tobytes(), digest_size=16).digest()
        row = self._row_of.get(digest)
        if row is None:
            row = self._row_of[digest] = self._take_row()
            self._rows[row], self._digests[row] = vector, digest
        self._users[row] += 1
        return row

    def _take_row(self) -> int:
        if not self._free:
            size = len(self._rows)
            self._rows = np.concatenate([self._rows, np.zeros_like(self._rows)])
            self._users = np.concatenate([self._users, np.zeros_like(self._users)])
            self._digests += [b""] * size
            self._free = list(range(2 * size - 1, size - 1, -1))
        return self._free.pop()

    def release(self, rows: np.ndarray) -> None:
        """One user less for each of these rows `[n]`; a row may stand there several times."""
        np.subtract.at(self._users, rows, 1)
        assert (self._users[rows] >= 0).all()
        for row in np.unique(rows[self._users[rows] == 0]).tolist():
            del self._row_of[self._digests[row]]
            self._free.append(row)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Copies of vectors: rows `[...]` -> `[..., E]`."""
        return self._rows.take(rows, axis=0)
