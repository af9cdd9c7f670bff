"""sequential: the world model trains for `sequential_wm_updates` updates, then the LLM for
`sequential_llm_phases` phases; then the run ends, or with `sequential_repeat` begins again with the
world model and goes on until `iterations`. Every iteration collects.

    sequential_wm_updates = 25, sequential_llm_phases = 2, 10 updates an iteration

    iteration    0     1     2     3     4     5     6     7     8     9
    collect      x     x     x     x     x     x     x     x     x     x
    world model  10    10    5                 10    10    5
    LLM                            1     1                       1     1
                                           ^
                                           the end without sequential_repeat
"""

from __future__ import annotations

from priorzero.loop import turns
from priorzero.loop.parts import Parts


async def iterate(parts: Parts) -> None:
    """One iteration of the present turn."""
    config = parts.config
    order = turns.Turns(config.sequential_wm_updates, config.sequential_llm_phases)
    await turns.iterate(parts, order)


def finished(parts: Parts) -> bool:
    """Whether both had their turn and nothing is repeated."""
    return not parts.config.sequential_repeat and parts.progress.turns >= 2
