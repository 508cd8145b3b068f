"""Settings: where they are, how they are checked, what they build, and which results depend on them. See README.md."""
