"""What is collected and what is trained on: steps, segments, batches."""
