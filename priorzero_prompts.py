"""What the LLM reads: the story's door to `priorzero/llm/prompts.py`, which builds it.

With the default settings a prompt is, in the chat template of the LLM:

    system  You are playing a text adventure. You read what the game says and choose the next
            command.
            Goal: ...
            Answer with one line: "Action:" followed by the command and nothing else.
            The command must be one of the valid actions, copied exactly.

    user    Recent steps, oldest first:

            Observation: ...
            Action: open mailbox
            Reward: 0

            Current observation:
            ...

            Valid actions: close mailbox; go north; read leaflet

    assistant  Action:

and the LLM says how likely each valid action is to come next. `PromptSettings` (group `llm.prompt`)
leaves out the past steps or the list, or asks for a chain of thought first. The code lies in the
package because what works without the training's entry, such as the prior report
(`python -m priorzero.prior_report`), builds the same prompts, and the package imports no root file.
"""

from priorzero.llm.prompts import (
    ACTION_MARKER,
    CUT_MARK,
    REASONING_MARKER,
    PromptParts,
    PromptTruncation,
    build_prompt,
    prompt_builder,
    system_text,
    user_text,
)
from priorzero.settings.llm import PromptSettings

__all__ = [
    "ACTION_MARKER",
    "CUT_MARK",
    "REASONING_MARKER",
    "PromptParts",
    "PromptSettings",
    "PromptTruncation",
    "build_prompt",
    "prompt_builder",
    "system_text",
    "user_text",
]
