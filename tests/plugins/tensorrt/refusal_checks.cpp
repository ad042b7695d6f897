// What a run refuses: in onShapeChange all that can be known there, in enqueue pointers, and a tactic that was not the
// profile's; always aloud, never by a crash.
#include "checks.h"
#include "runs.h"
#include "vq_linear/dispatch.h"

namespace {

using nvinfer1::DataType;

void refused(Library& library, bool is_refused, const char* word) {
  std::string said = library.logger.take();
  if (!said.empty()) said.pop_back();
  check(is_refused && has(said, word) && has(said, "layers.0.q_proj"), "refused: %s", said.c_str());
}

// TensorRT goes from one profile to the next with onShapeChange once and setTactic for each tactic, and does not say
// which comes first: the shapes of many tokens may meet the tactic of few ones.
void check_next_profile(Library& library, const Plugin& plugin, const Weight& weight, Memory& memory) {
  const Run run{call_of(weight, {512}, DataType::kHALF, DataType::kHALF), std::vector<uint8_t>(512 * 2048 * 2), {}, 0};
  check(prepare(plugin, run.call) == 0 && library.logger.take().empty(),
        "shapes of the next profile are taken before its tactic");
  refused(library, enqueue_prepared(plugin, weight, run, memory).empty(), "cannot run 512 tokens");
  const int tiled = mgvq::id_of({mgvq::Regime::kTiled, mgvq::Activations::kFloat16, 1});
  check(plugin.runtime->setTactic(tiled) == 0 && margin_stayed(enqueue_prepared(plugin, weight, run, memory)) &&
            library.logger.take().empty(),
        "the next profile's tactic after its shapes: it runs");
}

}  // namespace

void check_run_refusals(Library& library, Memory& memory) {
  const Weight weight = random_weight({4, 8, 8}, 256, 2048, true, 6);
  const Plugin plugin = attached(library.linear, fields_of(weight, true));
  const Call call = call_of(weight, {4}, DataType::kHALF, DataType::kHALF);
  Run run{call, std::vector<uint8_t>(4 * 2048 * 2), {}, 0};
  library.logger.take();

  // Before any onShapeChange nobody said whether there is a bias.
  const void* inputs[5] = {};
  void* outputs[1] = {};
  const int32_t early = plugin.runtime->enqueue(call.tensors.data(), &call.output(), inputs, outputs, nullptr, nullptr);
  refused(library, early == -1, "before an onShapeChange");

  Call wrong = call;
  wrong.tensors[0].dims.d[1] = 2047;
  refused(library, prepare(plugin, wrong) != 0, "columns = 2048");
  wrong = call;
  wrong.tensors[1].dims.d[0] -= 1;
  refused(library, prepare(plugin, wrong) != 0, "codes");
  wrong = call;
  wrong.tensors[4].type = DataType::kFLOAT;
  refused(library, prepare(plugin, wrong) != 0, "y: expected float16");
  wrong = call;
  wrong.tensors[2].type = DataType::kHALF;
  refused(library, prepare(plugin, wrong) != 0, "table: expected int8");
  wrong = call_of(weight, {3000000}, DataType::kHALF, DataType::kHALF);
  refused(library, prepare(plugin, wrong) != 0, "3000000 tokens");
  wrong = call;
  wrong.inputs = 7;
  refused(library, prepare(plugin, wrong) != 0, "found 7");

  const int skinny = mgvq::id_of({mgvq::Regime::kSkinny, mgvq::Activations::kFloat16, 4});
  check(plugin.runtime->setTactic(skinny) == 0 && prepare(plugin, call) == 0, "a tactic for few tokens and few tokens");
  check_next_profile(library, plugin, weight, memory);

  run.tactic = skinny;
  refused(library, enqueue(plugin, weight, run, memory, false).empty(), "workspace");
  run.tactic = 0;
  refused(library, enqueue(plugin, weight, run, memory, true, 8).empty(), "16 bytes");
  check(margin_stayed(enqueue(plugin, weight, run, memory)) && library.logger.take().empty(),
        "a right call runs after all of that");

  const Plugin embedding = attached(library.embedding, fields_of(weight));
  const Run rows{call_of(weight, {4}, DataType::kINT32, DataType::kFLOAT), std::vector<uint8_t>(16), {}, 0};
  refused(library, enqueue(embedding, weight, rows, memory, true, 8).empty(), "16 bytes");
  wrong = rows.call;
  wrong.tensors[0].type = DataType::kHALF;
  refused(library, prepare(embedding, wrong) != 0, "ids: expected int32 or int64");
}
