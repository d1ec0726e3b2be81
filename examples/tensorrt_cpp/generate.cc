// Generates tokens with an engine of EdgeLM and nothing of EdgeLM but its library of plugins.
//
//   generate ENGINE LIBRARY NEW_TOKENS ID ID ...
//
// prints the ids of the most probable tokens after the given ones, for example
//
//   generate fox/engines/trt-11.4.0-sm90.engine fox/engines/libedgelm_plugins-1a2b3c4d.so 20 1 15043 29892
//
// A tokenizer is not part of it; the bundle's is tokenizer.json or tokenizer.model. No GPU has run it yet.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int kDecode = 0, kPrefill = 1;  // the engine's profiles
constexpr int64_t kPositions = 1024;      // of the cache, if the engine does not fix them

struct Log final : nvinfer1::ILogger {
  void log(Severity severity, const char* message) noexcept override {
    if (severity <= Severity::kWARNING) std::fprintf(stderr, "%s\n", message);
  }
};

void check(bool done, const std::string& what) {
  if (!done) throw std::runtime_error(what + " failed");
}

void check(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

std::vector<char> read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  check(bool(file), "opening " + path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// Memory on the GPU; freed with the process.
void* allocate(std::size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes), "allocating " + std::to_string(bytes) + " bytes");
  check(cudaMemset(memory, 0, bytes), "clearing memory");
  return memory;
}

std::size_t bytes_of(nvinfer1::DataType type) { return type == nvinfer1::DataType::kINT8 ? 1 : 2; }

// One sequence: its caches, and a context for each profile.
class Model {
 public:
  Model(const std::string& engine, const std::string& library) : runtime_(nvinfer1::createInferRuntime(log_)) {
    check(runtime_ != nullptr, "starting TensorRT");
    // The runtime's own registry: engines of other bundles have their own. The path has to be absolute.
    const std::string path = std::filesystem::absolute(library).string();
    check(runtime_->getPluginRegistry().loadLibrary(path.c_str()) != nullptr, "loading " + path);
    const std::vector<char> bytes = read(engine);
    engine_.reset(runtime_->deserializeCudaEngine(bytes.data(), bytes.size()));
    check(engine_ != nullptr, "loading " + engine);
    check(cudaStreamCreate(&stream_), "creating a stream");
    chunk_ = engine_->getProfileShape("input_ids", kPrefill, nvinfer1::OptProfileSelector::kMAX).d[1];
    vocabulary_ = engine_->getTensorShape("logits").d[2];
    ids_ = allocate(sizeof(int32_t) * std::size_t(chunk_));
    length_ = allocate(sizeof(int32_t));
    logits_ = allocate(sizeof(float) * std::size_t(vocabulary_));
    for (int i = 0; i < engine_->getNbIOTensors(); ++i) {
      const std::string name = engine_->getIOTensorName(i);
      if (name.compare(0, 16, "past_key_values.") == 0) add_cache(name);
    }
    for (int profile : {kDecode, kPrefill}) {
      contexts_[profile].reset(engine_->createExecutionContext());
      check(contexts_[profile] != nullptr, "creating a context");
      bind(*contexts_[profile], profile);
    }
  }

  // Append tokens; return the most probable next one.
  int32_t next(std::vector<int32_t> ids) {
    int32_t best = 0;
    for (std::size_t done = 0; done < ids.size();) {
      const int64_t count = std::min(int64_t(ids.size() - done), chunk_);
      best = step(&ids[done], count);
      done += std::size_t(count);
    }
    return best;
  }

 private:
  void add_cache(const std::string& name) {
    nvinfer1::Dims shape = engine_->getTensorShape(name.c_str());  // [batch, heads, positions, bytes or values]
    shape.d[0] = 1;
    if (shape.d[2] < 0) {
      const auto most = engine_->getProfileShape(name.c_str(), kDecode, nvinfer1::OptProfileSelector::kMAX);
      shape.d[2] = std::min(most.d[2], kPositions);
    }
    positions_ = shape.d[2];
    std::size_t bytes = bytes_of(engine_->getTensorDataType(name.c_str()));
    for (int i = 0; i < shape.nbDims; ++i) bytes *= std::size_t(shape.d[i]);
    caches_[name] = {allocate(bytes), shape};
  }

  void bind(nvinfer1::IExecutionContext& context, int profile) {
    check(context.setOptimizationProfileAsync(profile, stream_), "choosing a profile");
    for (const auto& [past, cache] : caches_) {
      // A cache is written in place: its output has the same address.
      const std::string present = "present." + past.substr(16);
      check(context.setInputShape(past.c_str(), cache.shape), "setting the shape of " + past);
      check(context.setTensorAddress(past.c_str(), cache.memory), "binding " + past);
      check(context.setTensorAddress(present.c_str(), cache.memory), "binding " + present);
    }
    nvinfer1::Dims one{};
    one.nbDims = 1;
    one.d[0] = 1;
    check(context.setInputShape("past_lengths", one), "setting the shape of past_lengths");
    check(context.setTensorAddress("past_lengths", length_), "binding past_lengths");
    check(context.setTensorAddress("input_ids", ids_), "binding input_ids");
    check(context.setTensorAddress("logits", logits_), "binding logits");
  }

  int32_t step(const int32_t* ids, int64_t count) {
    if (used_ + count > positions_) throw std::runtime_error("the cache is full");
    nvinfer1::IExecutionContext& context = *contexts_[count == 1 ? kDecode : kPrefill];
    nvinfer1::Dims shape{};
    shape.nbDims = 2;
    shape.d[0] = 1;
    shape.d[1] = count;
    check(context.setInputShape("input_ids", shape), "setting the shape of input_ids");
    const auto used = int32_t(used_);
    std::vector<float> logits(static_cast<std::size_t>(vocabulary_));
    const auto copy = [&](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
      check(cudaMemcpyAsync(to, from, bytes, kind, stream_), "copying");
    };
    copy(ids_, ids, sizeof(int32_t) * std::size_t(count), cudaMemcpyHostToDevice);
    copy(length_, &used, sizeof used, cudaMemcpyHostToDevice);
    check(context.enqueueV3(stream_), "running the engine");
    copy(logits.data(), logits_, sizeof(float) * logits.size(), cudaMemcpyDeviceToHost);
    check(cudaStreamSynchronize(stream_), "waiting for the GPU");
    used_ += count;
    return int32_t(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  struct Cache {
    void* memory;
    nvinfer1::Dims shape;
  };

  Log log_;
  // Destroyed in reverse order: contexts, engine, runtime.
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<nvinfer1::IExecutionContext> contexts_[2];
  std::map<std::string, Cache> caches_;
  cudaStream_t stream_ = nullptr;
  void *ids_ = nullptr, *length_ = nullptr, *logits_ = nullptr;
  int64_t chunk_ = 0, vocabulary_ = 0, positions_ = 0, used_ = 0;
};

}  // namespace

int main(int count, char** arguments) {
  if (count < 5) {
    std::fprintf(stderr, "usage: %s ENGINE LIBRARY NEW_TOKENS ID ...\n", arguments[0]);
    return 2;
  }
  try {
    Model model(arguments[1], arguments[2]);
    std::vector<int32_t> ids;
    for (int i = 4; i < count; ++i) ids.push_back(std::atoi(arguments[i]));
    for (int left = std::atoi(arguments[3]); left > 0; --left) {
      ids = {model.next(ids)};
      std::printf("%d ", ids[0]);
      std::fflush(stdout);
    }
    std::printf("\n");
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
