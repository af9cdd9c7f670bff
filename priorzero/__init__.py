"""The parts PriorZero is made of: games, text, llm, world model, search, data, run.

The root files (`priorzero_*.py`, `game_buffer_priorzero.py`) tell the story with these parts;
nothing in this package imports a root file.
"""
