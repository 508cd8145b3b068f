"""Files that are whole or missing: the cache, tensors, locks, unfinished states, and what others may have written. See
README.md."""
