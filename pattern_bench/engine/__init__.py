"""The thin Lightning shells: trainer, modules that stream batches, modules that learn, progress."""
