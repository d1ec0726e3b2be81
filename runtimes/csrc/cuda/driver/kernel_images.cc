#include "cuda/driver/kernel_images.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <sstream>
#include <utility>

#include "cuda/host/planners.h"

namespace edgelm::gpu {

CudaVersion CudaVersion::of(const std::string& text) {
  CudaVersion version;
  char rest;
  if (std::sscanf(text.c_str(), "%d.%d%c", &version.major, &version.minor, &rest) != 2) {
    throw Error("a version of CUDA is " + text.substr(0, 20) + ", expected one like 13.0", Error::Kind::kBundle);
  }
  return version;
}

namespace {

// A cubin runs on later devices of its generation, except on boards (Orin, Thor), which need their own.
bool board(int sm) { return sm == 87 || sm == 88 || sm == 110; }

// The number of a target, e.g. 86, if its name starts with `kind`; otherwise 0.
int number(const KernelTarget& target, const std::string& kind) {
  return target.name.compare(0, kind.size(), kind) ? 0 : std::atoi(target.name.c_str() + kind.size());
}

// The least version of CUDA that a driver must support: a cubin's major version; PTX's own.
CudaVersion needed(const KernelTarget& target) {
  return number(target, "sm_") ? CudaVersion{target.compiler.major, 0} : target.compiler;
}

}  // namespace

const KernelTarget& choose(const std::vector<KernelTarget>& targets, int sm, CudaVersion driver) {
  std::string names;
  std::vector<std::pair<int, const KernelTarget*>> runs;  // with a rank: best first
  bool own = false;
  for (const KernelTarget& target : targets) {
    names += (names.empty() ? "" : ", ") + target.name;
    const int cubin = number(target, "sm_"), ptx = number(target, "compute_");
    own = own || cubin == sm;
    const bool kin = cubin && cubin / 10 == sm / 10 && cubin < sm && !board(sm) && !board(cubin);
    if (cubin == sm || kin) runs.emplace_back(1000 + cubin, &target);
    if (ptx && ptx <= sm) runs.emplace_back(ptx, &target);
  }
  std::sort(runs.begin(), runs.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  std::string needs;
  for (const auto& [rank, target] : runs) {
    if (!(driver < needed(*target))) return *target;
    needs += (needs.empty() ? "" : ", ") + target->name + " for CUDA " + needed(*target).text();
  }
  const std::string device = "this GPU is SM " + std::to_string(sm),
                    export_again = "export with --sm " + std::to_string(sm);
  if (runs.empty()) {
    throw Error(device + ", and the bundle has kernels for " + (names.empty() ? "nothing" : names) + ": " +
                export_again);
  }
  throw Error(device + ", its driver supports CUDA " + driver.text() + ", and the bundle's kernels need a newer one (" +
              needs + "): update the driver" + (own ? "" : ", or " + export_again) +
              ", or export with an older NVRTC (EDGELM_NVRTC)");
}

// For Python: `images` is a list of TARGET:COMPILER.
Functions image_functions() {
  return {{"choose_image", [](const Fields& fields) {
             std::vector<KernelTarget> targets;
             std::istringstream words(fields.text("images"));
             for (std::string word; words >> word;) {
               const std::size_t colon = word.find(':');
               targets.push_back({word.substr(0, colon), CudaVersion::of(word.substr(colon + 1))});
             }
             return choose(targets, int(fields.size("sm")), CudaVersion::of(fields.text("driver"))).name;
           }}};
}

}  // namespace edgelm::gpu
