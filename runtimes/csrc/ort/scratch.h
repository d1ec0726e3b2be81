// Memory for the intermediate results of operators.
//
// A model's operators run one after another and can share one block of memory. Blocks come from a pool of the process
// and go back at the end of the call; sessions that run at the same time take a block each. A block per kernel would
// mean a hundred of them, and a block per thread would stay with every thread that ever ran the session.
//
// A prompt of thousands of tokens needs tens of megabytes, a generated token some kilobytes. Allocating the former from
// the system in every operator would cost page faults (5 % of a prompt's time); keeping it would raise resident memory
// permanently. So the pool looks at the largest need of each 64 calls, about one generated token, and gives back blocks
// larger than twice that: the memory of a prompt is freed after a token or two.
#ifndef EDGELM_ORT_SCRATCH_H_
#define EDGELM_ORT_SCRATCH_H_

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgelm::ort {

template <typename T>
struct Buffer {
  size_t offset;
};

struct QuantBuffer {
  Buffer<int8_t> codes;
  Buffer<float> scales;
  Buffer<int32_t> offsets;
  int64_t columns;
};

// The layout of a call's buffers in one block of memory, which is then allocated once. Buffers begin at cache lines.
class ScratchLayout {
 public:
  template <typename T>
  Buffer<T> Add(int64_t count) {
    const Buffer<T> buffer{bytes_};
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return buffer;
  }
  QuantBuffer AddRows(int64_t rows, int64_t columns) {
    columns = (columns + kBlock - 1) / kBlock * kBlock;
    const int64_t blocks = rows * (columns / kBlock);
    return {Add<int8_t>(rows * columns), Add<float>(blocks), Add<int32_t>(blocks), columns};
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

// A block of the pool, held for the lifetime of this object. Throws std::bad_alloc if there is no memory.
class Scratch {
 public:
  explicit Scratch(const ScratchLayout& layout);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* operator[](Buffer<T> buffer) const {
    return reinterpret_cast<T*>(data_ + buffer.offset);
  }
  QuantRows operator[](const QuantBuffer& buffer) const {
    return {(*this)[buffer.codes], (*this)[buffer.scales], (*this)[buffer.offsets], buffer.columns};
  }

 private:
  size_t needed_;
  uint8_t* data_;
  size_t size_;
};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_SCRATCH_H_
