"""Pictures, and the colours in them: one function per figure."""
