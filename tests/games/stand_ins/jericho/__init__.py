"""Stands in for Jericho in interpreter processes: a "story" whose interpreter fails on request.

The story file says what fails: words like `open:crash`, `reset:raise`, `describe:hang`. The
game is a row of rooms, east and west; `crash` and `hang` are commands of it, so that an episode
can fail at any step.
"""

import ctypes
import os
import signal
from pathlib import Path


def fail(how: str) -> None:
    if how == "crash":
        # As C code does: no Python exception, no clean-up.
        os.kill(os.getpid(), signal.SIGSEGV)
    elif how == "hang":
        # PyDLL keeps the interpreter lock, as endless loops in C code do.
        ctypes.PyDLL(None).sleep(3600)
    elif how == "raise":
        raise OSError("the story is damaged")


class UnsupportedGameWarning(UserWarning):
    pass


class FrotzEnv:
    def __init__(self, path, seed=None):
        words = Path(path).read_text().split()
        self._failures = dict(word.split(":") for word in words if ":" in word)
        self._room = self._moves = 0
        self._fail_in("open")

    def _fail_in(self, method: str) -> None:
        fail(self._failures.get(method, ""))

    def seed(self, seed):
        pass

    def reset(self):
        self._fail_in("reset")
        self._room = self._moves = 0
        return "You are in a row of rooms.", self._info()

    def step(self, action):
        fail(action)
        self._room += {"east": 1, "west": -1}.get(action, 0)
        self._moves += 1
        return f"Room {self._room}.", 0, False, self._info()

    def _info(self):
        return {"score": self._room, "moves": self._moves}

    def get_max_score(self):
        return 42

    def victory(self):
        return False

    def _emulator_halted(self):
        return False

    def get_world_objects(self, clean):
        return (ctypes.c_int32 * 2)(self._room, 7)

    def _get_special_ram(self):
        return []

    def get_state(self):
        # The same shape as Jericho's: nine entries, the eighth of them the random numbers' state.
        return (self._room, self._moves, 0, 0, 0, 0, 0, (0, 0, 0), b"")

    def set_state(self, state):
        self._room, self._moves = state[:2]

    def get_valid_actions(self, **settings):
        self._fail_in("describe" if self._room == 0 else "describe_later")
        return ["west", "east", "crash", "hang"]
