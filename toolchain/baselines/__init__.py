"""Methods to compare with, behind the interface of `toolchain.vq.weights.Method`."""
