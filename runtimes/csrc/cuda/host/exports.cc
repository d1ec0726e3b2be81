// What Python calls: functions from named fields (fields.h) to bytes. runtimes/cuda/planning.py is the other side.
// libedgelm leaves this file out: it exports edgelm.h only.
#include <exception>
#include <functional>
#include <map>
#include <string>

#include "cuda/host/fields.h"
#include "cuda/host/planners.h"
#include "system/export.h"

namespace edgelm::gpu {
namespace {

const std::map<std::string, Function>& functions() {
  static const std::map<std::string, Function> all = [] {
    std::map<std::string, Function> found;
    for (const auto& table : {kernel_functions(), linear_functions(), rows_functions(), moe_functions(),
                              sparse_moe_functions(), attention_functions(), node_functions(), sampling_functions(),
                              plugin_functions(), log_functions(), image_functions()}) {
      found.insert(table.begin(), table.end());
    }
    return found;
  }();
  return all;
}

}  // namespace
}  // namespace edgelm::gpu

// Call a function by name. `answer` and `size` are its result, or the message of an error; they stay valid until the
// next call of the same thread. Returns 0, or the Error::Kind.
extern "C" EDGELM_EXPORT int edgelm_gpu_call(const char* function, const char* fields, const char** answer,
                                             std::size_t* size) {
  using namespace edgelm::gpu;
  static thread_local std::string last;
  int status = 0;
  try {
    const auto found = functions().find(function);
    if (found == functions().end()) throw Error(std::string("there is no function ") + function, Error::Kind::kOther);
    last = found->second(Fields(fields));
  } catch (const Error& error) {
    last = error.what();
    status = int(error.kind);
  } catch (const std::exception& error) {
    last = error.what();
    status = int(Error::Kind::kOther);
  }
  *answer = last.data();
  *size = last.size();
  return status;
}
