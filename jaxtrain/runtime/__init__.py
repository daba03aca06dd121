"""Devices, processes, signals, caches and files."""
