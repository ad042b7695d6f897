"""What runs on a board: builds a bundle's engines there, and answers with them. No torch, no onnx, no transformers.

families/ images              pictures and conversations to graph inputs, for every backend
answer ort                    the batched greedy loop of validation; onnxruntime's graphs
sampling generate chat        one conversation: choosing tokens, streaming text, what of the cache is reused
limits                        the context and the picture that a bundle was planned for
board checks                  what a board is and has, and whether a bundle may be built there
plugin_library selftest       the VQ plugins: found or compiled, and proved on stored vectors
backends builder engine       TensorRT's two forms; one engine; all engines of a bundle with build.json
cuda loaded_engines runtime   CUDA's bindings, engines bound to memory, and generation with them
"""
