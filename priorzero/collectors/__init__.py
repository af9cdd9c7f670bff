"""Collectors in processes of their own, on this machine or others, which feed one learner.

`remote.py` is the learner's side: a collector like any other, whose environments are spread over
Ray actors. `worker.py` is an actor, `messages.py` what goes between the two. `vocabulary.py` keeps
an action's id the same everywhere.
"""
