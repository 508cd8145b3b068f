"""The processes of a job: how they start, talk to each other and end."""
