"""Sinks for experiment trackers, chosen by `--track NAME ...`; a file each."""
