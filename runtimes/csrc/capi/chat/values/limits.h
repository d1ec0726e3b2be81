// Limits of one rendering: steps, memory and recursion. Templates come with checkpoints, so they are not trusted.
#pragma once

#include <cstddef>
#include <cstdint>

#include "capi/chat/values/failure.h"

namespace edgelm::capi::chat {

struct Object;

class Limits {
 public:
  static constexpr std::int64_t kSteps = 40'000'000;  // one for each expression, item, and 32 bytes copied
  static constexpr std::size_t kMemory = 256u << 20;  // bytes of all values alive
  static constexpr std::size_t kOutput = 8u << 20;    // characters of the text
  static constexpr int kRecursion = 900;              // expressions and statements within each other
  static constexpr std::uint32_t kNesting = 400;      // lists within each other
  static constexpr std::int64_t kRange = 100'000;     // items of a range, as in jinja2's sandbox

  void step(std::size_t count = 1) {
    if (count > static_cast<std::size_t>(steps_)) throw_steps();
    steps_ -= static_cast<std::int64_t>(count);
  }
  void copy(std::size_t bytes) { step(bytes / 32 + 1); }
  void hold(std::size_t bytes) {
    if (bytes > kMemory - held_) throw_memory();
    held_ += bytes;
  }
  void release(std::size_t bytes) { held_ -= bytes; }
  // Throw unless this many bytes could be held now.
  void check(std::size_t bytes) const {
    if (bytes > kMemory - held_) throw_memory();
  }
  int depth = 0;
  // See `drop`.
  bool burying = false;
  Object* buried = nullptr;

 private:
  [[noreturn]] static void throw_steps();
  [[noreturn]] static void throw_memory();

  std::int64_t steps_ = kSteps;
  std::size_t held_ = 0;
};

// The limits of the rendering in this thread.
Limits& limits();

// Makes limits those of this thread.
class LimitsScope {
 public:
  explicit LimitsScope(Limits& limits);
  ~LimitsScope();
  LimitsScope(const LimitsScope&) = delete;
  LimitsScope& operator=(const LimitsScope&) = delete;

 private:
  Limits* before_;
};

// One more level of recursion.
class Level {
 public:
  Level() : limits_(limits()) {
    if (++limits_.depth > Limits::kRecursion) {
      --limits_.depth;
      throw Failure(Failure::kLimit, "recursion without end");
    }
  }
  ~Level() { --limits_.depth; }
  Level(const Level&) = delete;
  Level& operator=(const Level&) = delete;

 private:
  Limits& limits_;
};

}  // namespace edgelm::capi::chat
