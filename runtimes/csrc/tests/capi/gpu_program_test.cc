// Tests that a damaged program.json is refused, and that what is accepted is planned within its memory.

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <random>
#include <utility>

#include "capi/common/files.h"
#include "capi/common/json.h"
#include "capi/cuda/files.h"
#include "check.h"
#include "system.h"
#include "cuda/executor/layout.h"

namespace {

using namespace edgelm::capi;
using edgelm::gpu::Layout;
using edgelm::gpu::Program;
namespace gpu = edgelm::gpu;

// Every operator once: a layer with experts, and a norm behind it.
const char* const kProgram = R"({"format": 1, "nodes": [
{"op": "QuantEmbedding", "name": "embed", "inputs": ["input_ids", "e"], "outputs": ["hidden.0"], "attrs":
{"kind": "int8", "rows": 96, "columns": 64, "group": 64, "zeros": 0, "swiglu": 0, "count": 1}},
{"op": "QuantLinear", "name": "qkv", "inputs": ["hidden.0", "w1", "n1"], "outputs": ["q"], "attrs":
{"activation": "bf16", "activations": "float", "epsilon": 1e-05, "output": "bf16", "kind": "int4", "rows": 192,
"columns": 64, "group": 32, "zeros": 0, "swiglu": 0, "count": 1}},
{"op": "GroupQueryAttention", "name": "attn", "inputs": ["q", "past_key_values.0.key",
"past_key_values.0.value", "past_lengths", "cos", "sin", "qn", "kn"], "outputs": ["a", "present.0.key",
"present.0.value"], "attrs": {"activation": "bf16", "clip": 0.0, "epsilon": 1e-05, "head_size": 32, "kv":
"float16", "kv_num_heads": 2, "num_heads": 2}},
{"op": "QuantLinear", "name": "o", "inputs": ["a", "w2", "", "hidden.0"], "outputs": ["s"], "attrs":
{"activation": "bf16", "activations": "float", "epsilon": 1e-05, "output": "f32", "kind": "int4", "rows": 64,
"columns": 64, "group": 32, "zeros": 0, "swiglu": 0, "count": 1}},
{"op": "SparseMoE", "name": "moe", "inputs": ["s", "router", "w3", "w4", "n2"], "outputs": ["hidden.1",
"router_logits.0"], "attrs": {"activation": "bf16", "activations": "float", "epsilon": 1e-05, "k": 2,
"normalize": 0, "gate_up_kind": "int4", "gate_up_rows": 128, "gate_up_columns": 64, "gate_up_group": 32,
"gate_up_zeros": 0, "gate_up_swiglu": 1, "gate_up_count": 4, "down_kind": "int4", "down_rows": 64,
"down_columns": 64, "down_group": 32, "down_zeros": 0, "down_swiglu": 0, "down_count": 4}},
{"op": "RMSNorm", "name": "norm", "inputs": ["hidden.1", "n1", "hidden.0"], "outputs": ["hidden.2"], "attrs":
{"epsilon": 1e-05}},
{"op": "LastToken", "name": "last", "inputs": ["hidden.2"], "outputs": ["head_input"], "attrs": {}},
{"op": "QuantLinear", "name": "head", "inputs": ["head_input", "w5", "n3"], "outputs": ["logits"], "attrs":
{"activation": "bf16", "activations": "float", "epsilon": 1e-05, "output": "f32", "kind": "int8", "rows": 96,
"columns": 64, "group": 64, "zeros": 0, "swiglu": 0, "count": 1}}
],
"values": {"hidden.0": ["f32", 64], "q": ["bf16", 192], "a": ["bf16", 64], "s": ["f32", 64], "hidden.1": ["f32",
64], "router_logits.0": ["f32", 4], "hidden.2": ["f32", 64], "head_input": ["f32", 64], "logits": ["f32", 96]},
"weights": {"cos": {"type": "f32", "dims": [128, 16], "offset": 0, "size": 8192}, "sin": {"type": "f32", "dims":
[128, 16], "offset": 8192, "size": 8192}, "n1": {"type": "f32", "dims": [64], "offset": 16384, "size": 256},
"n2": {"type": "f32", "dims": [64], "offset": 16640, "size": 256}, "n3": {"type": "f32", "dims": [64], "offset":
16896, "size": 256}, "qn": {"type": "f32", "dims": [64], "offset": 17152, "size": 256}, "kn": {"type": "f32",
"dims": [64], "offset": 17408, "size": 256}, "router": {"type": "f32", "dims": [4, 64], "offset": 17664, "size":
1024}, "e": {"type": "uint8", "dims": [6400], "offset": 18688, "size": 6400}, "w1": {"type": "uint8", "dims":
[6912], "offset": 25088, "size": 6912}, "w2": {"type": "uint8", "dims": [2304], "offset": 32000, "size": 2304},
"w3": {"type": "uint8", "dims": [18432], "offset": 34304, "size": 18432}, "w4": {"type": "uint8", "dims":
[9216], "offset": 52736, "size": 9216}, "w5": {"type": "uint8", "dims": [6400], "offset": 61952, "size": 6400}},
"exact": {"activation": "f32", "output": "f32", "kv": "float32", "activations": "float"}})";

const Json& Original() {
  static const Json json = Json::parse(kProgram, "program.json", EDGELM_INTERNAL);
  return json;
}

class Files {
 public:
  Files() { folder_ = edgelm_test::MakeFolder(); }
  ~Files() { edgelm_test::RemoveFolder(folder_); }
  std::string write(const std::string& name, const std::string& text) const {
    const std::string path = join(folder_, name);  // not write_atomically, which waits for the disk
    std::ofstream(path, std::ios::binary) << text;
    return path;
  }
  const std::string& folder() const { return folder_; }

 private:
  std::string folder_;
};

// Plan steps of one token and of several, and the greedy choice's memory. Throws gpu::Error.
void PlanAll(const Program& program, const std::string& kv) {
  const Layout layout(program, {1, 64, 16, 8, kv}, {86, 4});
  for (std::size_t i = 0; i < program.nodes.size(); ++i) {
    for (const std::string& name : program.nodes[i].outputs) {
      const auto value = program.values.find(name);
      if (value == program.values.end()) continue;
      const auto rows = std::uint64_t(gpu::after_head(name) ? 8 : 16);
      EXPECT(layout.offset(name) + rows * value->second.row_bytes() <= layout.workspace, "%s", name.c_str());
    }
    for (const std::int64_t tokens : {1, 2, 5, 16}) {
      gpu::Node node = layout.node(i, {1, tokens});
      for (auto* tensors : {&node.inputs, &node.outputs}) {
        for (gpu::Tensor& tensor : *tensors) tensor.address = tensor.present() ? 1 << 20 : 0;
      }
      EXPECT(!layout.launches(node, 1 << 21, 1 << 22).empty(), "%s", program.nodes[i].name.c_str());
    }
  }
  EXPECT(layout.workspace <= layout.counters && layout.counters + layout.counter_bytes <= layout.bytes(), "workspace");
  EXPECT(!layout.kernels().empty(), "kernels");
}

void TestEveryTypeOfCacheIsPlanned() {
  const Files files;
  const std::string path = files.write("program.json", kProgram);
  for (const char* kv : {"float16", "bfloat16", "int8", "fp8"}) PlanAll(read_program(path, false), kv);
  PlanAll(read_program(path, true), "float32");
  try {
    PlanAll(read_program(path, false), "int4");
    EXPECT(false, "a cache of int4");
  } catch (const gpu::Error& error) {
    EXPECT(std::string(error.what()).find("the KV cache can be float16, bfloat16") != std::string::npos, "%s",
           error.what());
  }
}

// -- mutations -------------------------------------------------------------------------------------------------------

using Random = std::mt19937_64;

std::size_t Below(Random& random, std::size_t limit) { return std::size_t(random() % limit); }

// All values in a document, the containers included.
void Collect(Json& json, std::vector<Json*>& found) {
  found.push_back(&json);
  if (json.is_array()) {
    for (Json& one : json.array()) Collect(one, found);
  } else if (json.is_object()) {
    for (Json::Member& one : json.object()) Collect(one.second, found);
  }
}

Json Hostile(Random& random, const std::vector<Json*>& all) {
  const Json choices[] = {Json(nullptr),
                          Json(true),
                          Json(0),
                          Json(-1),
                          Json(1),
                          Json(7),
                          Json(63),
                          Json(1 << 20),
                          Json(std::int64_t(1) << 31),
                          Json(std::int64_t(2147483647)),
                          Json(INT64_MAX),
                          Json(INT64_MIN),
                          Json(0.5),
                          Json(-1e300),
                          Json(""),
                          Json("f32"),
                          Json("bf16"),
                          Json("f16"),
                          Json("int8"),
                          Json("fp8"),
                          Json("uint8"),
                          Json("int32"),
                          Json("logits"),
                          Json("head_input"),
                          Json("input_ids"),
                          Json("past_key_values.0.key"),
                          Json("present.0.key"),
                          Json("a\nb=c"),
                          Json(std::string("a\0b", 3)),
                          Json(Json::Array()),
                          Json(Json::Object())};
  const std::size_t count = sizeof choices / sizeof *choices;
  const std::size_t chosen = Below(random, count + 8);
  return chosen < count ? choices[chosen] : *all[Below(random, all.size())];  // or a copy of another part
}

void Mutate(Json& json, Random& random) {
  std::vector<Json*> all;
  Collect(json, all);
  Json& one = *all[Below(random, all.size())];
  if (one.is_array() && !one.array().empty() && Below(random, 2)) {
    Json::Array& items = one.array();
    const std::size_t at = Below(random, items.size());
    if (Below(random, 2)) items.erase(items.begin() + std::ptrdiff_t(at));
    else std::swap(items[at], items[Below(random, items.size())]);
  } else if (one.is_object() && !one.object().empty() && Below(random, 2)) {
    Json::Object& members = one.object();
    const std::size_t at = Below(random, members.size());
    if (Below(random, 2)) members.erase(members.begin() + std::ptrdiff_t(at));
    else members[at].first = Below(random, 2) ? "k" : members[Below(random, members.size())].first;
  } else {
    one = Hostile(random, all);
  }
}

void TestADamagedProgramIsRefusedOrHarmless(int count) {
  const Files files;
  Random random(1);
  int accepted = 0, refused = 0;
  for (int i = 0; i < count; ++i) {
    Json json = Original();
    for (std::size_t times = 1 + Below(random, 3); times > 0; --times) Mutate(json, random);
    const std::string path = files.write("program.json", json.dump());
    for (const bool debug : {false, true}) {
      try {
        PlanAll(read_program(path, debug), debug ? "float32" : "int8");
        ++accepted;
      } catch (const Error& error) {
        ++refused;
        EXPECT(error.code == EDGELM_BUNDLE, "mutation %d: %s", i, error.what());
      } catch (const gpu::Error& error) {
        ++refused;
      }
    }
  }
  EXPECT(accepted > count / 20 && refused > count, "%d accepted, %d refused", accepted, refused);
}

std::string Refusal(const std::string& from, const std::string& to) {
  const Files files;
  std::string text = kProgram;
  const std::size_t at = text.find(from);
  EXPECT(at != std::string::npos, "%s", from.c_str());
  text.replace(at, from.size(), to);
  try {
    PlanAll(read_program(files.write("program.json", text), false), "int8");
    return "accepted";
  } catch (const Error& error) {
    return error.what();
  } catch (const gpu::Error& error) {
    return error.what();
  }
}

void TestADamagedProgramIsNamed() {
  const char* const cases[][3] = {
      {"\"format\": 1", "\"format\": 2", "format is 2, this EdgeLM reads 1: upgrade edgelm"},
      {"\"values\"", "\"value\"", "unknown field \"value\""},
      {"\"logits\": [\"f32\", 96]", "\"logits\": [\"f32\", 8]", "needs 96 values in \"logits\", which has 8"},
      {"\"logits\": [\"f32\", 96]", "\"logits\": [\"f32\", 1099511627776]", "is 1099511627776, expected"},
      {"\"rows\": 192", "\"rows\": -1", "rows of qkv is -1, expected a whole number from 1"},
      {"\"group\": 32", "\"group\": 7", "in groups of 7, which no int4 matrix has"},
      {"\"head_size\": 32", "\"head_size\": 0", "head_size of attn is 0, expected a whole number from 1"},
      {"\"QuantEmbedding\"", "\"Rotate\"", "has the operator 'Rotate'"},
      {"\"kind\": \"int4\"", "\"kind\": \"int2\"", "kind int2"},
      {"\"activations\": \"float\"", "\"activations\": \"int7\"", "has activations 'int7'"},
      {"\"size\": 8192", "\"size\": 4", "has 4 bytes for"},
      {"\"hidden.0\", \"w1\"", "\"hidden.9\", \"w1\"", "reads hidden.9, which no node computes"},
      {"\"present.0.value\"", "\"present.0.key\"", "present.0.key is computed twice"},
      {"\"past_key_values.0.value\"", "\"past_key_values.0.key\"", "past_key_values.0.key is computed twice"},
      {"\"hidden.1\", \"n1\", \"hidden.0\"", "\"hidden.1\", \"n1\", \"q\"", "needs float32 in \"q\""},
  };
  for (const auto& [from, to, said] : cases) {
    const std::string why = Refusal(from, to);
    EXPECT(why.find(said) != std::string::npos, "%s: %s", to, why.c_str());
  }
}

void TestKernelsAreDescribed() {
  const Files files;
  const auto read = [&](const std::string& text) -> std::string {
    files.write("kernels.json", text);
    try {
      const gpu::KernelIndex index = read_kernel_index(files.folder());
      return index.images.at(0).target.name + " " + index.images[0].target.compiler.text() + " " +
             std::to_string(index.argument_bytes.at("a")) + " " + std::to_string(index.images[0].pdl.count("a"));
    } catch (const Error& error) {
      return error.what();
    }
  };
  EXPECT(read(R"({"format": 2, "source": "x", "argument_bytes": {"a": 16},
                  "images": {"sm_86": {"file": "f.cubin", "nvrtc": [13, 0], "waits": ["a"], "resources": {}}}})") ==
             "sm_86 13.0 16 1",
         "format 2");
  EXPECT(read(R"({"format": 1, "nvrtc": [12, 6], "argument_bytes": {"a": 16},
                  "images": {"sm_86": {"file": "f.cubin", "resources": {}}}})") == "sm_86 12.6 16 0",
         "format 1");
  const char* const cases[][2] = {
      {R"({"format": 3, "argument_bytes": {}, "images": {}})", "upgrade edgelm"},
      {R"({"format": 2, "argument_bytes": {}, "images": {"x": {"file": "f", "nvrtc": [13, 0]}}})", "like sm_86"},
      {R"({"format": 2, "argument_bytes": {}, "images": {"sm_86": {"file": "../f", "nvrtc": [13, 0]}}})", "file"},
      {R"({"format": 2, "argument_bytes": {}, "images": {"sm_86": {"file": "f", "nvrtc": [13]}}})", "nvrtc"},
      {R"({"format": 2, "argument_bytes": {"a": -1}, "images": {}})", "a"},
  };
  for (const auto& [text, said] : cases) EXPECT(read(text).find(said) != std::string::npos, "%s", read(text).c_str());
}

void TestSizesAreShort() {
  const std::pair<std::uint64_t, const char*> cases[] = {{0, "0 B"},
                                                         {999, "999 B"},
                                                         {1000, "1 kB"},
                                                         {3145728, "3.15 MB"},
                                                         {99949999, "99.9 MB"},
                                                         {123456789, "123 MB"},
                                                         {13800000000ull, "13.8 GB"}};
  for (const auto& [bytes, text] : cases)
    EXPECT(gpu::format_size(bytes) == text, "%s", gpu::format_size(bytes).c_str());
}

}  // namespace

int main(int argc, char**) {
  TestEveryTypeOfCacheIsPlanned();
  TestADamagedProgramIsNamed();
  TestKernelsAreDescribed();
  TestSizesAreShort();
  TestADamagedProgramIsRefusedOrHarmless(argc > 1 ? 200 : 3000);
  return edgelm_test::Finish();
}
