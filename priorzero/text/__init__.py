"""Text to numbers: the frozen sentence encoder and the action vocabulary."""
