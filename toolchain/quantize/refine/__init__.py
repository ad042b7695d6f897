"""What is optional: rotation, K-segments, shared codebooks, Jacobi rounds, fine-tuning. The line is whole without it.

May import `quantize.mgvq` and what stands above it.
"""
