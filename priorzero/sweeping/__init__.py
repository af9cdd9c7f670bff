"""Many runs of the main job as processes: what `python -m priorzero.sweep` is made of.

| module | what it holds |
| --- | --- |
| `plan` | the file; the runs it asks for, in their order; their command lines, checked |
| `record` | what is known of a run (run.json), and what is kept of it |
| `process` | a run's process: start, limits, end |
| `budget` | how many runs fit on the machine |
| `scheduler` | runs side by side until none is left |
"""
