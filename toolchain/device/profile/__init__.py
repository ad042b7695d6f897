"""Where the time of an answer goes: phases, layers, clocks and memory, beside what was predicted.

May import `device.engines` and what stands above it.
"""
