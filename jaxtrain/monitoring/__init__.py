"""Metrics, health rules, console, report and profile of a run."""
