"""What the workstation knows about families of VLMs: one file each, and nothing about families anywhere else.

The half of a family that the board needs too (images, prompts, positions) is in `toolchain.device.families`.
May import `device` and what stands above it.
"""
