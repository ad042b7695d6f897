"""The mathematics of vector-quantized weights: arrays in, arrays out; no files, no models, no graph.

May import `files`, `values` and `errors`.

Symbols used in this package (rows are outputs, columns are inputs of y = W x):

    W   float32[m, n]        weight                          Ŵ   its decoded version
    H   float32[n, n]        second moment of the inputs, E[x xᵀ], symmetric positive semidefinite
    V, k, L                  weights a lookup, stream bits a lookup, window bits (values.VQCode)
    T   [2^L, V]             codebook; float16 pairs or int8 quads, used as float32
    a   float16[m]           row scales; Ŵ[i, block] = a[i] · T[window]
    R, g, C, t               row group, chunk within it, column chunk, window within the chunk
    U, D                     H = U D Uᵀ, U unit block-upper-triangular, D block-diagonal with V×V blocks D_b
    E                        W − Ŵ

The objective everywhere is tr(E H Eᵀ), the squared error of the layer's output on the calibration inputs.
"""
