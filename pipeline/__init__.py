"""How rows and weights move: ingest, dataset, training, evaluation."""
