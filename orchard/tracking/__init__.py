"""Metrics of a run: the log file, TensorBoard, W&B and MLflow."""
