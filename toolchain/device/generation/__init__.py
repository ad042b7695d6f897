"""Answers from a bundle, through onnxruntime or engines: decoding, sampling, conversations and their limits.

May import `device.runtime` and what stands above it.
"""
