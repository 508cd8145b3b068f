"""Data sets: where images come from, how they are split, and how batches of them are made. See README.md."""
