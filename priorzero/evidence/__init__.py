"""What an LLM's prior is worth, measured without training: the parts of the prior report.

| module | what it holds |
| --- | --- |
| `walk` | a game's walkthrough, with what every valid command would have led to |
| `kept` | walks on disk, for the next report or warm-up |
| `metrics` | ranks, calibration, reductions: pure functions |
| `variants` | the prompts an LLM is asked with |
| `scores` | what an LLM says to every step of a walk |
| `play` | whole episodes of the LLM alone, and of uniform play |
| `search` | what a run's search makes of the prior |
| `choice` | which reduction and temperature do best, by family of games |
| `measure` | all of it, game by game and LLM by LLM |
| `page`, `plots` | tables, one page, pictures |

The command is `python -m priorzero.prior_report`.

Letters: `A` valid commands of a state, `N` decisions.
"""
