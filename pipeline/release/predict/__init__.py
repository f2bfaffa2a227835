"""Raw logs without labels to Parquet files of predictions."""
