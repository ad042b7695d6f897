"""What is carried to a board: the manifest with its hashes, and what the board has to have. No torch at import.

May import `plan` and what stands above it.
"""
