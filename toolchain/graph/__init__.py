"""ONNX graphs: the op's one contract, export, the rewrite passes and the comparison at named taps."""
