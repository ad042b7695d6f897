"""Files that appear whole or not at all: folders, JSON, digests, and the store of a long run's finished pieces.

May import `values` and `errors`.
"""
