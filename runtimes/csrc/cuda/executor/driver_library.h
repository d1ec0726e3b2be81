// The NVIDIA driver's library, opened at run time: calls, and errors with what to do about them. As
// runtimes/cuda/driver_library.py. TensorRT plugins have their own (cuda/driver/driver.h), part of what engines store.
#pragma once

#include <map>
#include <string>

#include "cuda/driver/kernel_images.h"
#include "cuda/executor/errors.h"

namespace edgelm::gpu {

constexpr int kOutOfMemory = 2, kNoDevice = 100;  // errors of the driver

class DriverLibrary {
 public:
  // Open the library that EDGELM_CUDA_DRIVER names, otherwise libcuda.so.1, and initialise it. It stays loaded. Throws
  // UnavailableError if there is no driver or no GPU.
  DriverLibrary();
  DriverLibrary(const DriverLibrary&) = delete;
  DriverLibrary& operator=(const DriverLibrary&) = delete;

  // Call a function by its symbol; return its status: 0, or one that `allowed` accepts. Otherwise throw, naming `doing`.
  template <class... Args> void call(const char* function, const char* doing, Args... args) const {
    if (const int status = attempt(function, args...)) fail(function, status, doing);
  }
  // Call a function and return its status.
  template <class... Args> int attempt(const char* function, Args... args) const {
    return reinterpret_cast<int (*)(Args...)>(find(function))(args...);
  }
  bool has(const char* function) const;
  [[noreturn]] void fail(const std::string& function, int status, const std::string& doing) const;

  CudaVersion version() const { return version_; }  // that the driver supports

 private:
  // Throws Error if this driver lacks it. One thread at a time.
  void* find(const char* function) const;
  std::string words(const char* function, int status) const;

  std::string path_;
  void* library_ = nullptr;
  CudaVersion version_{};
  mutable std::map<std::string, void*, std::less<>> functions_;
};

}  // namespace edgelm::gpu
