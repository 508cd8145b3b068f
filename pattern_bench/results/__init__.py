"""What a run leaves: columns and keys of its files, and how results are written for people."""
