"""Schedules, one file each. Each has

    async def iterate(parts: Parts) -> None     does one iteration
    def finished(parts: Parts) -> bool          optional: the run may end before `iterations`

`wm_training_mode` names the file. A new schedule is a new file here, made of the stages in
`priorzero/loop/stages.py`; the loop around it counts iterations, evaluates and saves. What a
schedule has to remember belongs into `Progress`, which is saved, so that a resumed run goes on
where it was.
"""
