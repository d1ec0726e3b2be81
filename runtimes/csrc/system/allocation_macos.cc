// Operator new and delete on malloc, hidden. zig links its C++ library into each of our libraries; that library's own
// would be exported, and dyld would let them replace those of the process. Compiled with
// -fvisibility-global-new-delete=force-hidden.

#include <cstdlib>
#include <new>

namespace {

void* allocate(std::size_t bytes) noexcept { return std::malloc(bytes > 0 ? bytes : 1); }

void* allocate(std::size_t bytes, std::align_val_t alignment) noexcept {
  auto least = static_cast<std::size_t>(alignment);
  if (least < sizeof(void*)) least = sizeof(void*);
  void* data = nullptr;
  return posix_memalign(&data, least, bytes > 0 ? bytes : 1) == 0 ? data : nullptr;
}

void* checked(void* data) {
  if (data == nullptr) throw std::bad_alloc();
  return data;
}

}  // namespace

using std::align_val_t;
using std::nothrow_t;
using std::size_t;

void* operator new(size_t bytes) { return checked(allocate(bytes)); }
void* operator new[](size_t bytes) { return checked(allocate(bytes)); }
void* operator new(size_t bytes, const nothrow_t&) noexcept { return allocate(bytes); }
void* operator new[](size_t bytes, const nothrow_t&) noexcept { return allocate(bytes); }
void* operator new(size_t bytes, align_val_t alignment) { return checked(allocate(bytes, alignment)); }
void* operator new[](size_t bytes, align_val_t alignment) { return checked(allocate(bytes, alignment)); }
void* operator new(size_t bytes, align_val_t alignment, const nothrow_t&) noexcept {
  return allocate(bytes, alignment);
}
void* operator new[](size_t bytes, align_val_t alignment, const nothrow_t&) noexcept {
  return allocate(bytes, alignment);
}
void operator delete(void* data) noexcept { std::free(data); }
void operator delete[](void* data) noexcept { std::free(data); }
void operator delete(void* data, const nothrow_t&) noexcept { std::free(data); }
void operator delete[](void* data, const nothrow_t&) noexcept { std::free(data); }
void operator delete(void* data, size_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t) noexcept { std::free(data); }
void operator delete(void* data, align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, align_val_t) noexcept { std::free(data); }
void operator delete(void* data, align_val_t, const nothrow_t&) noexcept { std::free(data); }
void operator delete[](void* data, align_val_t, const nothrow_t&) noexcept { std::free(data); }
void operator delete(void* data, size_t, align_val_t) noexcept { std::free(data); }
void operator delete[](void* data, size_t, align_val_t) noexcept { std::free(data); }
