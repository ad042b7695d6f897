"""Checkpoints: folders and headers, quantized modules, loading, writing, permuted columns, transformers' loader.

May import `models` and what stands above it.
"""
