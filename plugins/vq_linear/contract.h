// Generated from toolchain/graph/op/vq_op.py by
//     python -m toolchain.graph.op.vq_op > plugins/vq_linear/contract.h
// Do not edit: a test compares this file with what its generator writes.
#pragma once

namespace mgvq::contract {

inline constexpr char kDomain[] = "mgvq";
inline constexpr char kPluginVersion[] = "1";
inline constexpr char kPluginNamespace[] = "";
inline constexpr int kFormatVersion = 1;
inline constexpr int kRowGroup = 128;  // rows are padded to this
inline constexpr int kColumnGroup = 16;  // columns are padded to this
inline constexpr int kChunkRows = 16;  // rows of a chunk: windows of its stream
inline constexpr int kRowStride = 8;  // distance of neighbouring rows of a chunk

inline constexpr char kLinearName[] = "VQLinear";
// y = x Wᵀ + bias, W[i, block] = scales[i] · table[window] (toolchain/vq/format.py); the plugin rounds x to float16
inline constexpr int kLinearInputX = 0;  // float|float16 [..., columns]
inline constexpr int kLinearInputCodes = 1;  // int8 [bytes] in device order ([R, 8, C, 16] in the reference form)
inline constexpr int kLinearInputTable = 2;  // int8|float16 [2^window, vector]
inline constexpr int kLinearInputScales = 3;  // float16 [rows]
inline constexpr int kLinearInputBias = 4;  // float|float16 [rows], optional
inline constexpr int kLinearRequiredInputs = 4;
inline constexpr int kLinearInputs = 5;  // output: [..., rows]

inline constexpr char kEmbeddingName[] = "VQEmbedding";
// y[..., :] = W[ids[...], :] with the W of VQLinear; only the rows asked for are decoded
inline constexpr int kEmbeddingInputIds = 0;  // int64|int32 [...], 0 <= id < rows
inline constexpr int kEmbeddingInputCodes = 1;  // int8 [bytes] in device order ([R, 8, C, 16] in the reference form)
inline constexpr int kEmbeddingInputTable = 2;  // int8|float16 [2^window, vector]
inline constexpr int kEmbeddingInputScales = 3;  // float16 [rows]
inline constexpr int kEmbeddingRequiredInputs = 4;
inline constexpr int kEmbeddingInputs = 4;  // output: [..., columns]

// Attributes of both ops, all of them int.
inline constexpr char kAttributeRows[] = "rows";  // 1..2147483647: outputs of the weight before padding to 128
inline constexpr char kAttributeColumns[] = "columns";  // 1..2147483647: inputs of the weight before padding to 16
inline constexpr char kAttributeVector[] = "vector";  // 2..4: V: weights a lookup, 2 (float16 table) or 4 (int8 table)
inline constexpr char kAttributeShift[] = "shift";  // 1..8: k: stream bits a lookup
inline constexpr char kAttributeWindow[] = "window";  // 1..9: L: window bits, at least shift
inline constexpr char kAttributeFormatVersion[] = "format_version";  // 1..1: version of the weight format
inline constexpr int kRequiredAttributes = 6;

// VQLinear's alone; 0 where it is absent.
inline constexpr char kAttributeAllowInt8[] = "allow_int8";  // 0..1: tactics may round x to int8 (vector = 4 has them)

}  // namespace mgvq::contract
