"""Reports, comparisons and dashboards of many runs: found, laid together, and shown."""
