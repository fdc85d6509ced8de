"""Record the metrics of a run in a log file, TensorBoard, W&B and MLflow."""
