"""Which code every layer gets and what it costs: bit plans, allocation, shared codebooks. No torch at import.

May import `native` and what stands above it.
"""
