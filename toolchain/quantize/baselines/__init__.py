"""Methods to compare with: RTN, GPTQ, nearest codeword, GPTVQ- and VPTQ-style.

May import `quantize.driver` and what stands above it.
"""
