#include "cuda/executor/device.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "system/files.h"

namespace edgelm::gpu {

namespace {

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76, kMostShared = 97;  // attributes of devices
constexpr int kDynamicShared = 8;                                                 // attribute of functions
constexpr unsigned kNonBlocking = 1, kNoTiming = 2;                               // flags of streams and events
constexpr int kCaptureThisThread = 1;
constexpr int kJitErrorLog = 5, kJitErrorLogSize = 6;
constexpr u32 kShared = 48 << 10;  // bytes that a kernel may use without setting an attribute
// Copies pass through two pinned buffers of this size: while one is copied to the GPU, the other is filled.
constexpr u64 kStaging = 8 << 20;
constexpr u64 kSmall = kStaging / 64;          // small enough for the driver's own buffer
constexpr u64 kMostImage = 1 << 30;            // bytes of compiled kernels
constexpr int kProgrammaticSerialization = 6;  // the kernel itself waits for the previous one

// CUlaunchConfig with one attribute.
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

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// The number of the GPU to use of `count`.
int chosen_index(int count) {
  const std::string named = variable("EDGELM_GPU");
  if (named.find_first_not_of("0123456789") != std::string::npos) {
    throw UnavailableError("EDGELM_GPU=" + named + " is not the number of a GPU: set it to 0 to " +
                           std::to_string(count - 1) + "; UUIDs and MIG devices go into CUDA_VISIBLE_DEVICES");
  }
  const int index = named.size() > 6 ? count : named.empty() ? 0 : std::atoi(named.c_str());
  if (index < count) return index;
  const char* visible = std::getenv("CUDA_VISIBLE_DEVICES");
  throw UnavailableError("there is no GPU " + named + ": " +
                         (visible ? std::string("CUDA_VISIBLE_DEVICES=") + visible + " shows" : "this machine shows") +
                         " " + std::to_string(count) + ", numbered from 0; choose one with EDGELM_GPU");
}

std::string read_image(const std::string& path) {
  const system::File file = system::File::open(path);
  const auto status = file.is_open() ? file.status() : std::nullopt;
  std::string data;
  std::int64_t got = -1;
  if (status && status->kind == system::FileStatus::kFile && status->size <= kMostImage) {
    data.resize(std::size_t(status->size));
    got = file.read(&data[0], data.size());
  }
  if (got < 0 || std::size_t(got) != data.size()) {
    throw Error(path + " cannot be read: copy the bundle again", Error::Kind::kBundle);
  }
  return data;
}

}  // namespace

Device::Current::Current(const Device& device) : device_(device) {
  device.driver_.call("cuCtxGetCurrent", "", &former_);
  if (former_ != device.context_) device.driver_.call("cuCtxSetCurrent", "", device.context_);
}

Device::Current::~Current() {
  if (former_ != device_.context_) device_.driver_.attempt("cuCtxSetCurrent", former_);
}

Device::Device(KernelIndex kernels) : kernels_(std::move(kernels)) {
  pdl_ = variable("EDGELM_GPU_PDL") == "1";
  choose_device();
  driver_.call("cuDevicePrimaryCtxRetain", "making a context", &context_, ordinal_);
  try {
    const Current current(*this);
    driver_.call("cuStreamCreate", "", &stream_, kNonBlocking);
  } catch (...) {
    driver_.attempt("cuDevicePrimaryCtxRelease_v2", ordinal_);
    throw;
  }
}

void Device::choose_device() {
  int count = 0;
  driver_.call("cuDeviceGetCount", "", &count);
  if (count < 1) driver_.fail("cuDeviceGetCount", kNoDevice, "");
  driver_.call("cuDeviceGet", "", &ordinal_, chosen_index(count));
  char name[256] = "";
  driver_.call("cuDeviceGetName", "", static_cast<char*>(name), int(sizeof name), ordinal_);
  name[sizeof name - 1] = 0;
  name_ = name;
  info_ = {10 * attribute(kMajor) + attribute(kMinor), attribute(kMultiprocessors)};
  most_shared_ = u32(attribute(kMostShared));
  if (info_.sm < 80) {
    throw UnavailableError(name_ + " has compute capability " + std::to_string(info_.sm / 10) + "." +
                           std::to_string(info_.sm % 10) +
                           ", and the kernels need 8.0 (Ampere, 2020) or newer: use --target cuda or cpu");
  }
}

int Device::attribute(int which) const {
  int value = 0;
  driver_.call("cuDeviceGetAttribute", "", &value, which, ordinal_);
  return value;
}

Device::~Device() {
  try {
    const Current current(*this);
    close();
  } catch (const std::exception&) {  // after a kernel error the context is lost, and its memory with it
  }
  try {
    driver_.attempt("cuDevicePrimaryCtxRelease_v2", ordinal_);
  } catch (const std::exception&) {
  }
}

void Device::close() {
  synchronize();
  for (void* graph : graphs_) driver_.call("cuGraphExecDestroy", "", graph);
  for (const Staging& one : staging_) driver_.call("cuEventDestroy_v2", "", one.copied);
  driver_.call("cuStreamDestroy_v2", "", stream_);
  if (module_.handle) driver_.call("cuModuleUnload", "", module_.handle);
  for (const auto& [address, bytes] : buffers_) driver_.call("cuMemFree_v2", "", address);
  for (u8* memory : pinned_) driver_.call("cuMemFreeHost", "", static_cast<void*>(memory));
}

// -- memory ------------------------------------------------------------------------------------------------------------

std::pair<u64, u64> Device::memory() const {
  std::size_t available = 0, total = 0;
  driver_.call("cuMemGetInfo_v2", "", &available, &total);
  return {available, total};
}

u64 Device::allocate(u64 bytes) {
  u64 address = 0;
  const int status = driver_.attempt("cuMemAlloc_v2", &address, std::size_t(std::max<u64>(bytes, 1)));
  if (status == kOutOfMemory) {
    const auto [available, total] = memory();
    throw DeviceMemoryError(
        name_ + " has " + format_size(available) + " of " + format_size(total) + " free, " + format_size(allocated_) +
        " are this model's, and " + format_size(bytes) +
        " more are needed: end what else uses the GPU, or use a shorter context, a smaller batch or "
        "int4 weights");
  }
  if (status) driver_.fail("cuMemAlloc_v2", status, "");
  buffers_[address] = bytes;
  allocated_ += bytes;
  return address;
}

void Device::free(u64 address) {
  const auto found = buffers_.find(address);
  if (found == buffers_.end()) return;
  allocated_ -= found->second;
  buffers_.erase(found);
  driver_.call("cuMemFree_v2", "", address);
}

void Device::upload(u64 address, const void* data, u64 bytes) {
  if (bytes && bytes <= kSmall) {
    driver_.call("cuMemcpyHtoDAsync_v2", "", address, data, std::size_t(bytes), stream_);
    return;
  }
  const u8* from = static_cast<const u8*>(data);
  upload_from(address, bytes, [&](void* to, std::size_t count) {
    std::memcpy(to, from, count);
    from += count;
  });
}

void Device::upload_from(u64 address, u64 bytes, const std::function<void(void*, std::size_t)>& next) {
  for (std::size_t turn = 0; bytes > 0; turn = 1 - turn) {
    const Staging& one = staging()[turn];
    driver_.call("cuEventSynchronize", "", one.copied);
    const std::size_t part = std::size_t(std::min(bytes, kStaging));
    next(one.memory, part);
    start_upload(address, one.memory, part);
    driver_.call("cuEventRecord", "", one.copied, stream_);
    address += part;
    bytes -= part;
  }
}

std::vector<Device::Staging>& Device::staging() {
  while (staging_.size() < 2) {
    u8* memory = pinned(kStaging);
    staging_.push_back({memory, event()});
  }
  return staging_;
}

void Device::download(u64 address, void* out, u64 bytes) {
  const u64 count = u64(divide_up(i64(bytes), i64(kStaging)));
  const auto size = [&](u64 part) { return std::size_t(std::min(kStaging, bytes - part * kStaging)); };
  // In stream order: after any upload from this buffer.
  const auto start = [&](u64 part) {
    start_download(staging()[part % 2].memory, address + part * kStaging, size(part));
  };
  if (count) start(0);
  for (u64 part = 0; part < count; ++part) {
    wait();
    if (part + 1 < count) start(part + 1);
    std::memcpy(static_cast<u8*>(out) + part * kStaging, staging()[part % 2].memory, size(part));
  }
}

void Device::fill(u64 address, u8 value, u64 bytes) {
  if (bytes)
    driver_.call("cuMemsetD8Async", "", address, static_cast<unsigned char>(value), std::size_t(bytes), stream_);
}

u8* Device::pinned(std::size_t bytes) {
  void* memory = nullptr;
  bytes = std::max<std::size_t>(bytes, 1);
  driver_.call("cuMemHostAlloc", "pinning host memory", &memory, bytes, 0u);
  std::memset(memory, 0, bytes);
  pinned_.insert(static_cast<u8*>(memory));
  return static_cast<u8*>(memory);
}

void Device::unpin(u8* memory) {
  if (pinned_.erase(memory)) driver_.call("cuMemFreeHost", "", static_cast<void*>(memory));
}

void Device::start_upload(u64 address, const u8* pinned, std::size_t bytes) {
  driver_.call("cuMemcpyHtoDAsync_v2", "", address, static_cast<const void*>(pinned), bytes, stream_);
}

void Device::start_download(u8* pinned, u64 address, std::size_t bytes) {
  driver_.call("cuMemcpyDtoHAsync_v2", "", static_cast<void*>(pinned), address, bytes, stream_);
}

void Device::wait() { driver_.call("cuStreamSynchronize", "waiting for a copy and the kernels before it", stream_); }

void Device::synchronize() { driver_.call("cuCtxSynchronize", "waiting for kernels"); }

void* Device::event() {
  void* made = nullptr;
  driver_.call("cuEventCreate", "", &made, kNoTiming);
  return made;
}

// -- kernels -----------------------------------------------------------------------------------------------------------

void* Device::module() {
  if (module_.handle) return module_.handle;
  std::vector<KernelTarget> targets;
  for (const KernelIndex::Image& image : kernels_.images) targets.push_back(image.target);
  try {
    const KernelTarget& best = choose(targets, info_.sm, driver_.version());
    module_.image = &kernels_.images[std::size_t(&best - targets.data())];
  } catch (const Error& error) {
    throw UnavailableError(error.what());
  }
  const std::string data = read_image(module_.image->path);  // with a zero byte behind it, which must follow PTX
  char log[4096] = "";
  int keys[] = {kJitErrorLog, kJitErrorLogSize};
  void* values[] = {log, reinterpret_cast<void*>(sizeof log)};
  const int status = driver_.attempt("cuModuleLoadDataEx", &module_.handle, static_cast<const void*>(data.c_str()), 2u,
                                     static_cast<int*>(keys), static_cast<void**>(values));
  if (status) {
    module_.handle = nullptr;
    log[sizeof log - 1] = 0;
    const std::string said(log);
    const std::string doing = "loading " + module_.image->target.name;
    if (said.empty()) driver_.fail("cuModuleLoadDataEx", status, doing);
    driver_.fail("cuModuleLoadDataEx", status, doing + " (" + said.substr(0, said.find('\n')) + ")");
  }
  return module_.handle;
}

void Device::load(const KernelNames& names) {
  KernelNames missing;
  for (const std::string& name : names) {
    if (!kernels_.argument_bytes.count(name)) missing.push_back(name);
  }
  if (!missing.empty()) {
    throw UnavailableError(kernels_.folder + " lacks the kernel " + missing.front() + " (of " +
                           std::to_string(missing.size()) +
                           "): it was exported by another version of edgelm; export it again");
  }
  for (const std::string& name : names) {
    if (functions_.count(name)) continue;
    void *handle = nullptr, *from = module();
    driver_.call("cuModuleGetFunction", ("looking for " + name).c_str(), &handle, from, name.c_str());
    // Drivers load a kernel when it is first used and wait then, which is not allowed during a capture.
    if (driver_.has("cuFuncLoad")) driver_.call("cuFuncLoad", ("loading " + name).c_str(), handle);
    functions_[name] = {handle, kernels_.argument_bytes.at(name), module_.image->pdl.count(name) != 0, kShared};
  }
}

LoadedLaunch Device::loaded(Launch launch) {
  const auto found = functions_.find(launch.kernel);
  if (found == functions_.end())
    throw Error("the kernel " + launch.kernel + " was not loaded: a bug in EdgeLM, report it");
  Function& function = found->second;
  if (launch.args.size() != function.argument_bytes) {
    throw Error("the bundle's kernel " + launch.kernel + " takes " + std::to_string(function.argument_bytes) +
                    " bytes of arguments, this version of EdgeLM has " + std::to_string(launch.args.size()) +
                    ": another version compiled it; export the bundle again",
                Error::Kind::kBundle);
  }
  if (launch.shared > function.shared) {
    if (launch.shared > most_shared_) {
      throw Error(launch.kernel + " needs " + std::to_string(launch.shared) +
                  " bytes of shared memory, and a block on " + name_ + " has " + std::to_string(most_shared_) +
                  ": a bug in EdgeLM, report it");
    }
    driver_.call("cuFuncSetAttribute", "asking for shared memory", function.handle, kDynamicShared, int(launch.shared));
    function.shared = launch.shared;
  }
  return {function.handle, function.pdl && pdl_, std::move(launch)};
}

void Device::launch(const LoadedLaunch& loaded) {
  const Launch& launch = loaded.launch;
  const u32* grid = launch.grid;
  void* parameters[] = {const_cast<u8*>(launch.args.data())};  // the driver copies the arguments before it returns
  int status = 0;
  if (loaded.early) {
    LaunchAttribute attribute{kProgrammaticSerialization, 0, 1, {}};
    const LaunchConfig config{{grid[0], grid[1], grid[2]}, {launch.block, 1, 1}, launch.shared, stream_, &attribute, 1};
    status = driver_.attempt("cuLaunchKernelEx", &config, loaded.function, static_cast<void**>(parameters),
                             static_cast<void**>(nullptr));
  } else {
    status = driver_.attempt("cuLaunchKernel", loaded.function, grid[0], grid[1], grid[2], launch.block, 1u, 1u,
                             launch.shared, stream_, static_cast<void**>(parameters), static_cast<void**>(nullptr));
  }
  if (status) driver_.fail(loaded.early ? "cuLaunchKernelEx" : "cuLaunchKernel", status, "launching " + launch.kernel);
}

// -- graphs ------------------------------------------------------------------------------------------------------------

void* Device::capture(const std::function<void()>& work) {
  driver_.call("cuStreamBeginCapture_v2", "", stream_, kCaptureThisThread);
  void *graph = nullptr, *made = nullptr;
  try {
    work();
  } catch (...) {  // its error is the one to report
    driver_.attempt("cuStreamEndCapture", stream_, &graph);
    if (graph) driver_.attempt("cuGraphDestroy", graph);
    throw;
  }
  driver_.call("cuStreamEndCapture", "capturing launches", stream_, &graph);
  const int status = driver_.attempt("cuGraphInstantiateWithFlags", &made, graph, 0ull);
  driver_.call("cuGraphDestroy", "", graph);
  if (status) driver_.fail("cuGraphInstantiateWithFlags", status, "making a graph of launches");
  graphs_.insert(made);
  driver_.call("cuGraphUpload", "", made, stream_);
  return made;
}

void Device::launch_graph(void* graph) { driver_.call("cuGraphLaunch", "", graph, stream_); }

void Device::drop(void* graph) {
  if (graphs_.erase(graph)) driver_.call("cuGraphExecDestroy", "", graph);
}

}  // namespace edgelm::gpu
