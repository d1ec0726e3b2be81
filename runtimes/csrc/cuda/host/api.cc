// What the functions of exports.cc share.
#include <string>

#include "cuda/host/fields.h"
#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

void append(std::string& to, const void* bytes, std::size_t size) { to.append(static_cast<const char*>(bytes), size); }

}  // namespace

DeviceInfo device_of(const Fields& fields) {
  const DeviceInfo device{i32(fields.size("sm")), i32(fields.size("multiprocessors"))};
  if (device.multiprocessors < 1) throw Error("multiprocessors is 0, expected 1 or more");
  return device;
}

std::string serialised(const Launches& launches) {
  std::string out;
  for (const Launch& one : launches) {
    const u32 head[7] = {u32(one.kernel.size()), one.grid[0], one.grid[1], one.grid[2], one.block, one.shared,
                         u32(one.args.size())};
    append(out, head, sizeof head);
    append(out, one.kernel.data(), one.kernel.size());
    append(out, one.args.data(), one.args.size());
  }
  return out;
}

}  // namespace edgelm::gpu
