// Every matrix of the published models (toolchain/bench/shapes.py). Generated, and compared by a test:
//     python tests/layer_table.py > tests/plugins/kernels/layer_shapes.h
#pragma once

#include <cstdint>

struct LayerShape {
  int64_t rows, columns;
};

inline constexpr LayerShape kLayerShapes[] = {
    {128, 256},  // demo one of qkv
    {256, 256},  // demo o
    {256, 384},  // demo down
    {256, 1536},  // qwen2-vl-2b one of qkv
    {384, 256},  // demo one of gate_up
    {512, 256},  // demo qkv
    {512, 3584},  // qwen2-vl-7b one of qkv
    {768, 256},  // demo gate_up
    {1024, 588},  // internvl2-8b vision.patch
    {1024, 1024},  // internvl2-8b vision.proj
    {1024, 4096},  // internvl2-8b vision.fc2
    {1152, 588},  // llava-onevision-7b vision.patch
    {1152, 1152},  // llava-onevision-7b vision.proj
    {1152, 4304},  // llava-onevision-7b vision.fc2
    {1280, 1176},  // qwen2-vl-2b vision.patch
    {1280, 1280},  // qwen2-vl-2b vision.proj
    {1280, 5120},  // qwen2-vl-2b vision.fc2
    {1536, 1536},  // qwen2-vl-2b o
    {1536, 5120},  // qwen2-vl-2b projector.2
    {1536, 8960},  // qwen2-vl-2b down
    {2048, 1536},  // qwen2-vl-2b qkv
    {3072, 1024},  // internvl2-8b vision.qkv
    {3456, 1152},  // llava-onevision-7b vision.qkv
    {3584, 1152},  // llava-onevision-7b projector.1
    {3584, 3584},  // qwen2-vl-7b o
    {3584, 5120},  // qwen2-vl-7b projector.2
    {3584, 18944},  // qwen2-vl-7b down
    {3840, 1280},  // qwen2-vl-2b vision.qkv
    {4096, 1024},  // internvl2-8b vision.fc1
    {4096, 4096},  // internvl2-8b o
    {4096, 14336},  // internvl2-8b down
    {4304, 1152},  // llava-onevision-7b vision.fc1
    {4608, 3584},  // qwen2-vl-7b qkv
    {5120, 1280},  // qwen2-vl-2b vision.fc1
    {5120, 5120},  // qwen2-vl-2b projector.1
    {6144, 4096},  // internvl2-8b qkv
    {8960, 1536},  // qwen2-vl-2b one of gate_up
    {14336, 4096},  // internvl2-8b one of gate_up
    {17920, 1536},  // qwen2-vl-2b gate_up
    {18944, 3584},  // qwen2-vl-7b one of gate_up
    {28672, 4096},  // internvl2-8b gate_up
    {37888, 3584},  // qwen2-vl-7b gate_up
    {92553, 4096},  // internvl2-8b head
    {151936, 1536},  // qwen2-vl-2b head
    {152064, 3584},  // qwen2-vl-7b head
};
