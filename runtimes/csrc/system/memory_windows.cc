#include "system/memory.h"

#define NOMINMAX
#define WIN32_LEAN_AND_MEAN
#include <windows.h>

namespace edgelm::system {

void* map_memory(std::size_t bytes, bool) {
  return VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
}

void unmap_memory(void* data, std::size_t) { VirtualFree(data, 0, MEM_RELEASE); }

}  // namespace edgelm::system
