"""What measures us: how long our own stages take on the machine they run on, at the sizes of published models.

May import `run` and what stands above it.
"""
