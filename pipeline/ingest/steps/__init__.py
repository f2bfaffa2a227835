"""The steps of the ingest job."""
