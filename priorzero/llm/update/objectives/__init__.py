"""Objectives of reinforcement, one file each: what a ratio of new to old policy is taken of.

A file is found by its name (`llm.rft.objective`). It has

    make(reduction: str, cot_weight: float) -> Rating

whose `units(answer, action)` names the quantities of a decision that are rated (`Units`).
Advantages, surrogate, corrections and KL are the same for all (`priorzero/llm/update/rft.py`).

With a chain of thought, `cot_weight` > 0 rates the tokens the LLM wrote too; with 0 they are only
what the action stands behind. The action marker was put there, so it is never rated.
"""
