"""The Beam job that turns raw logs into a dataset."""
