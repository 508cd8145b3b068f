"""Files that are whole or not there: cache, tensors, locks, unfinished state, and what others may have written."""
