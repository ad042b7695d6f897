// enqueue on real memory: plugin, dispatcher, kernels and the numbers, against the reference decoder.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "checks.h"
#include "runs.h"
#include "vq_linear/dispatch.h"

namespace {

using nvinfer1::DataType;

constexpr int64_t kRows = 200, kColumns = 88;  // neither fills its groups of 128 and 16

std::vector<uint8_t> stored(const std::vector<float>& values, DataType type) {
  std::vector<uint8_t> bytes(values.size() * (type == DataType::kHALF ? 2 : 4));
  for (std::size_t i = 0; i < values.size(); ++i) {
    const uint16_t small = half(values[i]);
    if (type == DataType::kHALF)
      std::memcpy(&bytes[2 * i], &small, 2);
    else
      std::memcpy(&bytes[4 * i], &values[i], 4);
  }
  return bytes;
}

std::vector<float> loaded(const std::vector<uint8_t>& bytes, std::size_t count, DataType type) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) {
    uint16_t small;
    if (type == DataType::kHALF) {
      std::memcpy(&small, &bytes[2 * i], 2);
      values[i] = from_half(small);
    } else {
      std::memcpy(&values[i], &bytes[4 * i], 4);
    }
  }
  return values;
}

// Integers from -3 to 3, exact in every type; else Gaussian.
std::vector<float> random_values(std::size_t count, bool is_exact, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> gaussian;
  std::vector<float> values(count);
  for (float& value : values) value = is_exact ? static_cast<float>(random() % 7) - 3 : gaussian(random);
  return values;
}

// y and Σ |w·x| of the reference for activations as the kernels round them.
struct Expected {
  std::vector<double> y, magnitude;
  std::vector<float> x;
};

Expected expected_of(const Weight& weight, std::vector<float> x, DataType type, const std::vector<float>& bias) {
  for (float& value : x)
    if (type == DataType::kHALF) value = from_half(half(value));
  mgvq_reference_round_activations(x.data(), static_cast<int64_t>(x.size()), x.data());
  const int64_t tokens = static_cast<int64_t>(x.size()) / weight.columns;
  Expected out{std::vector<double>(static_cast<std::size_t>(tokens * weight.rows)), {}, x};
  out.magnitude = out.y;
  const MgvqReferenceSegment segment = weight.segment();
  const MgvqReferenceMatrix matrix{&segment, weight.rows, 1, 0};
  if (mgvq_reference_linear(&matrix, x.data(), bias.empty() ? nullptr : bias.data(), tokens, out.y.data(),
                            out.magnitude.data()))
    check(false, "the reference refused: %s", mgvq_reference_reason());
  return out;
}

// The most of what rounding `value` once to the type can change.
double half_ulp(double value, DataType type) {
  const double size = std::fabs(value);
  return type == DataType::kHALF ? std::max(size, 6.2e-5) * 0x1p-11 : std::max(size, 1e-38) * 0x1p-24;
}

// Largest error as a share of what is allowed: 1e-5 Σ|w·x| for the order of summation, and one rounding. `slack`
// [tokens] is what int8 activations add: Σ|w| times half a step of the token.
double worst_share(const std::vector<float>& found, const Expected& expected, DataType type, const Weight& weight,
                   bool is_int8) {
  std::vector<double> row_sums(static_cast<std::size_t>(weight.rows), 0.0);
  if (is_int8) {
    const Expected ones =
        expected_of(weight, std::vector<float>(static_cast<std::size_t>(weight.columns), 1.0f), DataType::kFLOAT, {});
    row_sums = ones.magnitude;
  }
  double worst = 0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const auto token = static_cast<int64_t>(i) / weight.rows, row = static_cast<int64_t>(i) % weight.rows;
    const float* x = &expected.x[static_cast<std::size_t>(token * weight.columns)];
    float largest = 0;
    for (int64_t c = 0; c < weight.columns; ++c) largest = std::max(largest, std::fabs(x[c]));
    const double step = is_int8 ? largest / 127.0 : 0.0;
    const double allowed = 1e-5 * expected.magnitude[i] + half_ulp(expected.y[i], type) +
                           0.501 * step * row_sums[static_cast<std::size_t>(row)];
    const double error = std::fabs(found[i] - expected.y[i]);
    if (!(error <= allowed)) worst = std::max(worst, error / std::max(allowed, 1e-300));
    worst = std::max(worst, allowed > 0 ? error / allowed : 0.0);
  }
  return worst;
}

struct Case {
  std::vector<int64_t> leading;
  DataType type;
  bool has_bias;
  DataType bias_type;
};

Run run_of(const Weight& weight, const Case& shape, const std::vector<float>& x, const std::vector<float>& bias) {
  Run run{
      call_of(weight, shape.leading, shape.type, shape.type, shape.has_bias ? &shape.bias_type : nullptr), {}, {}, 0};
  run.first = stored(x, shape.type);
  if (shape.has_bias) run.bias = stored(bias, shape.bias_type);
  return run;
}

void check_linear(Library& library, Memory& memory, const Weight& weight, const Case& shape, bool is_exact) {
  int64_t tokens = 1;
  for (const int64_t size : shape.leading) tokens *= size;
  const Plugin plugin = attached(library.linear, fields_of(weight));
  const auto x = random_values(static_cast<std::size_t>(tokens * weight.columns), is_exact, 7);
  auto bias = random_values(static_cast<std::size_t>(shape.has_bias ? weight.rows : 0), is_exact, 8);
  if (shape.bias_type == DataType::kHALF)
    for (float& value : bias) value = from_half(half(value));
  const Run run = run_of(weight, shape, x, bias);
  const std::vector<uint8_t> bytes = enqueue(plugin, weight, run, memory);
  const Expected expected = expected_of(weight, x, shape.type, bias);
  if (!margin_stayed(bytes)) {
    check(false, "VQLinear ran and wrote inside its output: %s", library.logger.take().c_str());
    return;
  }
  const std::vector<float> found = loaded(bytes, expected.y.size(), shape.type);
  bool is_equal = true;
  for (std::size_t i = 0; i < found.size(); ++i) is_equal &= found[i] == expected.y[i];
  const double share = worst_share(found, expected, shape.type, weight, false);
  check(is_exact ? is_equal : share <= 1.0, "VQLinear (%d,%d,%d) %d tokens, x %s, bias %s, %s: %s", weight.code.vector,
        weight.code.shift, weight.code.window, int(tokens), shape.type == DataType::kHALF ? "fp16" : "fp32",
        !shape.has_bias                      ? "none"
        : shape.bias_type == DataType::kHALF ? "fp16"
                                             : "fp32",
        is_exact ? "exact arithmetic" : "random",
        is_exact ? "bit for bit" : (std::to_string(share) + " of the budget").c_str());
}

void check_every_tactic(Library& library, Memory& memory, const mgvq::Code& code, int64_t tokens) {
  const Weight weight = random_weight(code, kRows, 520, false, 3);
  const Plugin planned = create(library.linear, fields_of(weight, true));
  const Case shape{{tokens}, DataType::kFLOAT, true, DataType::kFLOAT};
  const auto x = random_values(static_cast<std::size_t>(tokens * weight.columns), false, 9);
  const auto bias = random_values(static_cast<std::size_t>(weight.rows), false, 10);
  Run run = run_of(weight, shape, x, bias);
  if (configure(planned, profile_of(run.call, tokens, tokens, tokens)) != 0) {
    check(false, "a profile of %d tokens: %s", int(tokens), library.logger.take().c_str());
    return;
  }
  std::vector<int32_t> tactics(static_cast<std::size_t>(planned.build->getNbTactics()));
  planned.build->getValidTactics(tactics.data(), static_cast<int32_t>(tactics.size()));
  const Plugin plugin = attached(library.linear, fields_of(weight, true));
  const Expected expected = expected_of(weight, x, shape.type, bias);
  const std::vector<uint8_t> by_default = enqueue(plugin, weight, run, memory);
  for (const int32_t id : tactics) {
    mgvq::Tactic tactic{};
    mgvq::tactic_from_id(id, &tactic);
    const bool is_int8 = tactic.activations == mgvq::Activations::kInt8;
    run.tactic = id;
    const std::vector<uint8_t> bytes = enqueue(plugin, weight, run, memory),
                               again = enqueue(plugin, weight, run, memory);
    const double share = margin_stayed(bytes) ? worst_share(loaded(bytes, expected.y.size(), shape.type), expected,
                                                            shape.type, weight, is_int8)
                                              : 1e30;
    check(share <= 1.0 && bytes == again,
          "(%d,%d,%d) %d tokens, tactic %s split %d %s: %f of the budget, twice the same", code.vector, code.shift,
          code.window, int(tokens), tactic.regime == mgvq::Regime::kSkinny ? "skinny" : "tiled", tactic.split,
          is_int8 ? "int8" : "fp16", share);
  }
}

void check_embedding(Library& library, Memory& memory, const mgvq::Code& code, DataType ids_type, DataType type) {
  const Weight weight = random_weight(code, kRows, kColumns, false, 4);
  const Plugin plugin = attached(library.embedding, fields_of(weight));
  const std::vector<int64_t> ids{0, 199, 128, 127, 5, 5, -1, 200};  // the last two lie outside: zeros
  Run run{call_of(weight, {2, 4}, ids_type, type), {}, {}, 0};
  for (const int64_t id : ids) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(&id);
    run.first.insert(run.first.end(), bytes, bytes + (ids_type == DataType::kINT64 ? 8 : 4));
  }
  std::vector<float> expected(ids.size() * static_cast<std::size_t>(weight.columns));
  const MgvqReferenceSegment segment = weight.segment();
  const MgvqReferenceMatrix matrix{&segment, weight.rows, 1, 0};
  const bool has_reference =
      mgvq_reference_embedding(&matrix, ids.data(), static_cast<int64_t>(ids.size()), expected.data()) == 0;
  const std::vector<uint8_t> bytes = enqueue(plugin, weight, run, memory), wanted = stored(expected, type);
  check(has_reference && margin_stayed(bytes) && std::equal(wanted.begin(), wanted.end(), bytes.begin()),
        "VQEmbedding (%d,%d,%d) %s ids to %s: bit for bit", code.vector, code.shift, code.window,
        ids_type == DataType::kINT64 ? "int64" : "int32", type == DataType::kHALF ? "fp16" : "fp32");
}

void check_copies(Library& library, Memory& memory) {
  const Weight weight = random_weight({2, 4, 8}, kRows, kColumns, false, 5);
  const Plugin plugin = attached(library.linear, fields_of(weight));
  const Case shape{{3, 2}, DataType::kHALF, false, DataType::kHALF};
  const Run run = run_of(weight, shape, random_values(6 * kColumns, false, 11), {});
  const std::vector<uint8_t> first = enqueue(plugin, weight, run, memory);
  const Plugin clone(plugin.whole->clone());
  check(margin_stayed(first) && enqueue(clone, weight, run, memory) == first, "a clone gives the same bits");
  const Case with_bias{{3, 2}, DataType::kHALF, true, DataType::kHALF};
  const Run second = run_of(weight, with_bias, random_values(6 * kColumns, false, 11), random_values(kRows, false, 12));
  const std::vector<uint8_t> biased = enqueue(plugin, weight, second, memory);
  const Plugin prepared(plugin.whole->clone());
  check(biased != first && margin_stayed(biased) && enqueue_prepared(prepared, weight, second, memory) == biased,
        "a clone of a plugin that is ready is ready, bias and all");
  const std::vector<uint8_t> replayed = enqueue_prepared(prepared, weight, second, memory, true, 0, true);
  check(replayed == biased, memory.has_graphs() ? "captured in a CUDA graph and launched twice: the same bits"
                                                : "enqueued twice into the same output: the same bits");
  // So is its tactic.
  const Weight quads = random_weight({4, 8, 8}, kRows, kColumns, false, 13);
  const Plugin rounding = attached(library.linear, fields_of(quads, true));
  Run by_int8 = run_of(quads, shape, random_values(6 * kColumns, false, 14), {});
  const std::vector<uint8_t> by_default = enqueue(rounding, quads, by_int8, memory);
  by_int8.tactic = mgvq::id_of({mgvq::Regime::kSkinny, mgvq::Activations::kInt8, 1});
  const std::vector<uint8_t> rounded = enqueue(rounding, quads, by_int8, memory);
  const Plugin rounding_too(rounding.whole->clone());
  check(margin_stayed(rounded) && rounded != by_default &&
            enqueue_prepared(rounding_too, quads, by_int8, memory) == rounded,
        "a clone keeps the tactic");
  Run flat = run;
  flat.call = call_of(weight, {6}, DataType::kHALF, DataType::kHALF);
  check(enqueue(plugin, weight, flat, memory) == first, "rank 3 and rank 2 give the same bits");
  Run none = run_of(weight, {{0}, DataType::kHALF, false, DataType::kHALF}, {}, {});
  const std::vector<uint8_t> nothing = enqueue(plugin, weight, none, memory);
  check(nothing == std::vector<uint8_t>(kMargin, kCanary), "no tokens: nothing is written, nothing refused");
  check(library.logger.take().empty(), "no message about any of it");
}

}  // namespace

void check_runs(Library& library, Memory& memory) {
  const DataType half_type = DataType::kHALF, floating = DataType::kFLOAT;
  const std::vector<Case> cases{{{}, half_type, false, half_type},   {{1}, floating, true, floating},
                                {{9}, half_type, true, half_type},   {{4, 3}, floating, false, half_type},
                                {{17}, half_type, true, floating},   {{1, 40}, half_type, true, half_type},
                                {{5, 14}, floating, true, half_type}};
  for (const mgvq::Code& code : mgvq::kCodes) {
    for (const bool is_exact : {true, false}) {
      const Weight weight = random_weight(code, kRows, kColumns, is_exact, 2);
      for (const Case& shape : cases) check_linear(library, memory, weight, shape, is_exact);
    }
    for (const DataType ids : {DataType::kINT32, DataType::kINT64})
      for (const DataType type : {half_type, floating}) check_embedding(library, memory, code, ids, type);
  }
  for (const mgvq::Code& code : {mgvq::Code{2, 4, 8}, {2, 3, 8}, {4, 8, 8}, {4, 8, 9}})
    for (const int64_t tokens : {3, 20, 70}) check_every_tactic(library, memory, code, tokens);
  check_copies(library, memory);
}
