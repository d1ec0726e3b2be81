// The debug graph of a bundle for the CPU. As edgelm/runtimes/onnxruntime/native.py and portable.py.
#include <algorithm>
#include <map>
#include <mutex>
#include <optional>

#include "capi/runtime/checks.h"
#include "capi/runtime/onnxruntime/cpu_runtime.h"
#include "capi/runtime/options.h"
#include "capi/runtime/onnxruntime/session.h"
#include "system/library.h"

namespace edgelm::capi {
namespace {

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

bool has_8_bit_experts(const Bundle& bundle) {
  const Manifest& manifest = bundle.manifest();
  std::uint64_t largest = 0;
  for (const TensorEntry& entry : manifest.tensors) {
    if (ends_with(entry.name, ".moe.gate_up.qweight")) largest = std::max(largest, entry.size);
  }
  if (largest == 0) return false;
  const std::string path = bundle.file("config.json");
  const Json config = Json::parse(read_file(path, 1 << 24, EDGELM_BUNDLE), path, EDGELM_BUNDLE);
  const std::int64_t width = Members(config, path, EDGELM_BUNDLE).integer("intermediate_size", 1, 1 << 20);
  const std::uint64_t values = checked_bytes(
      {std::uint64_t(manifest.model.num_experts), 2, std::uint64_t(width), std::uint64_t(manifest.model.hidden_size)});
  return largest >= values;
}

// Makes QMoE nodes that are created meanwhile compute in float32, like the debug graph's other matmuls.
//
// The 8-bit kernel of QMoE quantises activations to int8 whatever `accuracy_level` is; its noise of 0.3 % would hide a
// small error of a weight. The 4-bit kernel follows `accuracy_level` and is left on: without it OLMoE takes 20 times as
// long to load. ONNX Runtime reads environment variables for this: no other thread may change the environment meanwhile.
class Float32Experts {
 public:
  explicit Float32Experts(bool wanted) {
    if (!wanted) return;
    for (const char* name : {"ORT_QMOE_CPU_QNBIT_GEMM", "ORT_USE_MLAS_Q4_GEMM_MOE"}) {
      before_[name] = system::variable(name);
      system::set_variable(name, "0");
    }
  }
  ~Float32Experts() {
    for (const auto& [name, value] : before_) system::set_variable(name.c_str(), value);
  }
  Float32Experts(const Float32Experts&) = delete;

 private:
  std::map<std::string, std::optional<std::string>> before_;
};

class CpuTracing : public Tracing {
 public:
  CpuTracing(const Bundle& bundle, const RuntimeOptions& options)
      : model_(bundle.manifest().model),
        native_(bundle.manifest().ops == "native"),
        type_(native_ ? PortableType{ort::kUint8, 1} : portable_type(bundle)),
        lengths_(native_ ? "past_lengths" : "attention_mask"),
        weights_(bundle.file(bundle.manifest().weights_file), EDGELM_BUNDLE) {
    {
      const Float32Experts meanwhile(!native_ && has_8_bit_experts(bundle));
      session_ = std::make_unique<Session>(bundle, bundle.manifest().debug_file, options.onnxruntime,
                                           chosen_threads(options));
    }
    std::vector<std::string> traced;
    for (std::int64_t i = 0; i <= model_.num_layers; ++i) traced.push_back(concat("hidden.", i));
    for (std::int64_t i = 0; i < model_.num_layers && model_.num_experts > 0; ++i) {
      traced.push_back(concat("router_logits.", i));
    }
    session_->check_graph(bundle, lengths_, traced);
  }

  std::vector<Value> run(const std::int32_t* ids, std::int64_t batch, std::int64_t tokens,
                         const std::vector<std::string>& names, bool logits) override {
    weights_.check();
    require_ids(ids, batch, tokens);
    std::vector<std::int64_t> wide(ids, ids + batch * tokens), ones(std::size_t(batch * tokens), 1);
    std::vector<std::int64_t> zeros(std::size_t(batch), 0);
    std::int64_t start = logits ? 0 : -1;
    // Native operators write into the cache that they are given, one for all layers; portable ones grow an empty one.
    const std::int64_t width = native_ ? native_row_bytes("float32", model_.head_dim) : model_.head_dim;
    const std::vector<std::int64_t> cache_shape = {batch, model_.num_kv_heads, native_ ? tokens : 0, width};
    std::uint64_t bytes = std::uint64_t(type_.bytes);
    for (const std::int64_t size : cache_shape) bytes = checked_bytes({bytes, std::uint64_t(size)});
    const Untouched cache(bytes);

    Inputs inputs;
    const auto add = [&](const std::string& name, std::vector<std::int64_t>& values,
                         const std::vector<std::int64_t>& shape) {
      inputs.add(name, session_->tensor(values.data(), 8 * values.size(), shape, ort::kInt64));
    };
    add("input_ids", wide, {batch, tokens});
    inputs.add("logits_start", session_->tensor(&start, sizeof start, {1}, ort::kInt64));
    if (native_) add(lengths_, zeros, {batch});
    else add(lengths_, ones, {batch, tokens});
    for (const auto& name : kv_names(model_.num_layers)) {
      inputs.add(name.first, session_->tensor(cache.data(), bytes, cache_shape, type_.element));
    }
    return run(inputs, names);
  }

 private:
  struct Inputs {
    std::vector<std::string> names;
    std::vector<OwnedValue> values;

    void add(const std::string& name, OwnedValue value) {
      names.push_back(name);
      values.push_back(std::move(value));
    }
  };

  void require_ids(const std::int32_t* ids, std::int64_t batch, std::int64_t tokens) const {
    if (batch < 1 || tokens < 1 || tokens > model_.context_length || batch > std::int64_t(1) << 20) {
      fail(EDGELM_INVALID_ARGUMENT, batch, " texts of ", tokens, " tokens: give 1 to ", model_.context_length,
           " tokens, the model's limit");
    }
    check_tokens(ids, std::size_t(batch * tokens), model_.vocab_size);
  }

  std::vector<Value> run(const Inputs& inputs, const std::vector<std::string>& names) const {
    std::vector<const char*> input_names, output_names;
    std::vector<const OrtValue*> values;
    for (std::size_t i = 0; i < inputs.names.size(); ++i) {
      input_names.push_back(inputs.names[i].c_str());
      values.push_back(inputs.values[i].get());
    }
    for (const std::string& name : names) output_names.push_back(name.c_str());
    const OrtLibrary& library = session_->library();
    std::vector<OrtValue*> raw(names.size(), nullptr);
    OrtStatus* status = ort::RunSession(library.api, session_->get(), nullptr, input_names.data(), values.data(),
                                        values.size(), output_names.data(), output_names.size(), raw.data());
    std::vector<OwnedValue> outputs;
    for (OrtValue* value : raw) {
      outputs.emplace_back(library);
      *outputs.back().out() = value;
    }
    if (status != nullptr) {
      fail(EDGELM_RUNTIME, "onnxruntime failed while running the debug graph: ", library.problem(status),
           "; if memory ran out, give fewer or shorter texts");
    }
    std::vector<Value> results(names.size());
    for (std::size_t i = 0; i < names.size(); ++i) {
      const float* data = session_->floats(outputs[i].get(), &results[i].shape);
      std::size_t count = 1;
      for (const std::int64_t size : results[i].shape) count *= std::size_t(size);
      results[i].data.assign(data, data + count);
      outputs[i].reset();
    }
    return results;
  }

  ModelInfo model_;
  bool native_;
  PortableType type_;
  std::string lengths_;
  MappedFile weights_;
  std::unique_ptr<Session> session_;
};

}  // namespace

std::unique_ptr<Tracing> open_cpu_tracing(const Bundle& bundle, const RuntimeOptions& options) {
  return std::make_unique<CpuTracing>(bundle, options);
}

}  // namespace edgelm::capi
