"""From a bundle to engines that are kept: checks of the board, the build, comparison with the model's stored answers.

May import `device.generation` and what stands above it.
"""
