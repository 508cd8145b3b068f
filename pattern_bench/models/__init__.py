"""Networks: how they are built, and how their weights are read. See README.md."""
