// CPU emulation of the primitives of device.cuh. The threads of a block are fibers of one host thread.
//
// A fiber runs until it reaches an operation that other threads take part in: a barrier, or a shuffle or mma of its
// warp. The operation is carried out when all of them have reached it. Where hardware leaves an order open, the
// emulator picks an unfavourable one, so that a missing barrier or wait shows up as a wrong result:
//   - warps run one after the other, each as far as it can, in an order that a seed changes (0: first to last,
//     1: last to first, others: shuffled anew at every barrier);
//   - cp_async copies when it is waited for, not before; where warps are shuffled, some copies are made at once, and
//     some read at once and write when they are waited for;
//   - shared memory begins as NaNs, with a canary behind it; vector accesses must be aligned.
// The emulation checks the algorithm. It does not check speed, memory order between blocks, or PTX.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define EDGELM_DEVICE [[maybe_unused]] static inline
#define EDGELM_INLINE inline
#define EDGELM_BODY static
#define EDGELM_UNROLL
#define EDGELM_UNROLL_BY(n)

#define EDGELM_KERNEL(name, Args, threads, min_blocks, ...)                                                            \
  static void name##_run(const void* args) { __VA_ARGS__(*static_cast<const Args*>(args)); }                           \
  static const edgelm::emulator::Register name##_registered(#name, name##_run, sizeof(Args), threads);

namespace edgelm {
namespace emulator {

struct Kernel {
  void (*run)(const void*);
  size_t args;
  int threads;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> found;
  return found;
}

struct Register {
  Register(const char* name, void (*run)(const void*), size_t args, int threads) {
    kernels()[name] = {run, args, threads};
  }
};

enum class Waits : int { kNothing, kShuffle, kBallot, kMma, kMmaFp8, kLdmatrix, kWarp, kBlock, kDone };

struct Copy {
  u8* to;
  const u8* from;
  bool valid, read;
  u8 data[16];
};

constexpr size_t kStack = 256 << 10;

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  u8* stack = nullptr;
  Waits waits = Waits::kNothing;
  void* slot = nullptr;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

struct Failure : std::runtime_error { using std::runtime_error::runtime_error; };

struct State {
  int threads = 0, current = 0;
  int block[3] = {}, grid[3] = {};
  u8* shared = nullptr;
  size_t shared_bytes = 0;
  u32 copies = 0;  // random bits: which copies are made early; 0: none
  const Kernel* kernel = nullptr;
  const void* args = nullptr;
  std::vector<Fiber> fibers;
  const u8* prefetched[2] = {};  // the lowest and the highest address that the launch requested for the L2 cache
  std::string failure;           // the message, since an exception cannot leave a fiber
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
};

inline State& state() {
  static State found;
  return found;
}

// -- switching between fibers ------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Save the callee-saved registers on the current stack, switch to the other stack, and restore its registers.
__attribute__((naked, noinline)) inline void switch_stacks(void** /* save */, void* /* load */) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void to_scheduler(Fiber& from) { switch_stacks(&from.stack_pointer, state().scheduler); }
inline void to_fiber(Fiber& to) { switch_stacks(&state().scheduler, to.stack_pointer); }
#else
inline void to_scheduler(Fiber& from) { swapcontext(&from.context, &state().scheduler); }
inline void to_fiber(Fiber& to) { swapcontext(&state().scheduler, &to.context); }
#endif

inline void run_thread() {
  State& s = state();
  Fiber& me = s.fibers[s.current];
  s.kernel->run(s.args);
  me.waits = Waits::kDone;
  to_scheduler(me);
  std::abort();  // a thread that has ended is not resumed
}

inline void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw Failure("no memory for the stack of an emulated thread: use smaller blocks");
    fiber.stack = static_cast<u8*>(memory);
  }
  fiber.waits = Waits::kNothing;
  fiber.open.clear();
  fiber.groups.clear();
#if defined(__x86_64__)
  // The stack looks as after a call: a return address (run_thread) at 8 mod 16, below it six registers to pop.
  void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(run_thread);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
#endif
}

[[noreturn]] inline void fail(const std::string& what) {
  State& s = state();
  if (s.failure.empty()) {
    s.failure = "thread " + std::to_string(s.current) + " of block (" + std::to_string(s.block[0]) + ", " +
                std::to_string(s.block[1]) + ", " + std::to_string(s.block[2]) + "): " + what;
  }
  Fiber& me = s.fibers[s.current];
  me.waits = Waits::kDone;
  to_scheduler(me);
  std::abort();
}

inline void wait(Waits what, void* slot = nullptr) {
  State& s = state();
  Fiber& me = s.fibers[s.current];
  me.waits = what;
  me.slot = slot;
  to_scheduler(me);
}

// -- what a warp does together -----------------------------------------------------------------------------------------

struct Shuffle {
  u32 value;
  int source;
  u32 result;
};
struct Ballot {
  bool value;
  u32 result;
};
struct Mma {
  float* d;
  const u32* a;
  const u32* b;
  float (*element)(u16);
};
struct Ldmatrix {
  u32* r;
  const u8* row;
  bool transposed;
};

inline float f16_value(u16 x) {
  const u32 sign = u32(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 1023;
  if (exponent == 0) return (sign ? -1.f : 1.f) * float(mantissa) * 0x1p-24f;
  const u32 bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float bf16_value(u16 x) {
  const u32 bits = u32(x) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float e4m3_value(u8 x) { return f16_value(u16((x & 0x80) << 8 | (x & 0x7f) << 7)) * 256.f; }

inline u16 half_of(const u32 (&words)[32][4], int lane, int word, int half) {
  return u16(words[lane][word] >> (16 * half));
}

// The whole sum is rounded once. Hardware rounds more often; the tests' tolerances allow for that.
inline void mma(Fiber* lanes) {
  static float a[16][16], b[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& one = *static_cast<Mma*>(lanes[lane].slot);
    const int g = lane / 4, q = lane % 4;
    for (int w = 0; w < 4; ++w) {
      for (int h = 0; h < 2; ++h) a[g + 8 * (w & 1)][2 * q + 8 * (w / 2) + h] = one.element(u16(one.a[w] >> 16 * h));
    }
    for (int w = 0; w < 2; ++w) {
      for (int h = 0; h < 2; ++h) b[2 * q + 8 * w + h][g] = one.element(u16(one.b[w] >> 16 * h));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& one = *static_cast<Mma*>(lanes[lane].slot);
    for (int i = 0; i < 4; ++i) {
      double sum = one.d[i];
      for (int k = 0; k < 16; ++k) sum += double(a[lane / 4 + 8 * (i / 2)][k]) * b[k][2 * (lane % 4) + i % 2];
      one.d[i] = float(sum);
    }
  }
}

inline void mma_fp8(Fiber* lanes) {
  static float a[16][32], b[32][8];
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& one = *static_cast<Mma*>(lanes[lane].slot);
    const int g = lane / 4, q = lane % 4;
    for (int w = 0; w < 4; ++w) {
      for (int h = 0; h < 4; ++h) a[g + 8 * (w & 1)][4 * q + 16 * (w / 2) + h] = e4m3_value(u8(one.a[w] >> 8 * h));
    }
    for (int w = 0; w < 2; ++w) {
      for (int h = 0; h < 4; ++h) b[4 * q + 16 * w + h][g] = e4m3_value(u8(one.b[w] >> 8 * h));
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Mma& one = *static_cast<Mma*>(lanes[lane].slot);
    for (int i = 0; i < 4; ++i) {
      double sum = one.d[i];
      for (int k = 0; k < 32; ++k) sum += double(a[lane / 4 + 8 * (i / 2)][k]) * b[k][2 * (lane % 4) + i % 2];
      one.d[i] = float(sum);
    }
  }
}

inline void ldmatrix(Fiber* lanes) {
  u16 matrices[4][8][8];
  for (int lane = 0; lane < 32; ++lane) {
    std::memcpy(matrices[lane / 8][lane % 8], static_cast<Ldmatrix*>(lanes[lane].slot)->row, 16);
  }
  for (int lane = 0; lane < 32; ++lane) {
    const Ldmatrix& one = *static_cast<Ldmatrix*>(lanes[lane].slot);
    const int g = lane / 4, q = lane % 4;
    for (int m = 0; m < 4; ++m) {
      const u16 low = one.transposed ? matrices[m][2 * q][g] : matrices[m][g][2 * q];
      const u16 high = one.transposed ? matrices[m][2 * q + 1][g] : matrices[m][g][2 * q + 1];
      one.r[m] = u32(low) | u32(high) << 16;
    }
  }
}

inline void shuffle_all(Fiber* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    Shuffle& one = *static_cast<Shuffle*>(lanes[lane].slot);
    one.result = static_cast<Shuffle*>(lanes[one.source].slot)->value;
  }
}

inline void ballot_all(Fiber* lanes) {
  u32 bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= u32(static_cast<Ballot*>(lanes[lane].slot)->value) << lane;
  for (int lane = 0; lane < 32; ++lane) static_cast<Ballot*>(lanes[lane].slot)->result = bits;
}

// -- running a block ---------------------------------------------------------------------------------------------------

// Run one warp until it needs the other warps. Return whether it made progress.
inline bool run_warp(int warp) {
  State& s = state();
  Fiber* lanes = &s.fibers[32 * warp];
  bool moved = false;
  while (true) {
    bool ran = false;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].waits != Waits::kNothing) continue;
      s.current = 32 * warp + lane;
      to_fiber(lanes[lane]);
      if (!s.failure.empty()) throw Failure(s.failure);
      ran = moved = true;
    }
    if (!ran) return moved;
    const Waits what = lanes[0].waits;
    for (int lane = 1; lane < 32; ++lane) {
      if (lanes[lane].waits != what) {
        throw Failure("the threads of warp " + std::to_string(warp) + " have diverged: lane 0 is at operation (" +
                      std::to_string(int(what)) + "), lane " + std::to_string(lane) + " at (" +
                      std::to_string(int(lanes[lane].waits)) + ")");
      }
    }
    switch (what) {
      case Waits::kShuffle: shuffle_all(lanes); break;
      case Waits::kBallot: ballot_all(lanes); break;
      case Waits::kMma: mma(lanes); break;
      case Waits::kMmaFp8: mma_fp8(lanes); break;
      case Waits::kLdmatrix: ldmatrix(lanes); break;
      case Waits::kWarp: break;
      default: return moved;  // a barrier of the block, or the end
    }
    for (int lane = 0; lane < 32; ++lane) lanes[lane].waits = Waits::kNothing;
  }
}

inline void run_block(std::vector<int>& order, std::mt19937& random, bool shuffled) {
  State& s = state();
  const int warps = s.threads / 32;
  for (int i = 0; i < s.threads; ++i) prepare(s.fibers[i]);
  while (true) {
    if (shuffled) {
      for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    }
    for (int warp : order) run_warp(warp);
    int at_barrier = 0, done = 0;
    for (int i = 0; i < s.threads; ++i) {
      at_barrier += s.fibers[i].waits == Waits::kBlock;
      done += s.fibers[i].waits == Waits::kDone;
    }
    if (done == s.threads) return;
    if (at_barrier != s.threads) {
      throw Failure(std::to_string(at_barrier) + " of " + std::to_string(s.threads) +
                    " threads reached a barrier of the block, " + std::to_string(done) + " have ended");
    }
    for (int i = 0; i < s.threads; ++i) s.fibers[i].waits = Waits::kNothing;
  }
}

constexpr size_t kCanary = 256;

inline void launch(const Kernel& kernel, const int* grid, int threads, size_t shared, const void* args, u32 seed) {
  State& s = state();
  if (threads % 32 || threads < 32 || threads > 1024) throw Failure("blocks must have 32, 64, ... or 1024 threads");
  if (threads > kernel.threads) {
    throw Failure("launched with " + std::to_string(threads) + " threads, compiled for " +
                  std::to_string(kernel.threads));
  }
  if (shared > (227 << 10)) throw Failure("the launch asks for more than 227 KB of shared memory");
  s.copies = seed > 1 ? seed : 0;
  s.threads = threads;
  s.kernel = &kernel;
  s.args = args;
  s.failure.clear();
  s.prefetched[0] = s.prefetched[1] = nullptr;
  if (int(s.fibers.size()) < threads) s.fibers.resize(threads);
  static std::vector<u8> memory;
  memory.resize(shared + kCanary + 128);
  s.shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  s.shared_bytes = shared;
  std::vector<int> order(threads / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = seed == 1 ? int(order.size() - 1 - i) : int(i);
  std::mt19937 random(seed);
  for (int i = 0; i < 3; ++i) s.grid[i] = grid[i];
  for (s.block[2] = 0; s.block[2] < grid[2]; ++s.block[2]) {
    for (s.block[1] = 0; s.block[1] < grid[1]; ++s.block[1]) {
      for (s.block[0] = 0; s.block[0] < grid[0]; ++s.block[0]) {
        std::memset(s.shared, 0xff, shared);
        std::memset(s.shared + shared, 0xa5, kCanary);
        run_block(order, random, seed > 1);
        for (size_t i = 0; i < kCanary; ++i) {
          if (s.shared[shared + i] != 0xa5) {
            throw Failure("block (" + std::to_string(s.block[0]) + ", " + std::to_string(s.block[1]) + ", " +
                          std::to_string(s.block[2]) + ") wrote beyond its " + std::to_string(shared) +
                          " bytes of shared memory, at " + std::to_string(i));
          }
        }
      }
    }
  }
}

}  // namespace emulator

// -- the primitives of device.cuh --------------------------------------------------------------------------------------

EDGELM_DEVICE int thread() { return emulator::state().current; }
EDGELM_DEVICE int thread_index() { return thread(); }
EDGELM_DEVICE int block_threads() { return emulator::state().threads; }
EDGELM_DEVICE int block_x() { return emulator::state().block[0]; }
EDGELM_DEVICE int block_y() { return emulator::state().block[1]; }
EDGELM_DEVICE int block_z() { return emulator::state().block[2]; }
EDGELM_DEVICE int grid_x() { return emulator::state().grid[0]; }
EDGELM_DEVICE int grid_y() { return emulator::state().grid[1]; }
EDGELM_DEVICE int grid_z() { return emulator::state().grid[2]; }
EDGELM_DEVICE u8* shared_memory() { return emulator::state().shared; }
EDGELM_DEVICE void sync_block() { emulator::wait(emulator::Waits::kBlock); }
EDGELM_DEVICE void sync_warp() { emulator::wait(emulator::Waits::kWarp); }
EDGELM_DEVICE void wait_for_previous_kernel() {}
EDGELM_DEVICE void let_next_kernel_start() {}

namespace emulator {
template <class T> inline T shuffled(T x, int source) {
  Shuffle slot;
  static_assert(sizeof(T) == 4, "32 bits");
  std::memcpy(&slot.value, &x, 4);
  slot.source = source;
  wait(Waits::kShuffle, &slot);
  std::memcpy(&x, &slot.result, 4);
  return x;
}
inline void aligned(const void* p, int bytes, const char* what) {
  if (reinterpret_cast<uintptr_t>(p) % bytes)
    fail(std::string(what) + " at an address that is no multiple of " + std::to_string(bytes));
}
template <class T> inline T loaded(const void* p, const char* what) {
  aligned(p, sizeof(T), what);
  T x;
  std::memcpy(&x, p, sizeof(T));
  return x;
}
template <class T> inline void stored(void* p, T x, const char* what) {
  aligned(p, sizeof(T), what);
  std::memcpy(p, &x, sizeof(T));
}
// A prefetch changes nothing. The caller of a launch may ask for its range, to check it.
inline void prefetched(const void* p) {
  const u8* at = static_cast<const u8*>(p);
  const u8*(&range)[2] = state().prefetched;
  if (range[0] == nullptr || at < range[0]) range[0] = at;
  if (at > range[1]) range[1] = at;
}
inline u32 bits_of(float x) {
  u32 bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(u32 bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline u16 bf16_bits(float x) {
  const u32 bits = bits_of(x);
  if (x != x) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline u16 f16_bits(float x) {
  const u32 bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000u) return 0x7fff;
  if (magnitude >= 0x477ff000u) return u16(sign | 0x7c00);
  if (magnitude < 0x38800000u) return u16(sign | u16(std::nearbyint(float_of(magnitude) * 0x1p24f)));
  return u16(sign | (((magnitude + 0xfff + (magnitude >> 13 & 1)) >> 13) - (112 << 10)));
}
}  // namespace emulator

EDGELM_DEVICE int own_lane() { return thread() % 32; }
EDGELM_DEVICE float shuffle_xor(float x, int mask) { return emulator::shuffled(x, own_lane() ^ mask); }
EDGELM_DEVICE int shuffle_xor(int x, int mask) { return emulator::shuffled(x, own_lane() ^ mask); }
EDGELM_DEVICE float shuffle(float x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE int shuffle(int x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE u32 shuffle(u32 x, int lane) { return emulator::shuffled(x, lane & 31); }
EDGELM_DEVICE int shuffle_up(int x, int delta) {
  return emulator::shuffled(x, own_lane() < delta ? own_lane() : own_lane() - delta);
}
EDGELM_DEVICE u32 ballot(bool x) {
  emulator::Ballot slot{x, 0};
  emulator::wait(emulator::Waits::kBallot, &slot);
  return slot.result;
}
EDGELM_DEVICE int warp_max(int x) {
  for (int mask = 16; mask > 0; mask /= 2) {
    const int other = shuffle_xor(x, mask);
    x = other > x ? other : x;
  }
  return x;
}
EDGELM_DEVICE int warp_sum(int x) {
  for (int mask = 16; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

template <class A> EDGELM_DEVICE void mma_16x8x16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Mma slot{d, a, b, Same<A, bf16>::value ? emulator::bf16_value : emulator::f16_value};
  emulator::wait(emulator::Waits::kMma, &slot);
}
#ifdef EDGELM_HAS_FP8
EDGELM_DEVICE void mma_16x8x32_fp8(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  emulator::Mma slot{d, a, b, nullptr};
  emulator::wait(emulator::Waits::kMmaFp8, &slot);
}
#endif
EDGELM_DEVICE void ldmatrix_x4(u32 (&r)[4], const void* row) {
  emulator::aligned(row, 16, "ldmatrix of a row");
  emulator::Ldmatrix slot{r, static_cast<const u8*>(row), false};
  emulator::wait(emulator::Waits::kLdmatrix, &slot);
}
EDGELM_DEVICE void ldmatrix_x4_transposed(u32 (&r)[4], const void* row) {
  emulator::aligned(row, 16, "ldmatrix of a row");
  emulator::Ldmatrix slot{r, static_cast<const u8*>(row), true};
  emulator::wait(emulator::Waits::kLdmatrix, &slot);
}

using Shared = u8*;
EDGELM_DEVICE Shared shared_address(u8* shared) { return shared; }
EDGELM_DEVICE void cp_async16(void* shared, const void* global, bool valid = true) {
  emulator::aligned(shared, 16, "cp_async16 to shared memory");
  if (valid) emulator::aligned(global, 16, "cp_async16 from global memory");
  emulator::State& s = emulator::state();
  u8* to = static_cast<u8*>(shared);
  if (to < s.shared || to + 16 > s.shared + s.shared_bytes) emulator::fail("cp_async16 outside shared memory");
  s.copies = s.copies * 1664525u + (s.copies ? 1013904223u : 0u);
  emulator::Copy copy{to, static_cast<const u8*>(global), valid, s.copies >> 31 != 0, {}};
  if (copy.read && valid) std::memcpy(copy.data, global, 16);
  if (copy.read && (s.copies >> 30 & 1)) std::memcpy(to, copy.data, 16);
  else s.fibers[s.current].open.push_back(copy);
}
EDGELM_DEVICE void cp_async_commit() {
  emulator::Fiber& me = emulator::state().fibers[emulator::state().current];
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
template <int pending> EDGELM_DEVICE void cp_async_wait() {
  emulator::Fiber& me = emulator::state().fibers[emulator::state().current];
  while (int(me.groups.size()) > pending) {
    for (const emulator::Copy& copy : me.groups.front()) {
      if (copy.read) std::memcpy(copy.to, copy.data, 16);
      else if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    me.groups.erase(me.groups.begin());
  }
}

EDGELM_DEVICE Words4 load16(const void* p) { return emulator::loaded<Words4>(p, "load16"); }
EDGELM_DEVICE Words4 load16_stream(const void* p) { return emulator::loaded<Words4>(p, "load16_stream"); }
EDGELM_DEVICE Words2 load8(const void* p) { return emulator::loaded<Words2>(p, "load8"); }
EDGELM_DEVICE u32 load4(const void* p) { return emulator::loaded<u32>(p, "load4"); }
EDGELM_DEVICE Words4 load16_shared(Shared p) { return emulator::loaded<Words4>(p, "load16_shared"); }
EDGELM_DEVICE u32 load4_shared(Shared p) { return emulator::loaded<u32>(p, "load4_shared"); }
EDGELM_DEVICE u32 load2_shared(Shared p) { return emulator::loaded<u16>(p, "load2_shared"); }
EDGELM_DEVICE u32 load1_shared(Shared p) { return *p; }
EDGELM_DEVICE void store16(void* p, Words4 x) { emulator::stored(p, x, "store16"); }
EDGELM_DEVICE void store8(void* p, Words2 x) { emulator::stored(p, x, "store8"); }
EDGELM_DEVICE void store4(void* p, u32 x) { emulator::stored(p, x, "store4"); }
EDGELM_DEVICE void prefetch_l2(const void* p) { emulator::prefetched(p); }
EDGELM_DEVICE int atomic_add(int* p, int x) {
  const int before = *p;
  *p += x;
  return before;
}
EDGELM_DEVICE void fence_device() {}

EDGELM_DEVICE u32 float_to_bits(float x) { return emulator::bits_of(x); }
EDGELM_DEVICE float bits_to_float(u32 x) { return emulator::float_of(x); }
EDGELM_DEVICE float max_(float a, float b) { return std::fmax(a, b); }
EDGELM_DEVICE float min_(float a, float b) { return std::fmin(a, b); }
EDGELM_DEVICE int max_(int a, int b) { return a > b ? a : b; }
EDGELM_DEVICE int min_(int a, int b) { return a < b ? a : b; }
EDGELM_DEVICE float abs_(float a) { return std::fabs(a); }
EDGELM_DEVICE float fma_(float a, float b, float c) { return std::fma(a, b, c); }
EDGELM_DEVICE float multiply_rounded(float a, float b) { return a * b; }
EDGELM_DEVICE float round_(float a) { return std::nearbyint(a); }
EDGELM_DEVICE float exp_(float a) { return std::exp(a); }
EDGELM_DEVICE float exp_fast(float a) { return std::exp(a); }
EDGELM_DEVICE float exp2_fast(float a) { return std::exp2(a); }
EDGELM_DEVICE float rsqrt_(float a) { return 1.f / std::sqrt(a); }
EDGELM_DEVICE bool is_nan(float a) { return a != a; }
EDGELM_DEVICE int count_bits(u32 x) { return __builtin_popcount(x); }
EDGELM_DEVICE int lowest_bit(u32 x) { return __builtin_ctz(x); }
EDGELM_DEVICE float f16_to_float(u16 x) { return emulator::f16_value(x); }
EDGELM_DEVICE u32 float_to_bf16x2(float low, float high) {
  return u32(emulator::bf16_bits(low)) | u32(emulator::bf16_bits(high)) << 16;
}
EDGELM_DEVICE u32 float_to_f16x2(float low, float high) {
  return u32(emulator::f16_bits(low)) | u32(emulator::f16_bits(high)) << 16;
}
namespace emulator {
// Computed exactly in double, then rounded once.
template <float (*value)(u16), u16 (*bits)(float)> inline u32 fma_pairs(u32 a, u32 b, u32 c) {
  u32 result = 0;
  for (int half = 0; half < 2; ++half) {
    const int shift = 16 * half;
    const double sum = double(value(u16(a >> shift))) * value(u16(b >> shift)) + value(u16(c >> shift));
    result |= u32(bits(float(sum))) << shift;
  }
  return result;
}
}  // namespace emulator
EDGELM_DEVICE u32 f16x2_fma(u32 a, u32 b, u32 c) {
  return emulator::fma_pairs<emulator::f16_value, emulator::f16_bits>(a, b, c);
}
EDGELM_DEVICE u32 f16x2_multiply(u32 a, u32 b) { return f16x2_fma(a, b, 0x80008000u); }
EDGELM_DEVICE u32 bf16x2_fma(u32 a, u32 b, u32 c) {
  return emulator::fma_pairs<emulator::bf16_value, emulator::bf16_bits>(a, b, c);
}
EDGELM_DEVICE u32 and_or(u32 a, u32 b, u32 c) { return (a & b) | c; }
EDGELM_DEVICE u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 both = u64(b) << 32 | a;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= u32(both >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return result;
}
#ifdef EDGELM_HAS_FP8
EDGELM_DEVICE u8 float_to_e4m3_bits(float x);
EDGELM_DEVICE u32 float_to_e4m3x2(float low, float high) {
  return u32(float_to_e4m3_bits(low)) | u32(float_to_e4m3_bits(high)) << 8;
}
#endif
EDGELM_DEVICE u32 e4m3x2_to_f16x2(u32 pair) {
  return u32(emulator::f16_bits(emulator::e4m3_value(u8(pair)))) |
         u32(emulator::f16_bits(emulator::e4m3_value(u8(pair >> 8)))) << 16;
}

}  // namespace edgelm

// Launch a kernel. Return null, or an error message that is valid until the next call.
extern "C" __attribute__((visibility("default"))) const char* edgelm_emulated_launch(const char* name, const int* grid,
                                                                                     int threads, size_t shared,
                                                                                     const void* args,
                                                                                     size_t args_bytes, unsigned seed) {
  static std::string message;
  const auto& kernels = edgelm::emulator::kernels();
  const auto found = kernels.find(name);
  try {
    if (found == kernels.end()) throw edgelm::emulator::Failure("no kernel has this name");
    if (found->second.args != args_bytes) {
      throw edgelm::emulator::Failure("its arguments are " + std::to_string(found->second.args) +
                                      " bytes, given were " + std::to_string(args_bytes));
    }
    edgelm::emulator::launch(found->second, grid, threads, shared, args, seed);
    return nullptr;
  } catch (const std::exception& error) {
    message = std::string(name) + ": " + error.what();
    return message.c_str();
  }
}

// The lowest and the highest address that the last launch requested for the L2 cache; null: none.
extern "C" __attribute__((visibility("default"))) const void* const* edgelm_emulated_prefetches() {
  return reinterpret_cast<const void* const*>(edgelm::emulator::state().prefetched);
}
