"""What a checkpoint is worth: metrics per task, followed as checkpoints are committed."""
