// Stands in for TensorRT and the CUDA runtime under examples/tensorrt_cpp, with the declarations in declarations/. The engine
// is Python's: cpp_example.py describes its tensors and runs it. What TensorRT refuses is refused: shapes outside the
// profile, and a run with a tensor, a shape or scratch memory missing. Memory is the host's, with canaries behind it.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "NvInfer.h"

using namespace nvinfer1;

namespace {

using Shape = std::array<int64_t, 8>;
struct Tensor {
  std::string name;
  bool input;
  DataType type;
  int32_t rank;
  Shape shape, most[2];  // with -1 for variable dimensions; the largest of each profile
};
struct Bound {
  void* address = nullptr;
  int32_t rank = 0;
  Shape shape{};
};
struct Run {
  int32_t profile;
  std::map<std::string, Bound> bound;
};
using Callback = int (*)(int32_t profile, const char* name, void* address, int32_t rank, const int64_t* dims);

std::vector<Tensor> g_tensors;
Callback g_callback;
int64_t g_scratch;
std::string g_refused, g_message, g_calls;
std::map<char*, size_t> g_memory;
bool g_capturing, g_capturable;
ILogger* g_logger;

constexpr size_t kCanary = 64;
constexpr char kCanaryByte = char(0xA5);

void called(const std::string& what) { g_calls += what + "\n"; }

bool error(const std::string& message) {
  g_logger->log(ILogger::Severity::kERROR, message.c_str());
  g_logger->log(ILogger::Severity::kERROR, "a second error");
  return false;
}
bool refuses(const char* call) { return g_refused == call && !error(g_message); }

const Tensor* find(const char* name) {
  for (const Tensor& tensor : g_tensors) {
    if (tensor.name == name) return &tensor;
  }
  return nullptr;
}

Dims dims_of(const Tensor* tensor, const Shape& shape) {
  Dims dims{tensor ? tensor->rank : -1, {}};
  std::copy(shape.begin(), shape.end(), dims.d);
  return dims;
}

bool play(const Run& run) {
  for (const auto& [name, one] : run.bound) {
    if (g_callback(run.profile, name.c_str(), one.address, one.rank, one.shape.data())) return false;
  }
  return g_callback(run.profile, nullptr, nullptr, 0, nullptr) == 0;
}

struct Context final : IExecutionContext {
  Run run{-1, {}};
  int64_t scratch = 0;
};
struct Engine final : ICudaEngine {};
struct Registry final : IPluginRegistry {
  PluginLibraryHandle loadLibrary(AsciiChar const* path) noexcept override {
    called(std::string("loadLibrary ") + path);
    return refuses("loadLibrary") ? nullptr : this;
  }
} g_registry;
struct Runtime final : IRuntime {};

bool inside(const void* at, size_t bytes) {
  auto found = g_memory.upper_bound(static_cast<char*>(const_cast<void*>(at)));
  if (found == g_memory.begin()) return false;
  --found;
  return static_cast<const char*>(at) + bytes <= found->first + found->second;
}

cudaError_t failure(const char* call) { return g_refused == call ? cudaError(2) : cudaSuccess; }

cudaError_t allocate(void** memory, size_t size) {
  char* made = static_cast<char*>(std::aligned_alloc(256, (size + kCanary + 255) / 256 * 256));
  std::memset(made, 0xFF, size);
  std::memset(made + size, kCanaryByte, kCanary);
  g_memory[made] = size;
  *memory = made;
  return cudaSuccess;
}

cudaError_t release(void* memory) {
  const auto found = g_memory.find(static_cast<char*>(memory));
  if (found == g_memory.end()) std::abort();
  const char* end = found->first + found->second;
  if (std::count(end, end + kCanary, kCanaryByte) != std::ptrdiff_t(kCanary)) called("overwritten");
  std::free(memory);
  g_memory.erase(found);
  return cudaSuccess;
}

}  // namespace

struct CUgraph_st { Run run; };
struct CUgraphExec_st { Run run; };
static CUgraph_st* g_graph;

bool IExecutionContext::setOptimizationProfileAsync(int32_t profile, cudaStream_t) noexcept {
  static_cast<Context*>(this)->run = {profile, {}};
  return !refuses("setOptimizationProfileAsync");
}
void IExecutionContext::setDeviceMemoryV2(void* memory, int64_t size) noexcept {
  static_cast<Context*>(this)->scratch = inside(memory, size_t(size)) ? size : 0;
}
bool IExecutionContext::setInputShape(char const* name, Dims const& dims) noexcept {
  Run& run = static_cast<Context*>(this)->run;
  const Tensor* tensor = find(name);
  if (!tensor || !tensor->input || dims.nbDims != tensor->rank) return error("no such input");
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    if (dims.d[i] < 1 || dims.d[i] > tensor->most[run.profile][size_t(i)]) return error("outside the profile");
    run.bound[name].shape[size_t(i)] = dims.d[i];
  }
  run.bound[name].rank = dims.nbDims;
  return true;
}
bool IExecutionContext::setTensorAddress(char const* name, void* data) noexcept {
  static_cast<Context*>(this)->run.bound[name].address = data;
  return find(name) || error("no such tensor");
}
bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  const auto& [run, scratch] = std::tie(static_cast<Context*>(this)->run, static_cast<Context*>(this)->scratch);
  if (!stream || scratch < g_scratch - run.profile) return error("no stream or scratch memory");
  for (const Tensor& tensor : g_tensors) {
    const auto found = run.bound.find(tensor.name);
    if (found == run.bound.end() || !found->second.address || (tensor.input && !found->second.rank)) {
      return error("an unbound tensor " + tensor.name);
    }
  }
  called((g_capturing ? "capture " : "run ") + std::to_string(run.profile));
  if (!g_capturing) return play(run);
  if (g_capturable) g_graph = new CUgraph_st{run};
  return g_capturable || error("this engine cannot be captured");
}

int32_t ICudaEngine::getNbIOTensors() const noexcept { return int32_t(g_tensors.size()); }
char const* ICudaEngine::getIOTensorName(int32_t index) const noexcept {
  return g_tensors.at(size_t(index)).name.c_str();
}
TensorIOMode ICudaEngine::getTensorIOMode(char const* name) const noexcept {
  return find(name)->input ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}
DataType ICudaEngine::getTensorDataType(char const* name) const noexcept { return find(name)->type; }
Dims ICudaEngine::getTensorShape(char const* name) const noexcept {
  const Tensor* tensor = find(name);
  return dims_of(tensor, tensor ? tensor->shape : Shape{});
}
Dims ICudaEngine::getProfileShape(char const* name, int32_t profile, OptProfileSelector select) const noexcept {
  const Tensor* tensor = find(name);
  return dims_of(tensor, tensor && select == OptProfileSelector::kMAX ? tensor->most[profile] : Shape{});
}
int64_t ICudaEngine::getDeviceMemorySizeForProfileV2(int32_t profile) const noexcept { return g_scratch - profile; }
IExecutionContext* ICudaEngine::createExecutionContext(ExecutionContextAllocationStrategy strategy) noexcept {
  if (strategy != ExecutionContextAllocationStrategy::kUSER_MANAGED) std::abort();
  return refuses("createExecutionContext") ? nullptr : new Context;
}

IPluginRegistry& IRuntime::getPluginRegistry() noexcept { return g_registry; }
void IRuntime::setEngineHostCodeAllowed(bool allowed) noexcept { called(allowed ? "allowed" : "forbidden"); }
ICudaEngine* IRuntime::deserializeCudaEngine(void const*, std::size_t size) noexcept {
  called("engine of " + std::to_string(size));
  return refuses("deserializeCudaEngine") ? nullptr : new Engine;
}
IRuntime* nvinfer1::createInferRuntime(ILogger& logger) noexcept {
  g_logger = &logger;
  // As TensorRT does when CUDA fails.
  return refuses("createInferRuntime") ? reinterpret_cast<IRuntime*>(0x238) : new Runtime;
}

extern "C" {
int32_t getInferLibVersion() noexcept { return 100304; }

char const* cudaGetErrorString(cudaError_t) { return "as CUDA says"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, failure("cudaGetDeviceCount"); }
cudaError_t cudaMalloc(void** memory, size_t size) {
  return failure("cudaMalloc") ? failure("cudaMalloc") : allocate(memory, size);
}
cudaError_t cudaFree(void* memory) { return release(memory); }
cudaError_t cudaMemset(void* memory, int value, size_t size) {
  if (!inside(memory, size)) return cudaError(1);
  return std::memset(memory, value, size), cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void* to, void const* from, size_t size, cudaMemcpyKind kind, cudaStream_t stream) {
  if (!stream || g_capturing || !inside(kind == cudaMemcpyHostToDevice ? to : from, size)) return cudaError(1);
  return std::memcpy(to, from, size), cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t* stream) { return *stream = reinterpret_cast<cudaStream_t>(1), cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return failure("cudaStreamSynchronize"); }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return g_capturing = true, cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) {
  g_capturing = false;
  *graph = std::exchange(g_graph, nullptr);
  return *graph ? cudaSuccess : cudaError(901);
}
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph, unsigned long long) {
  return *made = new CUgraphExec_st{graph->run}, cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  called("replay");
  return play(graph->run) ? cudaSuccess : cudaError(700);
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph, cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph, cudaSuccess; }

// For Python: begin anew, add a tensor, and read what was called.
void stand_in(Callback callback, int64_t scratch, int capturable, const char* refused, const char* message) {
  g_tensors.clear();
  g_calls.clear();
  g_callback = callback;
  g_scratch = scratch;
  g_capturable = capturable;
  g_refused = refused;
  g_message = message;
}
void stand_in_tensor(const char* name, int input, int type, int rank, const int64_t* shape, const int64_t* decode,
                     const int64_t* prefill) {
  Tensor made{name, bool(input), DataType(type), rank, {}, {}};
  std::copy_n(shape, rank, made.shape.begin());
  std::copy_n(decode, rank, made.most[0].begin());
  std::copy_n(prefill, rank, made.most[1].begin());
  g_tensors.push_back(made);
}
const char* stand_in_calls() { return g_calls.c_str(); }
int stand_in_buffers() { return int(g_memory.size()); }
}
