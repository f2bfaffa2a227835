"""What a row means: schema, statistics, encoders, Batch."""
