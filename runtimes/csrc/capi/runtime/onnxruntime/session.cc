#include "capi/runtime/onnxruntime/session.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

#include "kernels/cpu.h"
#include "system/memory.h"
#if defined(_WIN32)
#include "system/windows_text.h"
#endif

namespace edgelm::ort {
OrtStatus* RegisterOperators(OrtSessionOptions* options, const OrtApiBase* base);
}

namespace edgelm::capi {
namespace {

// ONNX Runtime's environment, which all sessions share while there are any.
std::shared_ptr<OwnedEnv> shared_env(const OrtLibrary& library) {
  static std::mutex mutex;
  static auto& known = *new std::map<const OrtLibrary*, std::weak_ptr<OwnedEnv>>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<OwnedEnv> env = known[&library].lock();
  if (env == nullptr) {
    env = std::make_shared<OwnedEnv>(library);
    library.require(ort::CreateEnv(library.api, ort::kFatal, "edgelm", env->out()));
    known[&library] = env;
  }
  return env;
}

const OrtLibrary& checked_library(const Bundle& bundle, const std::string& path) {
  const OrtLibrary& library = open_onnxruntime(path);
  check_version(library, bundle);
  return library;
}

OwnedSessionOptions session_options(const OrtLibrary& library, const Bundle& bundle, int threads) {
  const OrtApi* api = library.api;
  OwnedSessionOptions options(library);
  library.require(ort::CreateSessionOptions(api, options.out()));
  // Set explicitly: with 0, ONNX Runtime pins threads to cores, even to cores outside a container's cpuset.
  library.require(ort::SetIntraOpNumThreads(api, options.get(), threads));
  library.require(ort::SetInterOpNumThreads(api, options.get(), 1));
  library.require(ort::SetSessionExecutionMode(api, options.get(), ort::kSequential));
  // A pattern would be kept for every input shape, and the portable mask grows by one with each token.
  library.require(ort::DisableMemPattern(api, options.get()));
  // Long enough to catch the next operator, short enough to leave the core to other programs.
  library.require(ort::AddSessionConfigEntry(api, options.get(), "session.intra_op.spin_duration_us", "20"));
  // Errors are returned; the log would repeat them on stderr.
  library.require(ort::SetSessionLogSeverityLevel(api, options.get(), ort::kFatal));
  if (bundle.manifest().ops == "native") {
    std::string why;
    if (ChooseKernels(&why) == nullptr) fail(EDGELM_UNAVAILABLE, why);
    library.require(ort::RegisterOperators(options.get(), library.base), EDGELM_UNAVAILABLE);
  }
  return options;
}

bool is_inside(const std::string& path, const std::string& folder) {
  const std::string start = folder == "/" ? folder : folder + "/";
  return path.compare(0, start.size(), start) == 0;
}

// ONNX Runtime reads weights only from the folder of the graph, with links resolved.
void refuse_linked_weights(const Bundle& bundle, const std::string& graph) {
  const std::string weights = bundle.file(bundle.manifest().weights_file), found = resolved(weights);
  if (is_inside(found, resolved(parent(graph))) || is_inside(found, parent(resolved(graph)))) return;
  fail(EDGELM_BUNDLE, weights, " is a link to ", found,
       ": ONNX Runtime reads weights only from the folder of the graph. Put the file itself there, or link the whole "
       "folder (",
       bundle.path(), ")");
}

std::basic_string<OrtPathCharacter> path_for_ort(const std::string& path) {
#if defined(_WIN32)
  return system::windows_path(path);
#else
  return path;
#endif
}

// The names of a session's inputs, outputs or optional inputs, by the entries that return their number and a name.
template <typename Count, typename Name>
std::vector<std::string> names(const Session& session, const Count& count, const Name& name) {
  const OrtLibrary& library = session.library();
  std::size_t number = 0;
  library.require(count(library.api, session.get(), &number));
  std::vector<std::string> found;
  for (std::size_t i = 0; i < number; ++i) {
    char* text = nullptr;
    library.require(name(library.api, session.get(), i, session.allocator(), &text));
    found.emplace_back(text);
    library.require(ort::AllocatorFree(library.api, session.allocator(), text));
  }
  return found;
}

}  // namespace

std::uint64_t checked_bytes(std::initializer_list<std::uint64_t> factors) {
  std::uint64_t bytes = 1;
  for (const std::uint64_t factor : factors) {
    if (factor != 0 && bytes > (std::uint64_t(1) << 48) / factor) {
      fail(EDGELM_RUNTIME, "a buffer would have more than ", std::uint64_t(1) << 48,
           " bytes: use a smaller context_length");
    }
    bytes *= factor;
  }
  return bytes;
}

Untouched::Untouched(std::uint64_t bytes) : data_(nullptr), bytes_(bytes) {
  data_ = static_cast<unsigned char*>(system::map_memory(std::max<std::size_t>(bytes, 1), true));
  if (data_ == nullptr) {
    fail(EDGELM_RUNTIME, "not enough memory for a cache of ", bytes, " bytes: use a smaller context_length");
  }
}

Untouched::~Untouched() {
  if (data_ != nullptr) system::unmap_memory(data_, std::max<std::size_t>(bytes_, 1));
}

std::vector<std::pair<std::string, std::string>> kv_names(std::int64_t layers) {
  std::vector<std::pair<std::string, std::string>> names;
  for (std::int64_t layer = 0; layer < layers; ++layer) {
    for (const char* part : {"key", "value"}) {
      names.emplace_back(concat("past_key_values.", layer, ".", part), concat("present.", layer, ".", part));
    }
  }
  return names;
}

Session::Session(const Bundle& bundle, const std::string& file, const std::string& onnxruntime, int threads)
    : library_(checked_library(bundle, onnxruntime)),
      env_(shared_env(library_)),
      session_(library_),
      memory_(library_) {
  const std::string path = bundle.file(file);
  const OwnedSessionOptions options = session_options(library_, bundle, threads);
  refuse_linked_weights(bundle, path);
  OrtStatus* status = ort::CreateSession(library_.api, env_->get(), path_for_ort(path).c_str(), options.get(),
                                         session_.out());
  if (status != nullptr) {
    fail(EDGELM_BUNDLE, "onnxruntime ", library_.version, " cannot load ", path, ": ", library_.problem(status),
         "; check the files with `edgelm inspect --verify ", bundle.path(), "`");
  }
  library_.require(ort::CreateCpuMemoryInfo(library_.api, ort::kDeviceAllocator, ort::kDefaultMemory, memory_.out()));
  library_.require(ort::GetAllocatorWithDefaultOptions(library_.api, &allocator_));
}

std::int64_t Session::size_of_axis(bool output, std::size_t index, int axis) const {
  OwnedTypeInfo type(library_);
  if (output) library_.require(ort::SessionGetOutputTypeInfo(library_.api, session_.get(), index, type.out()));
  else library_.require(ort::SessionGetInputTypeInfo(library_.api, session_.get(), index, type.out()));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  library_.require(ort::CastTypeInfoToTensorInfo(library_.api, type.get(), &tensor));
  if (tensor == nullptr) return -1;
  std::size_t rank = 0;
  library_.require(ort::GetDimensionsCount(library_.api, tensor, &rank));
  std::vector<std::int64_t> dims(rank);
  library_.require(ort::GetDimensions(library_.api, tensor, dims.data(), rank));
  const std::int64_t at = axis < 0 ? std::int64_t(rank) + axis : axis;
  return at < 0 || at >= std::int64_t(rank) ? -1 : dims[at];
}

void Session::check_graph(const Bundle& bundle, const std::string& lengths,
                          const std::vector<std::string>& more_outputs) const {
  const std::vector<std::string> inputs = names(*this, ort::SessionGetInputCount, ort::SessionGetInputName);
  const std::vector<std::string> outputs = names(*this, ort::SessionGetOutputCount, ort::SessionGetOutputName);
  const std::vector<std::string> optional = names(*this, ort::SessionGetOverridableInitializerCount,
                                                  ort::SessionGetOverridableInitializerName);
  const ModelInfo& model = bundle.manifest().model;
  const auto caches = kv_names(model.num_layers);
  std::set<std::string> wanted_inputs = {"input_ids", lengths}, wanted_outputs = {"logits"};
  wanted_outputs.insert(more_outputs.begin(), more_outputs.end());
  for (const auto& [past, present] : caches) {
    wanted_inputs.insert(past);
    wanted_outputs.insert(present);
  }
  std::vector<std::string> missing;
  const auto look = [&missing](const std::set<std::string>& wanted, const std::vector<std::string>& given) {
    const std::set<std::string> has(given.begin(), given.end());
    std::copy_if(wanted.begin(), wanted.end(), std::back_inserter(missing),
                 [&has](const std::string& name) { return has.count(name) == 0; });
  };
  look(wanted_inputs, inputs);
  look({"logits_start"}, optional);
  look(wanted_outputs, outputs);
  if (!missing.empty()) {
    std::string listed = missing[0];
    for (std::size_t i = 1; i < std::min<std::size_t>(missing.size(), 4); ++i) listed += ", " + missing[i];
    fail(EDGELM_BUNDLE, "the graph of ", bundle.path(), " lacks ", listed, ": export the bundle again");
  }
  // Buffers are sized by the manifest, so its numbers must match the graph's where the graph has any.
  const auto compare = [&](const std::vector<std::string>& given, bool output, const std::string& name, int axis,
                           const char* field, std::int64_t wanted) {
    const auto at = std::find(given.begin(), given.end(), name);
    const std::int64_t found = size_of_axis(output, std::size_t(at - given.begin()), axis);
    if (found < 0 || found == wanted) return;
    fail(EDGELM_BUNDLE, bundle.path(), ": model.", field, " is ", wanted, " in the manifest, but the graph's ", name,
         " has ", found, ": export the bundle again");
  };
  compare(outputs, true, "logits", -1, "vocab_size", model.vocab_size);
  for (const auto& names : caches) compare(inputs, false, names.first, 1, "num_kv_heads", model.num_kv_heads);
}

OwnedValue Session::tensor(void* data, std::uint64_t bytes, const std::vector<std::int64_t>& shape, int type) const {
  OwnedValue value(library_);
  library_.require(ort::CreateTensorWithData(library_.api, memory_.get(), data, bytes, shape.data(), shape.size(), type,
                                             value.out()));
  return value;
}

const float* Session::floats(OrtValue* value, std::vector<std::int64_t>* shape) const {
  OwnedShape info(library_);
  library_.require(ort::GetTensorTypeAndShape(library_.api, value, info.out()), EDGELM_BUNDLE);
  int type = 0;
  library_.require(ort::GetTensorElementType(library_.api, info.get(), &type));
  if (type != ort::kFloat) {
    fail(EDGELM_BUNDLE, "an output of the graph has element type ", type,
         ", expected float32: export the bundle again");
  }
  std::size_t rank = 0;
  library_.require(ort::GetDimensionsCount(library_.api, info.get(), &rank));
  shape->resize(rank);
  library_.require(ort::GetDimensions(library_.api, info.get(), shape->data(), rank));
  void* data = nullptr;
  library_.require(ort::GetTensorMutableData(library_.api, value, &data));
  return static_cast<const float*>(data);
}

}  // namespace edgelm::capi
