"""Where the figures of a run go besides its own files: TensorBoard, MLflow, Prometheus."""
