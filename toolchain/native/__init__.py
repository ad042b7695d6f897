"""The compiled kernels from Python: the library found, built, and called. May import `vq` and what stands above it."""
