"""Metrics per task: a file a family, and their registry."""
