"""The CUDA kernels from Python: the library found and called through ctypes, as torch ops, and what runs without it."""
