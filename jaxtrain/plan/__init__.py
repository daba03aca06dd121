"""Memory, traffic, time and cost of a run, before it starts."""
