"""What surrounds a run: the machine check, checkpoints and metrics."""
