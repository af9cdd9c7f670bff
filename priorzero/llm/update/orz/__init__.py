"""Open-Reasoner-Zero's Ray PPO trainer as a trainer of our LLM. docs/ORZ.md says how to use it.

`packs.py` turns decisions into what ORZ reads, `arguments.py` our settings into its own;
`cluster.py` starts or joins Ray; `actors.py` and `session.py` derive from ORZ's classes, and
`mends.py` makes those work on packages of today. The trainer of a run,
`priorzero/llm/update/trainers/orz.py`, drives them. Only `actors.py` and `session.py` import ORZ,
and nothing else imports them before ORZ is used.
"""
