// What examples/tensorrt_cpp uses of TensorRT, declared for a compiler's check where NVIDIA's headers are not installed.
// Nothing links or runs with it. test_example.py checks the example with NVIDIA's own headers where there are some.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda_runtime_api.h"

namespace nvinfer1 {

enum class DataType : int32_t { kINT8 = 2 };
enum class OptProfileSelector : int32_t { kMAX = 2 };

struct Dims {
  int32_t nbDims;
  int64_t d[8];
};

class ILogger {
 public:
  enum class Severity : int32_t { kWARNING = 2 };
  virtual void log(Severity severity, const char* message) noexcept = 0;
  virtual ~ILogger() = default;
};

class IPluginRegistry {
 public:
  using PluginLibraryHandle = void*;
  virtual PluginLibraryHandle loadLibrary(const char* path) noexcept = 0;

 protected:
  virtual ~IPluginRegistry() = default;
};

class IExecutionContext {
 public:
  virtual ~IExecutionContext() noexcept = default;
  bool setOptimizationProfileAsync(int32_t profile, cudaStream_t stream) noexcept;
  bool setInputShape(const char* name, const Dims& dims) noexcept;
  bool setTensorAddress(const char* name, void* data) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
 public:
  virtual ~ICudaEngine() noexcept = default;
  int32_t getNbIOTensors() const noexcept;
  const char* getIOTensorName(int32_t index) const noexcept;
  DataType getTensorDataType(const char* name) const noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  Dims getProfileShape(const char* name, int32_t profile, OptProfileSelector select) const noexcept;
  IExecutionContext* createExecutionContext() noexcept;
};

class IRuntime {
 public:
  virtual ~IRuntime() noexcept = default;
  IPluginRegistry& getPluginRegistry() noexcept;
  ICudaEngine* deserializeCudaEngine(const void* data, std::size_t size) noexcept;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
