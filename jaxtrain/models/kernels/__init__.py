"""Attention kernels, linear layers and pointwise functions, with derivatives of their own."""
