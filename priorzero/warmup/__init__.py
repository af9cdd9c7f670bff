"""Fine-tuning an LLM to walkthroughs before any run, on other games than it will be judged on.

| module | what it holds |
| --- | --- |
| `games` | which games are used and which are left out, and why |
| `collect` | their decisions, from walkthroughs and straying episodes; kept on disk |
| `examples` | decisions as token ids; which games are held out |
| `tune` | the training: evaluations, early stop, the watch over plain text |
| `record` | what the folder says of itself: games and families seen, figures before and after |
| `__main__` | the command: `./run_priorzero_orz.sh warmup` |

What is minimised is `SFT` (`priorzero/llm/update/sft.py`) with the commands of the walkthrough in
the place of the search's target, by the same trainer as in a run.
"""
