"""Training: the loop, DeepSpeed's engine, checkpoints, reports and validation."""
