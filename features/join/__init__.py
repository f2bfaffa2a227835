"""Outcomes and histories, joined to impressions."""
