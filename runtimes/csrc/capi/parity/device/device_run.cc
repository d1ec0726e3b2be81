#include "capi/parity/device/device_run.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>

#include "capi/parity/device/machine.h"
#include "capi/parity/device/sketch.h"

namespace edgelm::capi {
namespace {

// The debug graph returns all logits of a pass at once; a prompt whose logits are larger than this is traced without.
constexpr std::int64_t kDebugLogitsBytes = std::int64_t(512) << 20;

class Stopwatch {
 public:
  double seconds() const { return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count(); }

 private:
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

std::vector<std::int32_t> ids_of(const ParityPack& pack, const GoldenPrompt& prompt) {
  return {pack.ids.begin() + prompt.start, pack.ids.begin() + prompt.start + prompt.fed()};
}

// Prefill the prompt, then feed the reference's continuation token by token, whatever the device chooses.
void decode(Runtime& model, DeviceRun& run, const std::vector<std::int32_t>& ids, const GoldenPrompt& prompt) {
  model.truncate(0);
  const auto length = std::ptrdiff_t(prompt.length);
  const Stopwatch prefill;
  const float* logits = model.prefill({ids.begin(), ids.begin() + length});
  run.prefill_seconds += prefill.seconds();
  run.prefill_tokens += prompt.length;
  std::int64_t at = run.decoded.put(prompt.start + prompt.length - 1, logits, 1, model.vocab_size);
  for (std::size_t i = std::size_t(length); i < ids.size(); ++i) {
    const Stopwatch step;
    logits = model.decode(ids[i]);
    run.decode_seconds += step.seconds();
    at = run.decoded.put(at, logits, 1, model.vocab_size);
  }
  run.decode_tokens += std::int64_t(ids.size()) - prompt.length;
}

struct Batch {
  std::vector<const GoldenPrompt*> prompts;  // the longest first
  bool logits;                               // whether they fit into memory
};

// The prompts of each pass, of similar length: few passes, because each dequantises all weights again.
std::vector<Batch> batches(const ParityPack& pack, std::int64_t vocab_size) {
  std::vector<const GoldenPrompt*> order;
  for (const GoldenPrompt& prompt : pack.prompts) order.push_back(&prompt);
  std::stable_sort(order.begin(), order.end(), [](auto* a, auto* b) { return a->fed() > b->fed(); });
  const std::int64_t most = kDebugLogitsBytes / 4 / vocab_size;  // positions
  std::vector<Batch> result;
  Batch batch = {{}, true};
  const auto close = [&](bool logits) {
    batch.logits = logits;
    result.push_back(std::move(batch));
    batch = {{}, true};
  };
  for (const GoldenPrompt* prompt : order) {
    if (!batch.prompts.empty()) {
      const std::int64_t longest = batch.prompts[0]->fed();
      if ((std::int64_t(batch.prompts.size()) + 1) * longest > most || 4 * prompt->fed() < longest) close(true);
    }
    batch.prompts.push_back(prompt);
    if (batch.prompts[0]->fed() > most) close(false);
  }
  if (!batch.prompts.empty()) close(true);
  return result;
}

class Tracer {
 public:
  Tracer(const Bundle& bundle, const ParityPack& pack, DeviceRun& run)
      : model_(bundle.manifest().model), pack_(pack), run_(run), sketcher_(model_.hidden_size, pack.sketch_seed) {
    for (std::int64_t i = 0; i <= pack.num_layers; ++i) names_.push_back(concat("hidden.", i));
    if (pack.num_experts) {
      for (std::int64_t i = 0; i < pack.num_layers; ++i) names_.push_back(concat("router_logits.", i));
    }
    const std::size_t count = std::size_t(pack.count()), layers = std::size_t(pack.num_layers);
    trace_.sketches.resize((layers + 1) * count * kSketchWidth);
    trace_.router.resize(layers * count * std::size_t(pack.num_experts));
  }

  DeviceTrace trace(Tracing& debug, Task& task) {
    for (const Batch& batch : batches(pack_, model_.vocab_size)) {
      pass(debug, batch);
      for (const GoldenPrompt* prompt : batch.prompts) task.advance(prompt->fed());
    }
    if (pack_.num_experts) {
      trace_.chosen = std::min(pack_.target().chosen, pack_.num_experts);
      trace_.experts = choose(trace_.router.data(), pack_.num_layers * pack_.count(), pack_.num_experts, trace_.chosen);
    }
    return std::move(trace_);
  }

 private:
  void pass(Tracing& debug, const Batch& batch) {
    const std::int64_t rows = std::int64_t(batch.prompts.size()), tokens = batch.prompts[0]->fed();
    std::vector<std::int32_t> ids;
    for (const GoldenPrompt* prompt : batch.prompts) {
      const std::vector<std::int32_t> own = ids_of(pack_, *prompt);
      ids.insert(ids.end(), own.begin(), own.end());
      // Attention is causal: what pads the end does not affect earlier positions.
      ids.insert(ids.end(), std::size_t(tokens - prompt->fed()), own.back());
    }
    std::vector<std::string> names = {"logits"};
    names.insert(names.end(), names_.begin(), names_.end());
    std::vector<Tracing::Value> values = debug.run(ids.data(), rows, tokens, names, batch.logits);
    if (values.size() != names.size()) fail(EDGELM_RUNTIME, "the debug graph returned another number of values");
    const std::size_t layers = std::size_t(pack_.num_layers);
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::int64_t width = i == 0 ? model_.vocab_size : i <= layers + 1 ? model_.hidden_size : pack_.num_experts;
      if (i == 0 && !batch.logits) continue;
      if (std::int64_t(values[i].data.size()) != rows * tokens * width) {
        fail(EDGELM_BUNDLE, "the debug graph's output ", names[i],
             " has another size than the manifest says: export the "
             "bundle again");
      }
      for (std::int64_t row = 0; row < rows; ++row) {
        keep(*batch.prompts[std::size_t(row)], i, values[i].data.data() + row * tokens * width, width);
      }
      values[i] = {};
    }
  }

  // Store the values [fed, width] of output `index` of a prompt.
  void keep(const GoldenPrompt& prompt, std::size_t index, const float* values, std::int64_t width) {
    const std::size_t count = std::size_t(pack_.count()), start = std::size_t(prompt.start);
    const std::size_t layers = std::size_t(pack_.num_layers);
    if (index == 0) {
      run_.debug.put(prompt.start, values, prompt.fed(), width);
    } else if (index <= layers + 1) {
      float* to = trace_.sketches.data() + ((index - 1) * count + start) * kSketchWidth;
      for (std::int64_t i = 0; i < prompt.fed(); ++i, to += kSketchWidth, values += width) sketcher_.sketch(values, to);
    } else {
      float* to = trace_.router.data() + ((index - layers - 2) * count + start) * std::size_t(width);
      std::memcpy(to, values, std::size_t(prompt.fed() * width) * sizeof(float));
    }
  }

  const ModelInfo& model_;
  const ParityPack& pack_;
  DeviceRun& run_;
  const Sketcher sketcher_;
  std::vector<std::string> names_;
  DeviceTrace trace_;
};

}  // namespace

Task::Task(const ParityOptions& options, const char* what, std::int64_t total)
    : options_(options), what_(what), total_(total) {
  report();
}

void Task::advance(std::int64_t amount) {
  done_ += amount;
  report();
}

void Task::report() const {
  if (options_.on_progress && !options_.on_progress(what_, done_, total_)) {
    fail(EDGELM_CANCELLED, "the parity check was cancelled");
  }
}

std::vector<std::int32_t> choose(const float* router, std::int64_t count, std::int64_t experts, std::int64_t k) {
  std::vector<std::int32_t> result, order(static_cast<std::size_t>(experts));
  for (std::int64_t row = 0; row < count; ++row, router += experts) {
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) {
      // NaN comes last.
      return router[a] > router[b] || (std::isnan(router[b]) && !std::isnan(router[a]));
    });
    result.insert(result.end(), order.begin(), order.begin() + k);
  }
  return result;
}

DeviceRun run_device(const Bundle& bundle, const ParityPack& pack, const ParityOptions& options) {
  DeviceRun run(pack);
  RuntimeOptions of_runtime = options.runtime;
  std::int64_t longest = 0;
  for (const GoldenPrompt& prompt : pack.prompts) longest = std::max(longest, prompt.fed());
  of_runtime.context_length = longest;
  {
    Task task(options, "running the graph", pack.count());
    const Stopwatch load;
    const std::unique_ptr<Runtime> model = open_runtime(bundle, of_runtime);
    run.load_seconds = load.seconds();
    run.runtime = model->name;
    run.threads = model->threads;
    run.kv = model->kv;
    run.engine = model->engine;
    run.isa = model->isa;
    if (model->vocab_size != bundle.manifest().model.vocab_size) {
      fail(EDGELM_BUNDLE, bundle.path(),
           ": the graph has another vocabulary than the manifest: export the bundle again");
    }
    for (const GoldenPrompt& prompt : pack.prompts) {
      const std::vector<std::int32_t> ids = ids_of(pack, prompt);
      decode(*model, run, ids, prompt);
      model->truncate(0);
      std::int64_t at = prompt.start;
      model->logits_all(ids, [&](const float* logits, std::int64_t rows) {
        at = run.at_once.put(at, logits, rows, model->vocab_size);
      });
      task.advance(prompt.fed());
    }
    run.resident_peak = resident_peak();
  }
  if (options.skip_layers) {
    run.notes.push_back("layers were not compared, only logits, as was asked for");
    return run;
  }
  of_runtime.runtime = run.runtime;
  of_runtime.context_length = 0;
  Task task(options, "tracing the layers", pack.count());
  const std::unique_ptr<Tracing> debug = open_tracing(bundle, of_runtime);
  if (!debug) {
    run.notes.push_back(run.runtime + " has no debug graph: layers were not compared, only logits");
    return run;
  }
  run.trace = Tracer(bundle, pack, run).trace(*debug, task);
  return run;
}

}  // namespace edgelm::capi
