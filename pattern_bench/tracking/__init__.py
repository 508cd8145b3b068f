"""Experiment trackers: W&B, TensorBoard, CSV."""
