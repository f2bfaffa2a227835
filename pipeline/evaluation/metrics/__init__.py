"""Metrics per task: one file a family."""
