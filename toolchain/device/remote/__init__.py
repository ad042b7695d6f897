"""A verb run on a board over ssh: inputs sent by content, its output brought back whole.

May import `device.profile` and what stands above it.
"""
