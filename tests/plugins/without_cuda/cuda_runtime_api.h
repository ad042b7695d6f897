// The three names that kernels.h takes from CUDA, for a host library of its functions on a machine without CUDA's headers.
#pragma once

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
using cudaStream_t = struct CUstream_st*;
