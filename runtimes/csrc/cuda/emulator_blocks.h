// Runs the blocks of emulated kernels: the part of the emulator that is compiled once, and linked with the kernels, which
// are compiled with emulator.h. Each library of kernels has one copy.
#pragma once

#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.cuh"

namespace edgelm {
namespace emulator {

State state;

struct Kernel {
  void (*run)(const void*);
  size_t args;
  int threads;
};

inline std::map<std::string, Kernel>& kernels() {
  static std::map<std::string, Kernel> found;
  return found;
}

Register::Register(const char* name, void (*run)(const void*), size_t args, int threads) {
  kernels()[name] = {run, args, threads};
}

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

// What only the scheduler knows of a launch.
struct Running {
  size_t shared_bytes = 0;
  u32 copies = 0;  // random bits: which copies are made early; 0: none
  const Kernel* kernel = nullptr;
  const void* args = nullptr;
  std::vector<Fiber> fibers;
  std::string failure;  // the message, since an exception cannot leave a fiber
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif

  Fiber& current() { return fibers[state.current]; }
};

static Running running;

// -- switching between fibers ------------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Save the callee-saved registers on the current stack, switch to the other stack, and restore its registers.
__attribute__((naked, noinline)) inline void switch_stacks(void** /* save */, void* /* load */) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
inline void to_scheduler(Fiber& from) { switch_stacks(&from.stack_pointer, running.scheduler); }
inline void to_fiber(Fiber& to) { switch_stacks(&running.scheduler, to.stack_pointer); }
#else
inline void to_scheduler(Fiber& from) { swapcontext(&from.context, &running.scheduler); }
inline void to_fiber(Fiber& to) { swapcontext(&running.scheduler, &to.context); }
#endif

inline void run_thread() {
  Fiber& me = running.current();
  running.kernel->run(running.args);
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

[[noreturn]] static void fail_with(const std::string& what) {
  if (running.failure.empty()) {
    running.failure = "thread " + std::to_string(state.current) + " of block (" + std::to_string(state.block[0]) +
                      ", " + std::to_string(state.block[1]) + ", " + std::to_string(state.block[2]) + "): " + what;
  }
  Fiber& me = running.current();
  me.waits = Waits::kDone;
  to_scheduler(me);
  std::abort();
}

void fail(const char* what) { fail_with(what); }

void fail_unaligned(const char* what, int bytes) {
  fail_with(std::string(what) + " at an address that is no multiple of " + std::to_string(bytes));
}

void wait(Waits what, void* slot) {
  Fiber& me = running.current();
  me.waits = what;
  me.slot = slot;
  to_scheduler(me);
}

void copy16(void* shared, const void* global, bool valid) {
  u8* to = static_cast<u8*>(shared);
  if (to < state.shared || to + 16 > state.shared + running.shared_bytes) fail("cp_async16 outside shared memory");
  running.copies = running.copies * 1664525u + (running.copies ? 1013904223u : 0u);
  Copy copy{to, static_cast<const u8*>(global), valid, running.copies >> 31 != 0, {}};
  if (copy.read && valid) std::memcpy(copy.data, global, 16);
  if (copy.read && (running.copies >> 30 & 1)) std::memcpy(to, copy.data, 16);
  else running.current().open.push_back(copy);
}

void commit_copies() {
  Fiber& me = running.current();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void wait_for_copies(int pending) {
  Fiber& me = running.current();
  while (int(me.groups.size()) > pending) {
    for (const Copy& copy : me.groups.front()) {
      if (copy.read) std::memcpy(copy.to, copy.data, 16);
      else if (copy.valid) std::memcpy(copy.to, copy.from, 16);
      else std::memset(copy.to, 0, 16);
    }
    me.groups.erase(me.groups.begin());
  }
}

// -- what a warp does together -----------------------------------------------------------------------------------------

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
  Fiber* lanes = &running.fibers[32 * warp];
  bool moved = false;
  while (true) {
    bool ran = false;
    for (int lane = 0; lane < 32; ++lane) {
      if (lanes[lane].waits != Waits::kNothing) continue;
      state.current = 32 * warp + lane;
      to_fiber(lanes[lane]);
      if (!running.failure.empty()) throw Failure(running.failure);
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
  const int warps = state.threads / 32;
  for (int i = 0; i < state.threads; ++i) prepare(running.fibers[i]);
  while (true) {
    if (shuffled) {
      for (int i = warps - 1; i > 0; --i) std::swap(order[i], order[random() % (i + 1)]);
    }
    for (int warp : order) run_warp(warp);
    int at_barrier = 0, done = 0;
    for (int i = 0; i < state.threads; ++i) {
      at_barrier += running.fibers[i].waits == Waits::kBlock;
      done += running.fibers[i].waits == Waits::kDone;
    }
    if (done == state.threads) return;
    if (at_barrier != state.threads) {
      throw Failure(std::to_string(at_barrier) + " of " + std::to_string(state.threads) +
                    " threads reached a barrier of the block, " + std::to_string(done) + " have ended");
    }
    for (int i = 0; i < state.threads; ++i) running.fibers[i].waits = Waits::kNothing;
  }
}

constexpr size_t kCanary = 256;

inline void launch(const Kernel& kernel, const int* grid, int threads, size_t shared, const void* args, u32 seed) {
  if (threads % 32 || threads < 32 || threads > 1024) throw Failure("blocks must have 32, 64, ... or 1024 threads");
  if (threads > kernel.threads) {
    throw Failure("launched with " + std::to_string(threads) + " threads, compiled for " +
                  std::to_string(kernel.threads));
  }
  if (shared > (227 << 10)) throw Failure("the launch asks for more than 227 KB of shared memory");
  running.copies = seed > 1 ? seed : 0;
  state.threads = threads;
  running.kernel = &kernel;
  running.args = args;
  running.failure.clear();
  state.prefetched[0] = state.prefetched[1] = nullptr;
  if (int(running.fibers.size()) < threads) running.fibers.resize(threads);
  static std::vector<u8> memory;
  memory.resize(shared + kCanary + 128);
  state.shared = memory.data() + (128 - reinterpret_cast<uintptr_t>(memory.data()) % 128) % 128;
  running.shared_bytes = shared;
  std::vector<int> order(threads / 32);
  for (size_t i = 0; i < order.size(); ++i) order[i] = seed == 1 ? int(order.size() - 1 - i) : int(i);
  std::mt19937 random(seed);
  for (int i = 0; i < 3; ++i) state.grid[i] = grid[i];
  for (state.block[2] = 0; state.block[2] < grid[2]; ++state.block[2]) {
    for (state.block[1] = 0; state.block[1] < grid[1]; ++state.block[1]) {
      for (state.block[0] = 0; state.block[0] < grid[0]; ++state.block[0]) {
        std::memset(state.shared, 0xff, shared);
        std::memset(state.shared + shared, 0xa5, kCanary);
        run_block(order, random, seed > 1);
        for (size_t i = 0; i < kCanary; ++i) {
          if (state.shared[shared + i] != 0xa5) {
            throw Failure("block (" + std::to_string(state.block[0]) + ", " + std::to_string(state.block[1]) + ", " +
                          std::to_string(state.block[2]) + ") wrote beyond its " + std::to_string(shared) +
                          " bytes of shared memory, at " + std::to_string(i));
          }
        }
      }
    }
  }
}

}  // namespace emulator

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
  return reinterpret_cast<const void* const*>(edgelm::emulator::state.prefetched);
}
