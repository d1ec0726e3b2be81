// Memory straight from the system.
#ifndef EDGELM_SYSTEM_MEMORY_H_
#define EDGELM_SYSTEM_MEMORY_H_

#include <cstddef>

namespace edgelm::system {

// `bytes` zeros, which take physical memory when they are first touched; nullptr if there is not enough. `sparse`: little
// of it will be touched. Then Linux takes single pages, and only those touched count against the memory limit. Windows
// always counts all of it against the memory that it may promise (RAM and page file).
void* map_memory(std::size_t bytes, bool sparse);
void unmap_memory(void* data, std::size_t bytes);

}  // namespace edgelm::system

#endif  // EDGELM_SYSTEM_MEMORY_H_
