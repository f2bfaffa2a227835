"""A dataset's card: statistics of its train split, and drift from an earlier dataset."""
