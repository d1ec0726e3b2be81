#include "cuda/driver/driver.h"

#include <cstdlib>
#include <vector>

#include "system/library.h"

namespace edgelm::trt {

namespace {

using gpu::Error;

#ifdef _WIN32
constexpr char kLibrary[] = "nvcuda.dll";
#else
constexpr char kLibrary[] = "libcuda.so.1";
#endif
constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kMostShared = 97;  // attributes of devices
constexpr int kDynamicShared = 8;                                                 // attribute of functions
constexpr int kJitErrorLog = 5, kJitErrorLogSize = 6;
constexpr u32 kShared = 48 << 10;  // bytes that a kernel may use without setting an attribute
constexpr int kOutOfMemory = 2, kInvalidImage = 200, kNoBinary = 209, kIllegalAddress = 700, kLaunchFailed = 719;

// CUlaunchConfig with one attribute, for programmatic dependent launch.
struct LaunchAttribute {
  int id, padding;
  int value;
  char rest[60];
};
struct LaunchConfig {
  u32 grid[3], block[3], shared;
  void* stream;
  LaunchAttribute* attributes;
  u32 count;
};
constexpr int kProgrammaticSerialization = 6;

std::string help(int status) {
  switch (status) {
    case kOutOfMemory:
      return "end what else uses the GPU (nvidia-smi shows it), or use a shorter context or a smaller batch";
    case kInvalidImage:
    case kNoBinary:
      return "the kernels are damaged, or are not for this GPU: copy the bundle again, or run `edgelm build`";
    case kIllegalAddress:
    case kLaunchFailed:
      return "a kernel failed, a bug in EdgeLM or a fault of the GPU: report it; restart this process";
  }
  return "";
}

}  // namespace

const Driver& Driver::get() {
  static const Driver driver;
  return driver;
}

Driver::Driver() {
  path_ = system::variable("EDGELM_CUDA_DRIVER").value_or("");
  if (path_.empty()) path_ = kLibrary;
  std::string why;
  library_ = system::open_library(path_, &why);
  if (!library_) {
    throw Error("no NVIDIA driver: " + path_ + " cannot be loaded (" + why +
                "); install the driver, and start a container with its GPUs (--gpus all)");
  }
  int version = 0;
  call("cuDriverGetVersion", "asking for its version", &version);
  version_ = {version / 1000, version % 1000 / 10};
  call("cuInit", "starting", 0u);
}

bool Driver::has(const char* function) const { return system::symbol(library_, function) != nullptr; }

void* Driver::find(const char* function) const {
  void* found = system::symbol(library_, function);
  if (!found) throw Error("the NVIDIA driver (" + path_ + ") is too old: it lacks " + function + "; update it");
  return found;
}

void Driver::fail(const char* function, int status, const std::string& doing) const {
  const auto words = [&](const char* which, const std::string& otherwise) {
    const char* text = nullptr;
    const auto ask = reinterpret_cast<int (*)(int, const char**)>(find(which));
    return ask(status, &text) == 0 && text ? std::string(text) : otherwise;
  };
  const std::string helps = help(status);
  throw Error("the GPU or its driver failed, " + words("cuGetErrorName", "error " + std::to_string(status)) + " from " +
              function + " while " + doing + ": " +
              (helps.empty() ? words("cuGetErrorString", "the driver does not say why") : helps));
}

DeviceContext& DeviceContext::current() {
  static std::mutex mutex;
  static std::map<void*, std::unique_ptr<DeviceContext>> all;
  const Driver& driver = Driver::get();
  void* context = nullptr;
  driver.call("cuCtxGetCurrent", "asking for the context", &context);
  if (!context) throw Error("a plugin runs in a thread without a CUDA context: report this bug");
  const std::lock_guard<std::mutex> lock(mutex);
  auto& found = all[context];
  if (!found) found = std::make_unique<DeviceContext>(driver);
  return *found;
}

DeviceContext::DeviceContext(const Driver& driver) : driver_(driver) {
  const auto attribute = [&](int which) {
    int value = 0;
    driver.call("cuDeviceGetAttribute", "describing the GPU", &value, which, device_);
    return value;
  };
  driver.call("cuCtxGetDevice", "describing the GPU", &device_);
  char name[256] = "";
  driver.call("cuDeviceGetName", "describing the GPU", name, int(sizeof name), device_);
  name_ = name;
  info_ = {10 * attribute(kMajor) + attribute(kMinor), attribute(kMultiprocessors)};
  most_shared_ = u32(attribute(kMostShared));
  const char* pdl = std::getenv("EDGELM_GPU_PDL");
  pdl_ = pdl && std::string(pdl) == "1";
  launch_kernel_ = driver.find("cuLaunchKernel");
  if (pdl_) launch_kernel_early_ = driver.find("cuLaunchKernelEx");
}

std::vector<LoadedKernel> DeviceContext::load(const gpu::Launches& launches) {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<LoadedKernel> kernels;
  for (const gpu::Launch& launch : launches) {
    Function& found = function(launch.kernel);
    if (launch.args.size() != found.argument_bytes) {
      throw Error("the kernel " + launch.kernel + " takes " + std::to_string(found.argument_bytes) +
                      " bytes of arguments, and this library has " + std::to_string(launch.args.size()) +
                      ": another version of EdgeLM compiled it; export the bundle again",
                  Error::Kind::kBundle);
    }
    if (launch.shared > found.shared) {
      if (launch.shared > most_shared_) {
        throw Error(launch.kernel + " needs " + std::to_string(launch.shared) +
                    " bytes of shared memory, and a block on " + name_ + " has " + std::to_string(most_shared_) +
                    ": a bug in EdgeLM, report it");
      }
      driver_.call("cuFuncSetAttribute", "asking for shared memory", found.handle, kDynamicShared, int(launch.shared));
      found.shared = launch.shared;
    }
    kernels.push_back({found.handle, found.pdl && pdl_});
  }
  return kernels;
}

void DeviceContext::load_module() {
  const gpu::KernelArchive& archive = gpu::KernelArchive::get();
  if (archive.targets().empty()) {
    throw Error("this libedgelm_plugins.so has no kernels: load the one in the bundle's folder engines",
                Error::Kind::kBundle);
  }
  target_ = gpu::choose(archive.targets(), info_.sm, driver_.version()).name;
  const std::string image = archive.image(target_);
  char log[4096] = "";
  int keys[] = {kJitErrorLog, kJitErrorLogSize};
  void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
  try {
    driver_.call("cuModuleLoadDataEx", "loading " + target_, &module_, image.data(), 2u, static_cast<int*>(keys),
                 static_cast<void**>(values));
  } catch (const Error& error) {
    const std::string said(log);
    throw said.empty() ? error : Error(std::string(error.what()) + " (" + said.substr(0, said.find('\n')) + ")");
  }
}

DeviceContext::Function& DeviceContext::function(const std::string& kernel) {
  const auto known = functions_.find(kernel);
  if (known != functions_.end()) return known->second;
  if (!module_) load_module();
  const gpu::KernelArchive& archive = gpu::KernelArchive::get();
  const auto bytes = archive.argument_bytes().find(kernel);
  if (bytes == archive.argument_bytes().end()) {
    throw Error(
        "the bundle lacks the kernel " + kernel + ": it was exported by another version of edgelm; export it again",
        Error::Kind::kBundle);
  }
  void* handle = nullptr;
  driver_.call("cuModuleGetFunction", "looking for " + kernel, &handle, module_, kernel.c_str());
  // Drivers load a kernel when it is first used and wait then, which is not allowed while a stream is captured.
  if (driver_.has("cuFuncLoad")) driver_.call("cuFuncLoad", "loading " + kernel, handle);
  const Function found{handle, bytes->second, archive.pdl(target_).count(kernel) != 0, kShared};
  return functions_.emplace(kernel, found).first->second;
}

void DeviceContext::launch(const gpu::Launches& launches, const std::vector<LoadedKernel>& kernels,
                           void* stream) const {
  using Launch = int (*)(void*, u32, u32, u32, u32, u32, u32, u32, void*, void**, void**);
  using LaunchEarly = int (*)(const LaunchConfig*, void*, void**, void**);
  for (std::size_t i = 0; i < launches.size(); ++i) {
    const gpu::Launch& launch = launches[i];
    const u32* grid = launch.grid;
    // The driver copies the arguments before it returns.
    void* parameters[] = {const_cast<u8*>(launch.args.data())};
    if (kernels[i].early) {
      LaunchAttribute attribute{kProgrammaticSerialization, 0, 1, {}};
      const LaunchConfig config{
          {grid[0], grid[1], grid[2]}, {launch.block, 1, 1}, launch.shared, stream, &attribute, 1};
      const int status = reinterpret_cast<LaunchEarly>(launch_kernel_early_)(&config, kernels[i].handle, parameters,
                                                                             nullptr);
      if (status) driver_.fail("cuLaunchKernelEx", status, "launching " + launch.kernel);
    } else {
      const int status = reinterpret_cast<Launch>(launch_kernel_)(
          kernels[i].handle, grid[0], grid[1], grid[2], launch.block, 1, 1, launch.shared, stream, parameters, nullptr);
      if (status) driver_.fail("cuLaunchKernel", status, "launching " + launch.kernel);
    }
  }
}

}  // namespace edgelm::trt
