"""The benchmark suite that tells which explanation of a neural network to believe."""
