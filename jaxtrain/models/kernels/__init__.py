"""Attention kernels, matrix products and pointwise functions."""
