"""What scores an explanation. Imports torch, numpy and scipy alone."""
