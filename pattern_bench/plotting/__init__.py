"""Pictures, and the colours in them."""
