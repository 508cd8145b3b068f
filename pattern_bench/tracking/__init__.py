"""Trackers of experiments: W&B, TensorBoard, CSV. See README.md."""
