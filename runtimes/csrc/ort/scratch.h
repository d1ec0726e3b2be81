// Memory for what an operator computes on the way.
//
// A model's operators run one after another, so one buffer serves them all: blocks come from a pool of the process and
// go back at the end of the call. Sessions that run side by side take a block each. A buffer a kernel would be one for
// each of a hundred operators, and one a thread would stay with every thread that ever ran the session.
//
// A prompt of thousands of tokens needs tens of megabytes, a generated token some kilobytes. Asking the system for the
// former in every operator would cost as many page faults (5 % of a prompt's time), keeping them would raise the
// resident memory for good. So the pool looks at what was needed in each 64 calls, about a generated token's, and gives
// back blocks of more than twice that: the memory of a prompt is gone after a token or two.
#ifndef EDGELM_ORT_SCRATCH_H_
#define EDGELM_ORT_SCRATCH_H_

#include <cstddef>
#include <cstdint>

#include "kernels/kernels.h"

namespace edgelm::ort {

template <typename T>
struct Slot {
  size_t offset;
};

struct QuantSlot {
  Slot<int8_t> codes;
  Slot<float> scales;
  Slot<int32_t> offsets;
  int64_t columns;
};

// What a call needs, written down before memory is asked for once. Slots begin at cache lines.
class Plan {
 public:
  template <typename T>
  Slot<T> Add(int64_t count) {
    const Slot<T> slot{bytes_};
    bytes_ += (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    return slot;
  }
  QuantSlot AddRows(int64_t rows, int64_t columns) {
    columns = (columns + kBlock - 1) / kBlock * kBlock;
    const int64_t blocks = rows * (columns / kBlock);
    return {Add<int8_t>(rows * columns), Add<float>(blocks), Add<int32_t>(blocks), columns};
  }
  size_t bytes() const { return bytes_; }

 private:
  size_t bytes_ = 0;
};

// A block of the pool, for as long as this lives. Throws std::bad_alloc where there is no memory.
class Scratch {
 public:
  explicit Scratch(const Plan& plan);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  template <typename T>
  T* operator[](Slot<T> slot) const {
    return reinterpret_cast<T*>(data_ + slot.offset);
  }
  QuantRows operator[](const QuantSlot& slot) const {
    return {(*this)[slot.codes], (*this)[slot.scales], (*this)[slot.offsets], slot.columns};
  }

 private:
  size_t needed_;
  uint8_t* data_;
  size_t size_;
};

}  // namespace edgelm::ort

#endif  // EDGELM_ORT_SCRATCH_H_
