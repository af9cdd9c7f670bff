"""The language model: which one, how it scores the valid actions of a state, how it is trained.

| module | what it holds |
| --- | --- |
| `model` | which LLM to use, and loading it |
| `scoring` | texts -> token ids, and the log-probabilities of all actions of a state |
| `engines` | who answers: transformers or vLLM, with cache, restarts and fallback around it |
| `prior` | game states -> requests -> the LLM's prior |
| `update` | the protocol of trainers, their objectives, the built-in trainer, the training phase |
| `weights` | how trained weights leave the trainer, and the check that an engine has them |
| `build` | puts the parts together |

No heavy module is imported here: import what you need by its full name.
"""
