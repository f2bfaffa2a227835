"""Which architecture: models compared on one dataset."""
