"""The VQ node: its one contract, its body in standard operators, its form in torch and on the CPU.

May import `evaluate` and what stands above it.
"""
