"""jaxtrain: cross-entropy, AdamW, learning-rate schedules and gradient clipping around one pure JAX train step."""

__version__ = "0.1.0"
