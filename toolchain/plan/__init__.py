"""From a config to a verdict: boards, a model's sizes, memory, latency, and what to turn down. No torch at import.

May import `bits` and what stands above it.
"""
