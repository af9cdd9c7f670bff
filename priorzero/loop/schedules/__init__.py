"""Schedules, one file each: `async def iterate(parts: Parts) -> None` does one iteration.

`wm_training_mode` names the file. A new schedule is a new file here, made of the stages in
`priorzero/loop/stages.py`; the loop around it counts iterations, evaluates and saves.
"""
