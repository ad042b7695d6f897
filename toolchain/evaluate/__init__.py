"""How good a quantized model is: answers, KL to full precision, errors layer by layer, methods against one another.

May import `quantize` and what stands above it.
"""
