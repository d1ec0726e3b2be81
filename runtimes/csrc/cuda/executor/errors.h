// Errors of the executor beyond those of launch planning.
#pragma once

#include <string>

#include "cuda/host/launch.h"

namespace edgelm::gpu {

// There is no driver, no GPU, or no kernels for it.
class UnavailableError : public Error {
 public:
  explicit UnavailableError(const std::string& message) : Error(message) {}
};

// The GPU has not enough memory.
class DeviceMemoryError : public Error {
 public:
  explicit DeviceMemoryError(const std::string& message) : Error(message) {}
};

// Bytes with three digits, as edgelm/sizes.py formats them: "13.8 GB".
std::string format_size(u64 bytes);

}  // namespace edgelm::gpu
