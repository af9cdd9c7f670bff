"""The prompt variants of the prior report. Light: the command line reads their names here."""

from __future__ import annotations

VARIANTS = {
    "bare": dict(history_length=0, include_valid_actions=False, use_cot=False),
    "history": dict(include_valid_actions=False, use_cot=False),
    "list": dict(history_length=0, include_valid_actions=True, use_cot=False),
    "history+list": dict(include_valid_actions=True, use_cot=False),
    "thought": dict(include_valid_actions=True, use_cot=True),
}
"""Prompt variants: what each changes in the prompt settings. bare: the present observation alone.
history: recent steps too. list: the valid commands are named. thought: both, and a chain of thought
before the command.
"""
