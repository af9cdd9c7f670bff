"""The language model: which one, how it scores the valid actions of a state, and how it is trained.

| module | what it holds | | --- | --- | | `model` | which LLM to use, loading it, exporting its
weights | | `requests` | what is asked of an LLM, and the one function that turns it into token ids
| | `trie`, `tree_forward`, `packed` | all actions of a state behind one copy of its prompt, with or
without gradients | | `prefix_cache`, `trunk` | what is kept between forwards: beginnings of
prompts, outputs of frozen layers | | `engine`, `cached`, `resilient`, `factory` | the interface of
all engines, its wrappers, the choice between engines | | `transformers_engine`, `vllm_engine`,
`vllm_worker`, `vllm_adapters` | the two engines | | `losses`, `trainer`, `canary` | SFT and RFT,
and the check that an engine answers with the trained weights |

No heavy module is imported here: import what you need by its full name.
"""
