"""A run's agent, taken from its folder, to be asked one decision at a time: network, search,
vocabulary, sentence encoder, and the trained LLM where somebody wants it. Nothing is trained, and
the run's files stay as they are. For commands that look at a run: replan, play.
"""
