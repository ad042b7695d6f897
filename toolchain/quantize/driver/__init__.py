"""One walk over a model's groups for every method, what a method is asked, and how long it still takes.

May import `calibration` and what stands above it.
"""
