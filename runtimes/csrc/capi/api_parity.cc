// The C function of edgelm.h that checks parity.
#include "capi/api_support.h"
#include "capi/parity/parity.h"

using namespace edgelm::capi;

namespace {

ParityOptions parity_options_of(const edgelm_parity_options* options) {
  const edgelm_parity_options given = options_at(options, "edgelm_parity_options");
  ParityOptions wanted;
  wanted.runtime.runtime = or_empty(given.runtime);
  wanted.runtime.onnxruntime = or_empty(given.onnxruntime);
  wanted.runtime.threads = int(count_of(given.threads, "threads"));
  wanted.runtime.kv = or_empty(given.kv);
  wanted.skip_layers = given.skip_layers != 0;
  if (given.on_progress != nullptr)
    wanted.on_progress = [on_progress = given.on_progress, user = given.user](const std::string& what,
                                                                              std::int64_t done, std::int64_t total) {
      return on_progress(user, what.c_str(), done, total) == 0;
    };
  return wanted;
}

}  // namespace

edgelm_error* edgelm_parity(const char* path, const edgelm_parity_options* options, int* passed, char** report,
                            size_t* size) {
  return guarded([&] {
    require_given(path, "path");
    require_given(passed, "passed");
    require_given(report, "report");
    require_given(size, "size");
    const ParityResult result = check_parity(path, parity_options_of(options));
    return_text(result.report.dump(), report, size);
    *passed = result.passed ? 1 : 0;
  });
}
