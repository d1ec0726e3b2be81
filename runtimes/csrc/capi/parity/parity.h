// The parity check without Python: as edgelm/parity/check.py, with the same checks, limits and JSON report.
#pragma once

#include <functional>
#include <string>

#include "capi/common/json.h"
#include "capi/runtime/runtime.h"

namespace edgelm::capi {

struct ParityOptions {
  RuntimeOptions runtime;
  bool skip_layers = false;
  std::function<bool(const std::string& what, std::int64_t done, std::int64_t total)> on_progress;  // false: cancel
};

struct ParityResult {
  bool passed;
  Json report;  // the document of `edgelm parity --json`
};

// Throws Error for what is no check: a bundle that cannot be opened, a runtime that is missing.
ParityResult check_parity(const std::string& path, const ParityOptions& options);

}  // namespace edgelm::capi
