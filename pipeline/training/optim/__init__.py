"""Optimisers and task weighting."""
