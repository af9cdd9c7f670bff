"""Many requests at a time, or one change: no answer may mix two versions of the weights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable


class Gate:
    """Of one event loop. Leaving never waits, so a cancelled task cannot leave it shut."""

    def __init__(self) -> None:
        self._inside = 0
        self._changing = False
        self._waiting: set[asyncio.Future[None]] = set()

    @contextlib.asynccontextmanager
    async def request(self):
        """Enter beside other requests; waits while there is a change."""
        await self._until(lambda: not self._changing)
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            self._wake()

    @contextlib.asynccontextmanager
    async def change(self):
        """Enter alone: waits for the requests inside, and holds new ones back meanwhile."""
        await self._until(lambda: not self._changing)
        self._changing = True
        try:
            await self._until(lambda: self._inside == 0)
            yield
        finally:
            self._changing = False
            self._wake()

    async def _until(self, holds: Callable[[], bool]) -> None:
        while not holds():
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
