#include "system/memory.h"

#include <sys/mman.h>

namespace edgelm::system {

void* map_memory(std::size_t bytes, bool sparse) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS;
#if defined(MAP_NORESERVE)
  if (sparse) flags |= MAP_NORESERVE;
#endif
  void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (data == MAP_FAILED) return nullptr;
#if defined(MADV_NOHUGEPAGE)
  if (sparse) madvise(data, bytes, MADV_NOHUGEPAGE);  // with huge pages each touch would take 2 MB
#endif
  return data;
}

void unmap_memory(void* data, std::size_t bytes) { munmap(data, bytes); }

}  // namespace edgelm::system
