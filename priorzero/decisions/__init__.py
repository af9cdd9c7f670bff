"""Every decision of a run as it was taken: what was seen, what LLM, world model and search made of
it, and what came of it. Players record (`recorder.py`), commands read (`reader.py`), and
docs/DECISIONS.md tells what stands in a line (`record.py`).
"""
