"""Submissions: what is checked before a job is queued, what is remembered of it, and how far it has come."""
