// Errors of callbacks, which TensorRT itself reports as a failure without a reason.
#pragma once

#include <exception>
#include <string>

namespace edgelm::trt {

// Remember what setLoggerFinder was given, by the TensorRT that the address `caller` belongs to.
void set_logger_finder(void* finder, const void* caller);

// Keep the first error for Python (`take_failure` of api.cc's functions), and write each into TensorRT's log; without one to
// standard error.
void report(const std::exception& error) noexcept;

}  // namespace edgelm::trt
