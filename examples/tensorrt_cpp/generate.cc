// Generates tokens with an engine of an EdgeLM bundle: C++, TensorRT, and of EdgeLM only its library of plugins.
//
//   generate ENGINE IDS COUNT [PLUGINS]
//
//   ENGINE   engines/NAME.engine of a bundle that was exported with --target tensorrt
//   IDS      the prompt: token ids such as 12,345,67, or a file of them
//   COUNT    tokens to generate
//   PLUGINS  the library that engines/NAME.json names; none if the engine contains it (edgelm build --embed-plugins)
//
// Prints the most probable ids as they are generated, then the speed (standard error). Exit status: 0; 1 failure;
// 2 usage. docs/gpu/tensorrt.md describes the engine's tensors. No GPU has run it yet.
#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

using namespace nvinfer1;
using std::string, std::to_string;

namespace {

constexpr int32_t kDecode = 0, kPrefill = 1;  // an engine's profiles: one token a step, and a chunk of the prompt
template <class T> using Owned = std::unique_ptr<T, cudaError_t (*)(T*)>;

void require(bool right, const string& wrong) {
  if (!right) throw std::runtime_error(wrong);
}

void check(cudaError_t status, const string& doing) {
  require(status == cudaSuccess, doing + ": " + cudaGetErrorString(status));
}

// TensorRT's log, to which plugins write too. It keeps the first error of a call, which is the reason of its failure.
class Log final : public ILogger {
 public:
  void log(Severity severity, const char* text) noexcept override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (severity <= Severity::kERROR && first_.empty()) first_ = text;
  }
  string take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(first_, "");
  }
  void check(bool done, const string& doing) {
    const string why = take();
    require(done, doing + " failed: " + (why.empty() ? "TensorRT does not say why" : why));
  }

 private:
  std::mutex mutex_;
  string first_;
};

Owned<void> allocate(int64_t bytes, const string& what) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, size_t(bytes)), "allocating " + to_string(bytes) + " bytes for " + what);
  Owned<void> owned(memory, cudaFree);
  check(cudaMemset(memory, 0, size_t(bytes)), "clearing " + what);
  return owned;
}

// Map a file, so that an engine of some GB need not fit into the host's memory.
std::pair<std::shared_ptr<void>, size_t> map_file(const string& path) {
  const int file = open(path.c_str(), O_RDONLY);
  struct stat status = {};
  const size_t size = file >= 0 && fstat(file, &status) == 0 ? size_t(status.st_size) : 0;
  void* data = size > 0 ? mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  if (file >= 0) close(file);
  require(data != MAP_FAILED, "cannot read the engine " + path + ", or it is empty");
  return {std::shared_ptr<void>(data, [size](void* mapped) { munmap(mapped, size); }), size};
}

// One sequence, with its caches on the GPU.
class Model {
 public:
  // `positions`: tokens that the caches must hold, those of the prompt and new ones.
  Model(const string& path, const string& plugins, int64_t positions) {
    const auto [data, size] = map_file(path);
    require(plugins.empty() || std::filesystem::is_regular_file(plugins), "there is no library " + plugins);
    int devices = 0;
    check(cudaGetDeviceCount(&devices), "there is no GPU, or no driver that is new enough for it");
    cudaStream_t stream = nullptr;
    check(cudaStreamCreate(&stream), "starting the GPU");
    stream_.reset(stream);
    IRuntime* runtime = createInferRuntime(log_);
    const string why = log_.take();  // TensorRT 10.15 and 11.4 return a wild pointer if CUDA fails
    require(runtime && why.empty(), "starting TensorRT failed: " + why);
    runtime_.reset(runtime);
    if (plugins.empty()) {
      runtime_->setEngineHostCodeAllowed(true);
    } else {  // into the registry of this runtime, since the global one refuses the plugins of a second bundle
      const string absolute = std::filesystem::absolute(plugins).string();
      log_.check(runtime_->getPluginRegistry().loadLibrary(absolute.c_str()) != nullptr, "loading " + absolute);
    }
    engine_.reset(runtime_->deserializeCudaEngine(data.get(), size));
    const int32_t v = getInferLibVersion();
    const string version = to_string(v / 10000) + "." + to_string(v / 100 % 100) + "." + to_string(v % 100);
    const string how = plugins.empty() ? " without a library of plugins" : "";
    log_.check(engine_ != nullptr, "loading " + path + how + " in TensorRT " + version);
    choose_sizes(path, positions);
    allocate_tensors();
    decode_ = make_context(kDecode);
    prefill_ = make_context(kPrefill);
  }

  // Append the prompt. Return the most probable next id.
  int32_t prefill(const std::vector<int32_t>& ids) {
    for (int32_t id : ids) {
      const string wrong = to_string(id) + " is no token id: there are ";
      require(id >= 0 && id < int64_t(logits_.size()), wrong + to_string(logits_.size()));
    }
    int32_t next = 0;
    for (size_t at = 0; at < ids.size(); at += size_t(chunk_)) {
      const int64_t count = std::min(chunk_, int64_t(ids.size() - at));
      log_.check(prefill_->setInputShape("input_ids", {2, {1, count}}), "setting the shape of input_ids");
      next = step(&ids[at], count, [&] { enqueue(*prefill_); });
    }
    return next;
  }

  // Append one id. Return the most probable next id.
  int32_t decode(int32_t id) {
    if (graph_) return step(&id, 1, [&] { check(cudaGraphLaunch(graph_.get(), stream_.get()), "running a step"); });
    const int32_t next = step(&id, 1, [&] { enqueue(*decode_); });
    if (!std::exchange(decoded_, true)) capture();  // not before: TensorRT and plugins allocate in the first step
    return next;
  }

 private:
  void choose_sizes(const string& path, int64_t positions) {
    const Dims ids = engine_->getProfileShape("input_ids", kPrefill, OptProfileSelector::kMAX);
    const Dims cache = engine_->getProfileShape("past_key_values.0.key", kDecode, OptProfileSelector::kMAX);
    const Dims logits = engine_->getTensorShape("logits");
    require(ids.nbDims == 2 && cache.nbDims == 4 && logits.nbDims == 3, path + " is no engine of an EdgeLM bundle");
    const string few = ", and the engine's caches hold " + to_string(cache.d[2]);
    require(positions <= cache.d[2], "the prompt and new tokens are " + to_string(positions) + few);
    chunk_ = ids.d[1];
    capacity_ = std::min((positions + 63) / 64 * 64, cache.d[2]);  // as EdgeLM's own runtimes
    logits_.resize(size_t(logits.d[2]));
  }

  // The shape of a decoding step. Variable dimensions are the sequence, its token, and the positions of a cache.
  Dims shape(const string& name) const {
    Dims dims = engine_->getTensorShape(name.c_str());
    for (int32_t i = 0; i < dims.nbDims; ++i) {
      if (dims.d[i] < 0) dims.d[i] = i == 2 ? capacity_ : 1;
    }
    return dims;
  }

  void allocate_tensors() {
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const string name = engine_->getIOTensorName(i);
      if (name.rfind("present.", 0) == 0) continue;
      const DataType type = engine_->getTensorDataType(name.c_str());
      int64_t bytes = type == DataType::kINT8 ? 1 : type == DataType::kHALF || type == DataType::kBF16 ? 2 : 4;
      const Dims dims = shape(name);
      for (int32_t axis = 0; axis < dims.nbDims; ++axis) bytes *= dims.d[axis];
      memory_.emplace(name, allocate(name == "input_ids" ? 4 * chunk_ : bytes, name));
    }
    for (int32_t profile : {kDecode, kPrefill}) {
      scratch_bytes_ = std::max(scratch_bytes_, engine_->getDeviceMemorySizeForProfileV2(profile));
    }
    if (scratch_bytes_) scratch_ = allocate(scratch_bytes_, "scratch");  // shared: the contexts run in turn
  }

  std::unique_ptr<IExecutionContext> make_context(int32_t profile) {
    std::unique_ptr<IExecutionContext> context(
        engine_->createExecutionContext(ExecutionContextAllocationStrategy::kUSER_MANAGED));
    log_.check(context != nullptr, "making an execution context");
    log_.check(context->setOptimizationProfileAsync(profile, stream_.get()), "choosing a profile");
    if (scratch_) context->setDeviceMemoryV2(scratch_.get(), scratch_bytes_);
    for (int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const string name = engine_->getIOTensorName(i);
      const bool input = engine_->getTensorIOMode(name.c_str()) == TensorIOMode::kINPUT;
      if (input) log_.check(context->setInputShape(name.c_str(), shape(name)), "setting the shape of " + name);
      // The output present.* is the input past_key_values.*, updated in place: both have one address.
      const string owner = name.rfind("present.", 0) == 0 ? "past_key_values." + name.substr(8) : name;
      const auto found = memory_.find(owner);
      require(found != memory_.end(), "the engine has an output " + name + " that this program does not know");
      log_.check(context->setTensorAddress(name.c_str(), found->second.get()), "setting the address of " + name);
    }
    check(cudaStreamSynchronize(stream_.get()), "choosing a profile");
    return context;
  }

  void enqueue(IExecutionContext& context) { log_.check(context.enqueueV3(stream_.get()), "running a step"); }

  // Append ids to the first `cached_`. `launch` runs the engine.
  template <class Launch> int32_t step(const int32_t* ids, int64_t count, const Launch& launch) {
    const auto copy = [&](void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
      check(cudaMemcpyAsync(to, from, bytes, kind, stream_.get()), "copying");
    };
    copy(memory_.at("input_ids").get(), ids, 4 * size_t(count), cudaMemcpyHostToDevice);
    copy(memory_.at("past_lengths").get(), &cached_, sizeof cached_, cudaMemcpyHostToDevice);
    launch();
    copy(logits_.data(), memory_.at("logits").get(), sizeof(float) * logits_.size(), cudaMemcpyDeviceToHost);
    check(cudaStreamSynchronize(stream_.get()), "running a step");
    cached_ += int32_t(count);
    return int32_t(std::max_element(logits_.begin(), logits_.end()) - logits_.begin());
  }

  // Make a CUDA graph of decoding, which costs the host one call a step. An engine that cannot be captured, for
  // example since its weights are streamed, is launched as before.
  void capture() {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t made = nullptr;
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeThreadLocal), "capturing a step");
    const bool launched = decode_->enqueueV3(stream_.get());
    const bool captured = cudaStreamEndCapture(stream_.get(), &graph) == cudaSuccess && launched;
    if (captured && cudaGraphInstantiateWithFlags(&made, graph, 0) == cudaSuccess) graph_.reset(made);
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();  // forget why, if it failed, as TensorRT's log does
    log_.take();
  }

  // What is declared first is freed last.
  Log log_;
  Owned<CUstream_st> stream_{nullptr, cudaStreamDestroy};
  std::unique_ptr<IRuntime> runtime_;
  std::unique_ptr<ICudaEngine> engine_;
  std::map<string, Owned<void>> memory_;  // of inputs and logits
  Owned<void> scratch_{nullptr, cudaFree};
  std::unique_ptr<IExecutionContext> decode_, prefill_;
  Owned<CUgraphExec_st> graph_{nullptr, cudaGraphExecDestroy};
  std::vector<float> logits_;
  int64_t chunk_ = 0, capacity_ = 0, scratch_bytes_ = 0;
  int32_t cached_ = 0;
  bool decoded_ = false;
};

std::vector<int32_t> read_ids(string text) {
  if (std::ifstream file(text); file) text.assign(std::istreambuf_iterator<char>(file), {});
  std::replace(text.begin(), text.end(), ',', ' ');
  std::istringstream words(text);
  const std::vector<int32_t> ids{std::istream_iterator<int32_t>(words), {}};
  require(!ids.empty() && words.eof(), "IDS is neither a list of token ids, such as 12,345,67, nor a file of them");
  return ids;
}

void generate(Model& model, const std::vector<int32_t>& prompt, int32_t count) {
  using Clock = std::chrono::steady_clock;
  const auto report = [](const char* what, size_t tokens, Clock::duration time) {
    const double speed = double(tokens) / std::chrono::duration<double>(time).count();
    std::cerr << what << ": " << tokens << " tokens, " << speed << " tokens/s\n";
  };
  const Clock::time_point start = Clock::now();
  int32_t id = model.prefill(prompt);
  const Clock::time_point first = Clock::now();
  std::cout << id << std::flush;
  for (int32_t i = 1; i < count; ++i) std::cout << ' ' << (id = model.decode(id)) << std::flush;
  const Clock::time_point end = Clock::now();
  std::cout << std::endl;
  report("prefill", prompt.size(), first - start);
  if (count > 1) report("decode", size_t(count - 1), end - first);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4 && argc != 5) {
    std::cerr << "usage: generate ENGINE IDS COUNT [PLUGINS]" << std::endl;
    return 2;
  }
  try {
    const std::vector<int32_t> prompt = read_ids(argv[2]);
    int32_t count = 0;
    require(bool(std::istringstream(argv[3]) >> count) && count > 0,
            string("COUNT is ") + argv[3] + ": give 1 or more");
    Model model(argv[1], argc > 4 ? argv[4] : "", int64_t(prompt.size()) + count);
    generate(model, prompt, count);
    return 0;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << std::endl;
    return 1;
  }
}
