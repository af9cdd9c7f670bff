"""Real text adventures as DI-engine environments.

Role of each module, parent process first:

- ``catalogue``: turns an ``env_id`` into a :class:`~priorzero.games.catalogue.GameSpec`;
  ``story_files`` and ``generate`` help it.
- ``env``: one game as a DI-engine environment; ``group``: several of them stepped at once.
- ``process``: the parent's end of an interpreter process; ``valid_actions``: what is known of a
  world state, shared and on disk.
- ``worker``: the interpreter process; ``backends``: Jericho and TextWorld behind one interface;
  ``records``: what crosses the pipe.

This file imports nothing: the interpreter processes load the package too and must stay light.
"""
