"""The stages of a job, of a gallery and of the sanity checks."""
