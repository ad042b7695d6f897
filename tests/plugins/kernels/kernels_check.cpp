// kernels.h end to end, small and ragged, every code and every tactic, with arrays that end where their last element ends:
// against the reference in double, with whatever stood in the workspace, and with nothing written beside the result.
//
//     kernels_check host     the emulated kernels, between guarded pages
//     kernels_check cuda     libmgvq_kernels.so on the GPU; 77 where there is none. What compute-sanitizer is run on
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "placed_memory.h"
#include "vq_linear/dispatch.h"
#include "vq_linear/kernels.h"
#include "vq_linear/reference.h"

using namespace mgvq;

namespace {

constexpr int64_t kBeside = 3;  // elements between the rows of y, which must stay what they were
constexpr uint16_t kUntouched = 0x7bcd;
constexpr double kHalfUlp = 1.0 / 2048, kSmallest = 1.0 / (1 << 24);

struct SegmentShape {
  Code code;
  int64_t columns;
};

// A weight on the host: what the reference reads, and what is copied to where the kernels read.
struct Weight {
  int64_t rows, columns = 0;
  std::vector<std::vector<uint8_t>> codes, tables;
  std::vector<std::vector<uint16_t>> scales;
  std::vector<MgvqReferenceSegment> segments;

  Weight(int64_t rows_, const std::vector<SegmentShape>& shapes, std::mt19937& random) : rows(rows_) {
    for (const SegmentShape& shape : shapes) {
      codes.emplace_back(codes_bytes(shape.code, rows, shape.columns));
      for (uint8_t& byte : codes.back()) byte = static_cast<uint8_t>(random());
      tables.emplace_back(shape.code.table_bytes());
      for (std::size_t i = 0; i < tables.back().size(); i += 2) {
        // fp16 of magnitude 0.5 to 2, or two int8 without -128.
        const uint16_t half = static_cast<uint16_t>((random() & 0x83ff) | 0x3800 | (random() & 0x400));
        const int8_t bytes[2] = {static_cast<int8_t>(random() % 255 - 127), static_cast<int8_t>(random() % 255 - 127)};
        std::memcpy(&tables.back()[i], shape.code.vector == 2 ? static_cast<const void*>(&half) : bytes, 2);
      }
      scales.emplace_back(rows);
      for (uint16_t& scale : scales.back()) scale = static_cast<uint16_t>(0x2000 + random() % 0x800);
      columns += shape.columns;
    }
    for (std::size_t i = 0; i < shapes.size(); ++i)
      segments.push_back({codes[i].data(), tables[i].data(), scales[i].data(), shapes[i].columns, shapes[i].code.vector,
                          shapes[i].code.shift, shapes[i].code.window, 0});
  }
  MgvqReferenceMatrix matrix() const { return {segments.data(), rows, static_cast<int32_t>(segments.size()), 0}; }
};

struct Placed {
  std::vector<MgvqSegment> segments;
  MgvqMatrix matrix;

  Placed(const Weight& weight, PlacedMemory& memory) {
    for (std::size_t i = 0; i < weight.segments.size(); ++i) {
      const MgvqReferenceSegment& s = weight.segments[i];
      segments.push_back({memory.put(weight.codes[i].data(), weight.codes[i].size(), 16),
                          memory.put(weight.tables[i].data(), weight.tables[i].size(), 16),
                          memory.put(weight.scales[i].data(), 2 * weight.scales[i].size(), 2), s.columns, s.vector, s.shift,
                          s.window, 0});
    }
    matrix = {segments.data(), weight.rows, static_cast<int32_t>(segments.size()), 0};
  }
};

// Eighths from -1 to 1: every type of x holds them, and powers of two times them.
std::vector<float> activations(int64_t count, std::mt19937& random) {
  std::vector<float> out(count);
  for (float& value : out) value = (static_cast<int>(random() % 17) - 8) / 8.0f;
  return out;
}

std::vector<uint8_t> bytes_of(const std::vector<float>& values, MgvqType type) {
  const bool is_short = type == kMgvqFloat16 || type == kMgvqBfloat16;
  std::vector<uint8_t> out(values.size() * (is_short ? 2 : 4));
  for (std::size_t i = 0; i < values.size(); ++i) {
    uint32_t word;
    std::memcpy(&word, &values[i], 4);
    if (type == kMgvqFloat16) word = mgvq_reference_half_from_float(values[i]);
    if (type == kMgvqBfloat16) word >>= 16;  // exact: eighths have few bits
    std::memcpy(&out[i * (is_short ? 2 : 4)], &word, is_short ? 2 : 4);
  }
  return out;
}

struct Expected {
  std::vector<double> y, magnitude, int8_error;  // the last: what rounding x to int8 can change
};

Expected expected_of(const Weight& weight, const std::vector<float>& x, const std::vector<float>& bias, int64_t tokens) {
  Expected out;
  out.y.resize(tokens * weight.rows), out.magnitude = out.y, out.int8_error = out.y;
  const MgvqReferenceMatrix matrix = weight.matrix();
  mgvq_reference_linear(&matrix, x.data(), bias.data(), tokens, out.y.data(), out.magnitude.data());
  std::vector<float> dense(weight.rows * weight.columns);
  mgvq_reference_decode(&matrix, dense.data());
  for (int64_t token = 0; token < tokens; ++token) {
    double largest = 0;
    for (int64_t i = 0; i < weight.columns; ++i) largest = std::fmax(largest, std::fabs(x[token * weight.columns + i]));
    for (int64_t row = 0; row < weight.rows; ++row) {
      double sum = 0;
      for (int64_t i = 0; i < weight.columns; ++i) sum += std::fabs(dense[row * weight.columns + i]);
      out.int8_error[token * weight.rows + row] = sum * largest / 254 * (1 + 1e-5);
    }
  }
  return out;
}

struct Case {
  const Weight& weight;
  const MgvqMatrix& placed;
  PlacedMemory& memory;
  int64_t tokens;
  MgvqType x_type;
  const void* x;
  const void* bias;

  // y fp16[tokens, rows + kBeside] of one launch with a workspace full of `fill`; empty where it failed.
  std::vector<uint16_t> run(int32_t tactic, uint8_t fill) const {
    const int64_t stride = weight.rows + kBeside, needed = mgvq_linear_workspace(&placed, x_type, tokens, tactic);
    EXPECT(needed >= 0, "tactic %d: %s", tactic, mgvq_reason());
    if (needed < 0) return {};
    std::vector<uint16_t> y(tokens * stride, kUntouched);
    const std::vector<uint8_t> room(needed, fill);
    void* const workspace = memory.put(room.data(), room.size(), 16);
    // The last row ends with the array: nothing lies beside it.
    void* const out = memory.put(y.data(), 2 * (y.size() - kBeside), 2);
    const cudaError_t status = mgvq_linear(&placed, x, x_type, weight.columns, out, kMgvqFloat16, stride, bias,
                                           kMgvqFloat32, tokens, tactic, workspace, needed, nullptr);
    EXPECT(status == cudaSuccess, "tactic %d: error %d, %s", tactic, static_cast<int>(status), mgvq_reason());
    if (status != cudaSuccess) return {};
    memory.get(y.data(), out, 2 * (y.size() - kBeside));
    return y;
  }
};

void check_tactic(const Case& one, const Tactic& tactic, const Expected& expected, const std::string& what) {
  const int64_t rows = one.weight.rows;
  const std::vector<uint16_t> y = one.run(id_of(tactic), 0xff), again = one.run(id_of(tactic), 0x00);
  EXPECT(y == again, "%s: the workspace's contents show in the result", what.c_str());
  int64_t wrong = 0, touched = 0;
  for (std::size_t i = 0; i < y.size(); ++i) {
    const int64_t token = static_cast<int64_t>(i) / (rows + kBeside), row = static_cast<int64_t>(i) % (rows + kBeside);
    if (row >= rows) {
      touched += y[i] != kUntouched;
      continue;
    }
    const int64_t place = token * rows + row;
    double allowed = 1e-5 * expected.magnitude[place] + kHalfUlp * std::fabs(expected.y[place]) + kSmallest;
    if (tactic.activations == Activations::kInt8) allowed += (1 + kHalfUlp) * expected.int8_error[place];
    wrong += !(std::fabs(mgvq_reference_float_from_half(y[i]) - expected.y[place]) <= allowed);
  }
  EXPECT(wrong == 0 && touched == 0, "%s tactic %d: %lld values wrong, %lld written beside y", what.c_str(), id_of(tactic),
         static_cast<long long>(wrong), static_cast<long long>(touched));
}

void check_linear(PlacedMemory& memory, const Device& device, int64_t rows, const std::vector<SegmentShape>& shapes,
                  int64_t tokens, MgvqType x_type) {
  std::mt19937 random(static_cast<unsigned>(rows * 131 + tokens));
  const Weight weight(rows, shapes, random);
  const std::vector<float> x = activations(tokens * weight.columns, random), bias = activations(rows, random);
  const Placed placed(weight, memory);
  const std::vector<uint8_t> x_bytes = bytes_of(x, x_type);
  const Case one{weight, placed.matrix, memory, tokens, x_type,
                 memory.put(x_bytes.data(), x_bytes.size(), x_bytes.size() / x.size()),
                 memory.put(bias.data(), 4 * bias.size(), 4)};
  const Expected expected = expected_of(weight, x, bias, tokens);
  Problem problem{};
  problem.tokens = tokens, problem.rows = rows, problem.segment_count = static_cast<int>(shapes.size());
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    problem.segments[i].code = shapes[i].code;
    problem.segments[i].columns = shapes[i].columns;
  }
  Tactic tactics[64];
  const int count = valid_tactics(problem, device, true, tactics, 64);
  for (int i = 0; i < count; ++i)
    check_tactic(one, tactics[i], expected,
                 std::to_string(rows) + "x" + std::to_string(weight.columns) + " in (" +
                     std::to_string(shapes[0].code.vector) + "," + std::to_string(shapes[0].code.shift) + "," +
                     std::to_string(shapes[0].code.window) + "), " + std::to_string(tokens) + " tokens of type " +
                     std::to_string(x_type));
  memory.clear();
}

// Row gathers and the dense weight, in arrays without a byte to spare.
void check_gathers(PlacedMemory& memory, int64_t rows, const std::vector<SegmentShape>& shapes) {
  std::mt19937 random(7);
  const Weight weight(rows, shapes, random);
  const Placed placed(weight, memory);
  std::vector<float> dense(rows * weight.columns);
  const MgvqReferenceMatrix matrix = weight.matrix();
  mgvq_reference_decode(&matrix, dense.data());
  std::vector<uint16_t> found(dense.size());
  void* const out = memory.put(found.data(), 2 * found.size(), 2);
  EXPECT(mgvq_dequantize(&placed.matrix, out, weight.columns, nullptr) == cudaSuccess, "%s", mgvq_reason());
  memory.get(found.data(), out, 2 * found.size());
  int64_t wrong = 0;
  for (std::size_t i = 0; i < found.size(); ++i) wrong += found[i] != mgvq_reference_half_from_float(dense[i]);
  const int64_t ids[] = {rows - 1, 0, rows, -1};
  std::vector<float> picked(4 * weight.columns, -1.0f);
  void* const rows_out = memory.put(picked.data(), 4 * picked.size(), 4);
  const cudaError_t status = mgvq_embedding(&placed.matrix, memory.put(ids, sizeof ids, 8), kMgvqInt64, 4, rows_out,
                                            kMgvqFloat32, nullptr);
  EXPECT(status == cudaSuccess, "%s", mgvq_reason());
  memory.get(picked.data(), rows_out, 4 * picked.size());
  for (int64_t i = 0; i < 4; ++i)
    for (int64_t column = 0; column < weight.columns; ++column) {
      const bool is_row = ids[i] >= 0 && ids[i] < rows;
      wrong += picked[i * weight.columns + column] != (is_row ? dense[ids[i] * weight.columns + column] : 0.0f);
    }
  EXPECT(wrong == 0, "%lldx%lld: %lld values wrong", static_cast<long long>(rows), static_cast<long long>(weight.columns),
         static_cast<long long>(wrong));
  memory.clear();
}

bool ask_device(Device* out) {
  int device = 0, major = 0, minor = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return false;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  cudaDeviceGetAttribute(&out->multiprocessors, cudaDevAttrMultiProcessorCount, device);
  cudaDeviceGetAttribute(&out->shared_bytes_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  out->sm = 10 * major + minor;
  return true;
}

void check_all(PlacedMemory& memory) {
  Device device{};
  EXPECT(ask_device(&device), "the device's attributes");
  const MgvqType types[] = {kMgvqFloat16, kMgvqFloat32, kMgvqBfloat16, kMgvqFloat32Scaled};
  int turn = 0;
  for (const Code& code : kCodes) {
    for (auto [rows, columns] : {std::pair<int64_t, int64_t>{1, 1}, {127, 50}, {130, 200}})
      for (int64_t tokens : {1, 17, 70})
        check_linear(memory, device, rows, {{code, columns}}, tokens, types[turn++ % 4]);
    check_gathers(memory, 131, {{code, 45}});
  }
  const std::vector<SegmentShape> three = {{{2, 8, 9}, 64}, {{2, 3, 8}, 128}, {{4, 8, 9}, 40}};
  for (int64_t tokens : {9, 65})
    for (MgvqType type : types) check_linear(memory, device, 200, three, tokens, type);
  check_gathers(memory, 200, three);
}

}  // namespace

int main(int count, char** arguments) {
  const std::string where = count == 2 ? arguments[1] : "";
#if defined(MGVQ_EMULATE)
  if (where == "host") {
    for (bool is_at_end : {true, false}) check_all(*guarded_memory(is_at_end));
    return report();
  }
#else
  if (where == "cuda") {
    const std::unique_ptr<PlacedMemory> memory = device_memory();
    if (!memory) {
      std::printf("no CUDA device\n");
      return 77;
    }
    check_all(*memory);
    return report();
  }
#endif
  std::printf("usage: kernels_check host|cuda, the one it was compiled for\n");
  return 2;
}
