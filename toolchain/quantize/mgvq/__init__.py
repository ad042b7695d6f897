"""The stages of MGVQ, one a file: survey, permutation, sensitivity, bit plan, sweep; and the recipe of its parts.

May import `quantize.baselines` and what stands above it; as it stands it needs `quantize.driver` alone.
"""
