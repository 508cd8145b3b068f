"""The processes of a job: how they start, exchange tensors and end. See README.md."""
