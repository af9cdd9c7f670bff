"""alternating: the world model trains for `alternating_wm_updates` updates, the LLM for
`alternating_llm_phases` phases, the world model again, and so on until `iterations`;
`alternating_first` begins. The world model's turn always collects. In the LLM's turn
`alternating_llm_collect` says what is played: everything (the search with the LLM's prior, drawn as
x), world_model (the search without it, drawn as w), nothing.

    alternating_wm_updates = 20, alternating_llm_phases = 2, 10 updates an iteration

    iteration    0     1     2     3     4     5     6     7     8     9
    world model  10    10                10    10                10    10
    LLM                      1     1                 1     1
    collect      x     x     x     x     x     x     x     x     x     x      everything
                 x     x     w     w     x     x     w     w     x     x      world_model
                 x     x                 x     x                 x     x      nothing
"""

from __future__ import annotations

from priorzero.loop import turns
from priorzero.loop.parts import Parts


async def iterate(parts: Parts) -> None:
    """One iteration of the present turn."""
    config = parts.config
    order = turns.Turns(
        wm_updates=config.alternating_wm_updates,
        llm_phases=config.alternating_llm_phases,
        first=config.alternating_first,
        llm_collect=config.alternating_llm_collect,
    )
    await turns.iterate(parts, order)
