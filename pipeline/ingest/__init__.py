"""The job that turns raw logs into a dataset."""
