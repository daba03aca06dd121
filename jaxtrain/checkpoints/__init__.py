"""Checkpoints: save, verify, restore, retention, warm start."""
