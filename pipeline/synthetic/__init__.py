"""Event logs whose true probabilities are known."""
