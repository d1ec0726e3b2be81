// The NVIDIA driver's library, opened when the first plugin runs: devices, kernels and launches in the context that
// TensorRT has made current. The Python runtime has its own (runtimes/cuda/driver.py).
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "cuda/host/launch.h"
#include "cuda/driver/kernel_archive.h"

namespace edgelm::trt {

// The library: libcuda.so.1, or the one that EDGELM_CUDA_DRIVER names.
class Driver {
 public:
  // Open the library, once a process. Throws Error if there is no driver.
  static const Driver& get();

  // Call a function; the status is 0 or Error is thrown, with what to do about it.
  template <class... Args> void call(const char* function, const std::string& doing, Args... args) const {
    const int status = reinterpret_cast<int (*)(Args...)>(find(function))(args...);
    if (status) fail(function, status, doing);
  }
  bool has(const char* function) const;
  // The address of a function. Throws Error if this driver lacks it.
  void* find(const char* function) const;
  [[noreturn]] void fail(const char* function, int status, const std::string& doing) const;

  gpu::CudaVersion version() const { return version_; }

 private:
  Driver();

  std::string path_;
  void* library_;
  gpu::CudaVersion version_;
};

// A kernel that is loaded in a context.
struct LoadedKernel {
  void* handle;
  bool early;  // launched with programmatic dependent launch
};

// A device with its kernels, which are loaded once for each context of the driver.
class DeviceContext {
 public:
  // That of the calling thread's current context. Throws Error if there is none.
  static DeviceContext& current();

  explicit DeviceContext(const Driver& driver);

  const gpu::DeviceInfo& info() const { return info_; }
  // Return the kernels of launches, and load those that are not loaded yet, which may wait for the device.
  std::vector<LoadedKernel> load(const gpu::Launches& launches);
  // Launch loaded kernels, in order.
  void launch(const gpu::Launches& launches, const std::vector<LoadedKernel>& kernels, void* stream) const;

 private:
  struct Function {
    void* handle;
    u64 argument_bytes;
    bool pdl;
    u32 shared;
  };
  Function& function(const std::string& kernel);
  void load_module();

  const Driver& driver_;
  int device_ = 0;
  std::string name_;
  gpu::DeviceInfo info_{};
  u32 most_shared_ = 0;
  bool pdl_;
  std::mutex mutex_;
  std::string target_;  // of the loaded image
  void* module_ = nullptr;
  std::map<std::string, Function> functions_;
  void *launch_kernel_, *launch_kernel_early_ = nullptr;  // of the driver: looked up once
};

}  // namespace edgelm::trt
