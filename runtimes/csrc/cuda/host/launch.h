// A kernel launch as planned on the host, and the device that it is planned for.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/types.cuh"

namespace edgelm::gpu {

// A request that the kernels cannot compute. `kBundle`: the bundle is damaged or of another version of EdgeLM.
class Error : public std::runtime_error {
 public:
  enum class Kind { kDevice = 1, kBundle = 2, kOther = 3 };
  explicit Error(const std::string& message, Kind kind = Kind::kDevice) : std::runtime_error(message), kind(kind) {}
  const Kind kind;
};

struct Launch {
  std::string kernel;
  u32 grid[3];
  u32 block;             // threads; blocks have one dimension
  u32 shared;            // bytes of dynamic shared memory
  std::vector<u8> args;  // the kernel's only parameter, a struct
};
using Launches = std::vector<Launch>;

// The properties of a device that plans depend on.
struct DeviceInfo {
  i32 sm;               // compute capability, e.g. 90
  i32 multiprocessors;  // SMs

  // Bytes of shared memory of a multiprocessor. A block may use 1 KiB less.
  i64 shared_bytes() const;
  // Bytes of the next launch's weights that may be requested for the L2 cache while memory is idle; 0: none.
  i64 prefetch_bytes() const;
};

// A struct of arguments with all bytes zero, padding included: equal plans have equal bytes.
template <class Args> Args zeroed() {
  static_assert(std::is_trivially_copyable_v<Args>, "the driver copies the bytes");
  Args args;
  std::memset(&args, 0, sizeof args);
  return args;
}

template <class Args>
Launch make_launch(std::string kernel, i64 x, i64 y, i64 z, i64 threads, i64 shared, const Args& args) {
  const u8* bytes = reinterpret_cast<const u8*>(&args);
  return {std::move(kernel), {u32(x), u32(y), u32(z)}, u32(threads), u32(shared), {bytes, bytes + sizeof args}};
}

// For kernels that divide by d, 1 to 2^31.
Divisor divisor(i64 d);

// An address on the device as a pointer of the type that a struct has; 0 is null.
template <class T> void point(T*& to, u64 address) { to = reinterpret_cast<T*>(address); }

constexpr i64 kMostSize = (i64(1) << 31) - 1;  // of a dimension: an i32 of the arguments
constexpr i64 kAlignment = 256;
constexpr i64 divide_up(i64 x, i64 by) { return (x + by - 1) / by; }
constexpr i64 round_up(i64 x, i64 multiple = kAlignment) { return divide_up(x, multiple) * multiple; }

}  // namespace edgelm::gpu
