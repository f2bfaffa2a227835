"""A first schema from raw files: what they hold, and what a row of them may mean."""
