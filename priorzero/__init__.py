"""The parts PriorZero is made of; docs/ARCHITECTURE.md names each, and who may import whom.

The root files (`priorzero_*.py`, `game_buffer_priorzero.py`) tell the story with these parts;
nothing in this package imports a root file.
"""
