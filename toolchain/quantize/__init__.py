"""The line from calibration to a quantized checkpoint (`line`), methods by name, and a run whole or not at all.

Folders, each above the next: driver, baselines, mgvq, refine. May import `calibration` and what stands above it.
"""
