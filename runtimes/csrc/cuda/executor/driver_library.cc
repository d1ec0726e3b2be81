#include "cuda/executor/driver_library.h"

#include <cstdio>
#include <cstdlib>

#include "system/library.h"

namespace edgelm::gpu {

namespace {

constexpr char kVisible[] = "CUDA_VISIBLE_DEVICES";

#ifdef _WIN32
constexpr char kLibrary[] = "nvcuda.dll";
#else
constexpr char kLibrary[] = "libcuda.so.1";
#endif

using system::symbol;

// What to do, by the driver's error number, as in driver_library.py; empty: the message has the driver's own text.
const char* help(int status) {
  switch (status) {
    case 2:
      return "end what else uses the GPU (nvidia-smi shows it), or use a shorter context, a smaller batch or int4 "
             "weights";
    case 3: return "the process forked after it used the GPU: load the model in the child process";
    case 34:
      return "this is the toolkit's stub of the driver: install the driver, or take the stubs' folder off "
             "LD_LIBRARY_PATH";
    case 46: return "another process has the GPU for itself: end it, or change the GPU's compute mode";
    case 100: return "check that nvidia-smi lists a GPU, and that a container was started with its GPUs (--gpus all)";
    case 101:
      return "no GPU has this number: nvidia-smi lists them; choose one with EDGELM_GPU or CUDA_VISIBLE_DEVICES";
    case 200:
      return "the bundle's kernels are damaged, or too new for this driver: copy the bundle again, or update the "
             "driver";
    case 201: return "another library in this process reset the GPU: load the model again";
    case 209: return "the bundle has no kernels for this GPU: export with --sm and its number";
    case 214: return "the GPU's memory has uncorrectable errors: restart the machine, and have the GPU checked";
    case 218:
      return "the driver cannot compile the bundle's PTX: update the driver, or export with --sm and this GPU's number";
    case 222:
      return "the bundle's PTX is newer than the driver: update the driver, or export with --sm and this GPU's number";
    case 700:
      return "a kernel accessed invalid memory, a bug in EdgeLM: report it; restart this process to use the GPU again";
    case 701: return "the kernel needs more registers or shared memory than this GPU has: a bug in EdgeLM, report it";
    case 702:
      return "a kernel ran for too long for a GPU that also drives a display: use another GPU or turn its watchdog off";
    case 719:
      return "a kernel failed, a bug in EdgeLM or a fault of the GPU: report it; restart this process to use the GPU "
             "again";
    case 802: return "the system is still starting its GPUs: start nvidia-fabricmanager, then try again";
    case 803: return "the driver's library and its kernel module are of different versions: restart the machine";
    case 804:
      return "the compatibility libraries of a newer CUDA do not run on this GPU: take them off LD_LIBRARY_PATH";
  }
  return "";
}

}  // namespace

DriverLibrary::DriverLibrary() {
  path_ = system::variable("EDGELM_CUDA_DRIVER").value_or("");
  if (path_.empty()) path_ = kLibrary;
  std::string why;
  library_ = system::open_library(path_, &why);
  if (!library_) {
    const std::string start = path_ + ": ";
    if (why.compare(0, start.size(), start) == 0) why.erase(0, start.size());
    throw UnavailableError("no NVIDIA driver: " + path_ + " cannot be loaded (" + why +
                           "); install the driver, and start a container with its GPUs (--gpus all). Without a GPU, "
                           "export with --target cpu");
  }
  int version = 0;
  call("cuDriverGetVersion", "", &version);
  version_ = {version / 1000, version % 1000 / 10};
  if (const int status = attempt("cuInit", 0u)) fail("cuInit", status, "");
}

bool DriverLibrary::has(const char* function) const { return symbol(library_, function) != nullptr; }

void* DriverLibrary::find(const char* function) const {
  const auto known = functions_.find(function);
  if (known != functions_.end()) return known->second;
  void* found = symbol(library_, function);
  if (!found) {
    throw UnavailableError("the NVIDIA driver (" + path_ + ") is too old: it lacks " + function + "; update it");
  }
  return functions_.emplace(function, found).first->second;
}

std::string DriverLibrary::words(const char* function, int status) const {
  const char* text = nullptr;
  return attempt(function, status, &text) == 0 && text ? text : "";
}

void DriverLibrary::fail(const std::string& function, int status, const std::string& doing) const {
  const char* visible = std::getenv(kVisible);
  if (status == kNoDevice && visible) {
    throw UnavailableError(std::string(kVisible) + "=" + visible +
                           " shows no GPU: unset it, or name GPUs of `nvidia-smi -L` by numbers from 0, by UUID, or by "
                           "the UUID of a MIG device");
  }
  std::string name = words("cuGetErrorName", status), helps = help(status);
  if (name.empty()) name = "error " + std::to_string(status);
  if (helps.empty()) helps = words("cuGetErrorString", status);
  if (helps.empty()) helps = "the driver does not say why";
  const std::string message = "the GPU or its driver failed, " + name + " from " + function +
                              (doing.empty() ? "" : " while " + doing) + ": " + helps;
  if (status == kOutOfMemory) throw DeviceMemoryError(message);
  if (function == "cuInit" || status == kNoDevice) throw UnavailableError(message);
  throw Error(message);
}

std::string format_size(u64 bytes) {
  double value = double(bytes);
  const char* const units[] = {"B", "kB", "MB", "GB", "TB"};
  int unit = 0;
  for (; unit < 4 && value >= 999.5; ++unit) value /= 1000;
  if (unit == 0 || value >= 99.95) return std::to_string(static_cast<long long>(value + 0.5)) + " " + units[unit];
  const long long digits = static_cast<long long>(value * (value < 9.995 ? 100 : 10) +
                                                  0.5);  // no locale's decimal point
  const long long base = value < 9.995 ? 100 : 10;
  std::string rest = std::to_string(digits % base);
  while (rest.size() < (base == 100 ? 2u : 1u)) rest.insert(0, "0");
  while (!rest.empty() && rest.back() == '0') rest.pop_back();
  return std::to_string(digits / base) + (rest.empty() ? "" : "." + rest) + " " + units[unit];
}

}  // namespace edgelm::gpu
