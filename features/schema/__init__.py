"""The schema: what a row of a log means."""
