"""Runs against runs, from the files they leave: what `python -m priorzero.compare` is made of.

| module | what it holds |
| --- | --- |
| `statistics` | interquartile mean, bootstrap intervals, probability of improvement |
| `runs` | a run's folder as one curve; groups of runs that differ only in the seed |
| `figures` | groups at equal environment steps and at equal time |
| `published` | published scores beside ours, from `published.json` |
| `page`, `plots` | table, files, picture |

Letters: `N` runs of a group, `R` resamples.
"""
