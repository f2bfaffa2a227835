"""Cluster backends: where a job is submitted."""
