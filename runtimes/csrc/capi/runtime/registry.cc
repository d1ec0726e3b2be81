// The choice of a runtime for a bundle, as edgelm/runtimes/registry.py. To add one: an entry in kRuntimes and its files.
#include "capi/runtime/onnxruntime/cpu_runtime.h"
#include "capi/runtime/cuda.h"
#include "capi/runtime/options.h"

namespace edgelm::capi {
namespace {

struct Entry {
  const char* name;
  const char* target;  // of the bundles that it runs
  const char* operators[2];
  std::unique_ptr<Runtime> (*open)(const Bundle&, const RuntimeOptions&);
  std::unique_ptr<Tracing> (*open_tracing)(const Bundle&, const RuntimeOptions&);

  bool runs(const std::string& ops) const {
    return ops == operators[0] || (operators[1] != nullptr && ops == operators[1]);
  }
};

constexpr Entry kRuntimes[] = {
    {"onnxruntime-cpu", "cpu", {"native", "portable"}, open_cpu_runtime, open_cpu_tracing},
    {"cuda-kernels", "tensorrt", {"gpu", nullptr}, open_cuda_runtime, open_cuda_tracing},
};

// "a, b" of all runtimes.
std::string listed(const char* Entry::* member) {
  std::string names;
  for (const Entry& entry : kRuntimes) names += concat(names.empty() ? "" : ", ", entry.*member);
  return names;
}

const Entry& for_target(const Bundle& bundle, const std::string& name) {
  const std::string& target = bundle.manifest().target;
  for (const Entry& entry : kRuntimes) {
    if (name.empty() ? target != entry.target : name != entry.name) continue;
    if (target == entry.target) return entry;
    fail(EDGELM_UNAVAILABLE, bundle.path(), " was exported for ", target, ", but ", name, " runs ", entry.target,
         ": export with --target ", entry.target, ", or leave the choice of runtime out");
  }
  if (!name.empty()) {
    fail(EDGELM_UNAVAILABLE, "there is no runtime ", quoted(name),
         " in this library; there are: ", listed(&Entry::name));
  }
  fail(EDGELM_UNAVAILABLE, bundle.path(), " was exported for ", target,
       ", which no runtime of this library runs (they run ", listed(&Entry::target), ")");
}

const Entry& choose(const Bundle& bundle, const RuntimeOptions& options) {
  const Entry& entry = for_target(bundle, options.runtime);
  const std::string& ops = bundle.manifest().ops;
  if (entry.runs(ops)) return entry;
  const std::string more = entry.operators[1] == nullptr ? "" : concat(", ", entry.operators[1]);
  fail(EDGELM_UNAVAILABLE, bundle.path(), " has ", ops, " operators, but ", entry.name, " runs ", entry.operators[0],
       more, ": use a newer libedgelm, or export the bundle again");
}

// For a bundle for a GPU, mention this in errors about missing requirements.
template <typename Open>
auto explained(const Bundle& bundle, const Open& open) {
  try {
    return open();
  } catch (const Error& error) {
    if (error.code != EDGELM_UNAVAILABLE || bundle.manifest().target == "cpu") throw;
    throw Error(error.code, concat(bundle.path(), " was exported for an NVIDIA GPU: ", error.what()));
  }
}

}  // namespace

std::unique_ptr<Runtime> open_runtime(const Bundle& bundle, const RuntimeOptions& options) {
  const Entry& entry = choose(bundle, options);
  check_options(options);
  return explained(bundle, [&] { return entry.open(bundle, options); });
}

std::unique_ptr<Tracing> open_tracing(const Bundle& bundle, const RuntimeOptions& options) {
  const Entry& entry = choose(bundle, options);
  check_options(options);
  if (entry.open_tracing == nullptr) return nullptr;
  return explained(bundle, [&] { return entry.open_tracing(bundle, options); });
}

}  // namespace edgelm::capi
