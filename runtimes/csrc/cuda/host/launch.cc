#include "cuda/host/launch.h"

namespace edgelm::gpu {

i64 DeviceInfo::shared_bytes() const {
  struct Known {
    i32 sm;
    i64 kib;
  };
  constexpr Known kKnown[] = {{120, 100}, {110, 228}, {100, 228}, {90, 228},
                              {89, 100},  {87, 164},  {86, 100},  {80, 164}};
  for (const Known& known : kKnown) {
    if (known.sm <= sm) return known.kib * 1024;
  }
  throw Error("compute capability " + std::to_string(sm / 10) + "." + std::to_string(sm % 10) +
              ", expected 8.0 or more");
}

// Data center GPUs, RTX 40 and RTX 50 have 24 MB of L2 or more. RTX 30 and Orin have 2 to 6 MB, in which weights would
// displace the keys and values that the launch is reading; the size of Thor's is not published.
i64 DeviceInfo::prefetch_bytes() const { return sm == 86 || sm == 87 || sm / 10 == 11 ? 0 : i64(8) << 20; }

Divisor divisor(i64 d) {
  if (d < 1 || d > i64(1) << 31) throw Error("a divisor is " + std::to_string(d) + ", expected 1 to 2^31");
  u32 shift = 31;
  while (i64(1) << (shift - 31) < d) ++shift;
  return {u32(((u64(1) << shift) + u64(d) - 1) / u64(d)), shift};
}

}  // namespace edgelm::gpu
