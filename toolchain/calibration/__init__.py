"""Calibration data and what it says of a model: manifests, self-answers, statistics of activations and of gradients.

May import `checkpoint` and what stands above it.
"""
