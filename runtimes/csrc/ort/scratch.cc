#include "scratch.h"

#include <algorithm>
#include <mutex>
#include <new>

#include "system/memory.h"

namespace edgelm::ort {
namespace {

struct Block {
  uint8_t* data = nullptr;
  size_t size = 0;
};

constexpr size_t kSmall = 1 << 20;  // memory that is never given back
constexpr int kWindow = 64;         // calls

// Memory from the system, since free() would keep large blocks: malloc's mmap threshold rises with use.
Block Map(size_t size) {
  size = (size / 65536 + 1) * 65536;  // at least one page, also for size 0
  void* data = system::map_memory(size, false);
  if (data == nullptr) throw std::bad_alloc();
  return {static_cast<uint8_t*>(data), size};
}

void Unmap(const Block& block) { system::unmap_memory(block.data, block.size); }

class Pool {
 public:
  ~Pool() {
    for (size_t i = 0; i < count_; ++i) Unmap(free_[i]);
  }

  // Take the smallest free block that is large enough. If there is none, replace the largest by a new one.
  Block Take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      size_t best = count_, largest = count_;
      for (size_t i = 0; i < count_; ++i) {
        if (free_[i].size >= size && (best == count_ || free_[i].size < free_[best].size)) best = i;
        if (largest == count_ || free_[i].size > free_[largest].size) largest = i;
      }
      if (best != count_) return Remove(best);
      if (largest != count_) Unmap(Remove(largest));
    }
    return Map(size);
  }

  // Return a block. `needed` is the size that was asked for, which may be less than the block's.
  void Give(const Block& block, size_t needed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (count_ == kBlocks) return Unmap(block);
    free_[count_++] = block;
    most_ = std::max(most_, needed);
    if (++calls_ < kWindow) return;
    const size_t keep = std::max(kSmall, 2 * most_);
    for (size_t i = count_; i-- > 0;) {
      if (free_[i].size > keep) Unmap(Remove(i));
    }
    calls_ = 0;
    most_ = 0;
  }

 private:
  static constexpr size_t kBlocks = 16;  // blocks kept for sessions that run at the same time

  Block Remove(size_t i) {
    const Block block = free_[i];
    free_[i] = free_[--count_];
    return block;
  }

  std::mutex mutex_;
  Block free_[kBlocks];
  size_t count_ = 0;
  size_t most_ = 0;  // the most that a call of this window needed
  int calls_ = 0;    // in this window
};

Pool pool;

}  // namespace

Scratch::Scratch(const ScratchLayout& layout) : needed_(layout.bytes()) {
  const Block block = pool.Take(needed_);
  data_ = block.data;
  size_ = block.size;
}

Scratch::~Scratch() { pool.Give({data_, size_}, needed_); }

}  // namespace edgelm::ort
