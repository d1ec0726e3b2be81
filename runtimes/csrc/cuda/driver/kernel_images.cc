#include "cuda/driver/kernel_images.h"

#include <algorithm>
#include <cstdlib>

namespace edgelm::gpu {

namespace {

// A cubin runs on later devices of its generation, except on boards (Orin, Thor), which need their own.
bool board(int sm) { return sm == 87 || sm == 88 || sm == 110; }

// The number of a target, e.g. 86, if its name starts with `kind`; otherwise 0.
int number(const KernelTarget& target, const std::string& kind) {
  return target.name.compare(0, kind.size(), kind) ? 0 : std::atoi(target.name.c_str() + kind.size());
}

// How well a target serves a device, by its name alone; 0: not at all. Its own SM, an earlier SM of its generation (the
// latest), PTX (the latest).
int rank(const KernelTarget& target, int sm) {
  const int cubin = number(target, "sm_"), ptx = number(target, "compute_");
  if (cubin == sm) return 3000;
  if (cubin && cubin / 10 == sm / 10 && cubin < sm && !board(sm) && !board(cubin)) return 2000 + cubin;
  return ptx && ptx <= sm ? 1000 + ptx : 0;
}

// Whether a driver runs an image. A cubin runs on all drivers of its major version; PTX needs a driver as new.
bool runs(const KernelTarget& target, CudaVersion driver) {
  if (number(target, "sm_")) return driver.major >= target.compiler.major;
  return !(driver < target.compiler);
}

}  // namespace

const KernelTarget& choose(const std::vector<KernelTarget>& targets, int sm, CudaVersion driver) {
  const KernelTarget *best = nullptr, *too_new = nullptr;
  std::string names;
  for (const KernelTarget& target : targets) {
    names += (names.empty() ? "" : ", ") + target.name;
    const KernelTarget*& place = runs(target, driver) ? best : too_new;
    if (rank(target, sm) && (!place || rank(target, sm) > rank(*place, sm))) place = &target;
  }
  if (best) return *best;
  const std::string number = "SM " + std::to_string(sm), export_again = "export with --sm " + std::to_string(sm);
  if (!too_new) {
    throw Error("this GPU is " + number + ", and the bundle has kernels for " + (names.empty() ? "nothing" : names) +
                ": " + export_again);
  }
  const std::string compiler = too_new->compiler.text();
  if (driver.major < too_new->compiler.major) {
    throw Error("this GPU's driver supports CUDA " + driver.text() + ", and the kernels were compiled with CUDA " +
                compiler + ": update the driver to one for CUDA " + std::to_string(too_new->compiler.major) +
                ".0 or newer, or export the bundle where EDGELM_NVRTC names the NVRTC of CUDA " +
                std::to_string(driver.major));
  }
  throw Error("this GPU is " + number + ", for which the bundle has PTX of CUDA " + compiler +
              " only, and its driver supports CUDA " + driver.text() + ": update the driver, or " + export_again);
}

}  // namespace edgelm::gpu
