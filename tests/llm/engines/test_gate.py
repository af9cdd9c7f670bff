"""Requests and changes of weights keep apart, whoever is cancelled."""

from __future__ import annotations

import asyncio

from priorzero.llm.engines.gate import Gate


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_a_change_waits_for_requests_and_holds_new_ones_back():
    gate, seen, leave = Gate(), [], asyncio.Event()

    async def request(name: str, until: asyncio.Event | None = None):
        async with gate.request():
            seen.append(name)
            if until:
                await until.wait()

    async def change():
        async with gate.change():
            seen.append("change")

    tasks = [asyncio.create_task(request("first", leave)), asyncio.create_task(change())]
    await settle()
    tasks.append(asyncio.create_task(request("second")))
    await settle()
    assert seen == ["first"]
    leave.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert seen == ["first", "change", "second"]


async def test_a_cancelled_change_opens_the_gate_again():
    """Cancelled while it waits for a request inside: it used to leave the gate shut for good."""
    gate, leave = Gate(), asyncio.Event()
    went_in: list[str] = []

    async def request():
        async with gate.request():
            went_in.append("request")
            await leave.wait()

    async def change():
        async with gate.change():
            went_in.append("change")

    inside = asyncio.create_task(request())
    await settle()
    waiting = asyncio.create_task(change())
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    leave.set()
    await asyncio.wait_for(inside, 5)
    await asyncio.wait_for(change(), 5)
    leave.set()
    await asyncio.wait_for(request(), 5)
    assert went_in == ["request", "change", "request"]
