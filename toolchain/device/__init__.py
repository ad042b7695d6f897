"""What runs on a board: builds a bundle's engines there, and answers with them. No torch, no onnx, no transformers.

    families      images and conversations to graph inputs, for every backend
    runtime       TensorRT and CUDA as this package calls them
    generation    answers, through onnxruntime or engines
    engines       from a bundle to engines that are kept
    profile       where the time of an answer goes
    remote        a verb run on a board over ssh

Each may import those before it, and `bundle` and what stands above it.
"""
