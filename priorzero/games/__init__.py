"""Real text adventures as DI-engine environments.

Role of each module, parent process first:

- `catalogue`: turns an `env_id` into a `GameSpec`, by asking every kind of game.
- `env`: one game as a DI-engine environment; `group`: several of them stepped at once; `rota`:
  which game each plays next, in a run of several; `judging`: the games nothing is trained on.
- `process`: the parent's end of an interpreter process.
- `valid_actions`: what is known of a world state, shared and on disk; `ahead`: finds it out before
  it is needed; `cache` and `cache_file`: carry it from machine to machine.
- `worker`: the interpreter process.
- `kinds`: what a game is, one file per kind, with the contract; `story_files` finds files for
  them, `jericho_stories` and `tw_make` hold what is known of the games of the two kinds.
- `records`: what these modules hand to each other, also over the pipe.

This file imports nothing: the interpreter processes load the package too and must stay light.
"""
