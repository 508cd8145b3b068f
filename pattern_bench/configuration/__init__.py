"""Settings: where they are, what they build, what they reach, and what a folder may say of them."""
