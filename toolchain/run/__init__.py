"""A whole run: settings, its folder, stages in order, the board's kit, and what looks at a machine or a folder.

May import `report` and what stands above it.
"""
