"""TensorRT, CUDA and the board as this package calls them: backends, builder, loaded engines, the plugin's library.

May import `device.families` and what stands above it.
"""
