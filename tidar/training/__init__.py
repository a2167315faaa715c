"""What a run keeps and reports: optimizer, checkpoints, metrics, validation."""
