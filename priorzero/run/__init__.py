"""What surrounds a run: command line, logs, signals, checkpoints, metrics, machine check."""
