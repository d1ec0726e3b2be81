// Operator new and delete on malloc, hidden. zig links its C++ library into each of our libraries; that library's own
// would be exported, and dyld would let them replace those of the process. Compiled with
// -fvisibility-global-new-delete=force-hidden.

#include <cstdlib>
#include <new>

namespace {

void* allocate(std::size_t bytes) {
  void* data = std::malloc(bytes > 0 ? bytes : 1);
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

void* allocate(std::size_t bytes, std::align_val_t alignment) {
  auto least = static_cast<std::size_t>(alignment);
  if (least < sizeof(void*)) least = sizeof(void*);
  void* data = nullptr;
  if (posix_memalign(&data, least, bytes > 0 ? bytes : 1) != 0) throw std::bad_alloc();
  return data;
}

}  // namespace

void* operator new(std::size_t bytes) { return allocate(bytes); }
void* operator new[](std::size_t bytes) { return allocate(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, alignment); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) { return allocate(bytes, alignment); }
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, std::size_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t) noexcept { std::free(data); }
void operator delete(void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::align_val_t) noexcept { std::free(data); }
void operator delete(void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, std::size_t, std::align_val_t) noexcept { std::free(data); }
