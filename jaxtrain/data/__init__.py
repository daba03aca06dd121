"""Text to token stores to batches: each module is imported by name."""
