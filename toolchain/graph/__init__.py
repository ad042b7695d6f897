"""ONNX graphs: export, rewrite by passes, third-party files, and validation at named taps.

Folders, each above the next: op, passes. May import `evaluate` and what stands above it.
"""
