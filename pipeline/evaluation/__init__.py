"""Evaluation of checkpoints: metrics per task, as checkpoints are committed or afterwards."""
