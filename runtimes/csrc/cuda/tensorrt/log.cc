#include "cuda/tensorrt/log.h"

#include <cstdio>
#include <mutex>

#include "cuda/host/planners.h"
#include "cuda/tensorrt/abi.h"
#include "system/library.h"

namespace edgelm::trt {

namespace {

std::mutex g_mutex;
void* g_finder = nullptr;
int g_generation = 0;  // of the logger's interface: 10, 11, or 0 if unknown
std::string g_failure;
gpu::Error::Kind g_kind = gpu::Error::Kind::kOther;

// The generation of the logger's interface in the TensorRT library that `caller` belongs to.
int generation(const void* caller) {
  void* library = system::library_of(caller);
  if (!library) return 0;
  const auto ask = [&](const char* name) {
    const auto function = reinterpret_cast<int32_t (*)()>(system::symbol(library, name));
    return function ? function() : 0;
  };
  const int major = ask("getInferLibMajorVersion"), minor = ask("getInferLibMinorVersion");
  if (major >= 11) return 11;
  if (major == 10) return 10;
  return major == 1 && minor >= 7 ? 11 : 0;  // TensorRT-RTX
}

// Whether TensorRT has a log to write to.
bool logged(void* finder, int generation, const char* message) {
  if (finder && generation == 10) {
    if (Logger10* logger = static_cast<LoggerFinder10*>(finder)->logger()) {
      logger->log(Severity::kError, message);
      return true;
    }
  } else if (finder && generation == 11) {
    if (Logger11* logger = static_cast<LoggerFinder11*>(finder)->logger()) {
      logger->log(Severity::kError, message);
      return true;
    }
  }
  return false;
}

}  // namespace

void set_logger_finder(void* finder, const void* caller) {
  const std::lock_guard<std::mutex> lock(g_mutex);
  g_finder = finder;
  g_generation = generation(caller);
}

void report(const std::exception& error) noexcept {
  try {
    const auto* ours = dynamic_cast<const gpu::Error*>(&error);
    const std::string message = std::string("edgelm: ") + error.what();
    void* finder;
    int generation;
    {
      const std::lock_guard<std::mutex> lock(g_mutex);
      if (g_failure.empty()) {
        g_failure = error.what();
        g_kind = ours ? ours->kind : gpu::Error::Kind::kOther;
      }
      finder = g_finder;
      generation = g_generation;
    }
    if (!logged(finder, generation, message.c_str())) std::fprintf(stderr, "%s\n", message.c_str());
  } catch (...) {  // no memory: the callback's status still says that it failed
  }
}

}  // namespace edgelm::trt

namespace edgelm::gpu {

// Throw the first error of a callback since the last call, if there was one.
Functions log_functions() {
  return {{"take_failure", [](const Fields&) -> std::string {
             const std::lock_guard<std::mutex> lock(trt::g_mutex);
             if (trt::g_failure.empty()) return "";
             Error failure(trt::g_failure, trt::g_kind);
             trt::g_failure.clear();
             throw failure;
           }}};
}

}  // namespace edgelm::gpu
