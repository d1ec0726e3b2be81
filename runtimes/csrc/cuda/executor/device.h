// One GPU through the driver: memory, kernels, a stream, CUDA graphs. As runtimes/cuda/driver.py. No CUDA toolkit is
// needed.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/executor/driver_library.h"
#include "cuda/host/kernels.h"

namespace edgelm::gpu {

// The compiled kernels of a bundle's folder `kernels`, as its kernels.json describes them.
struct KernelIndex {
  struct Image {
    KernelTarget target;
    std::string path;           // a cubin or PTX text
    std::set<std::string> pdl;  // kernels that support programmatic dependent launch
  };
  std::string folder;
  std::vector<Image> images;
  std::map<std::string, u64> argument_bytes;  // of each kernel
};

// A kernel launch whose kernel is loaded.
struct LoadedLaunch {
  void* function;
  bool early;  // with programmatic dependent launch
  Launch launch;
};

// Uses the process's primary context, so that other libraries can share its memory. One thread at a time; a thread holds
// a `Current` during all calls.
class Device {
 public:
  // Open the GPU that EDGELM_GPU names, otherwise the first, of those that CUDA_VISIBLE_DEVICES shows. Throws
  // UnavailableError.
  explicit Device(KernelIndex kernels);
  ~Device();  // frees everything; after a kernel error only the context is released
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  // Makes the device's context that of this thread; the end brings back the thread's former one.
  class Current {
   public:
    explicit Current(const Device& device);
    ~Current();
    Current(const Current&) = delete;
    Current& operator=(const Current&) = delete;

   private:
    const Device& device_;
    void* former_ = nullptr;
  };

  const std::string& name() const { return name_; }
  const DeviceInfo& info() const { return info_; }
  std::pair<u64, u64> memory() const;  // free and total bytes, counting all processes

  // Memory aligned to 256 bytes, with undefined contents. Throws DeviceMemoryError with figures.
  u64 allocate(u64 bytes);
  void free(u64 address);
  // Copy to the device in stream order; `data` may be changed when this returns.
  void upload(u64 address, const void* data, u64 bytes);
  // The same with `next(to, count)`, which writes the next bytes into pinned memory.
  void upload_from(u64 address, u64 bytes, const std::function<void(void* to, std::size_t count)>& next);
  void download(u64 address, void* out, u64 bytes);  // returns when the copy is done
  void fill(u64 address, u8 value, u64 bytes);

  // Pinned host memory, zeros.
  u8* pinned(std::size_t bytes);
  void unpin(u8* memory);
  // Start copies from and to pinned memory, which must not change until they are done. They can be captured.
  void start_upload(u64 address, const u8* pinned, std::size_t bytes);
  void start_download(u8* pinned, u64 address, std::size_t bytes);
  void wait();         // for the stream
  void synchronize();  // for all work; an error of an earlier kernel is thrown here

  // Load kernels. Throws UnavailableError if no image runs on this GPU with this driver, or a kernel is missing.
  void load(const KernelNames& names);
  // Prepare a launch of a loaded kernel.
  LoadedLaunch loaded(Launch launch);
  void launch(const LoadedLaunch& launch);

  // Capture the launches and started copies of `work`, which must neither wait nor allocate, as a CUDA graph, which
  // exists as long as the device or until `drop`.
  void* capture(const std::function<void()>& work);
  void launch_graph(void* graph);
  void drop(void* graph);

 private:
  struct Function {
    void* handle;
    u64 argument_bytes;
    bool pdl;
    u32 shared;
  };
  struct Module {
    void* handle;
    const KernelIndex::Image* image;
  };
  struct Staging {
    u8* memory;
    void* copied;  // an event that is recorded after its last upload
  };
  int attribute(int which) const;
  void choose_device();
  void* module();
  void* event();
  std::vector<Staging>& staging();
  void close();

  DriverLibrary driver_;
  KernelIndex kernels_;
  int ordinal_ = 0;
  std::string name_;
  DeviceInfo info_{};
  u64 allocated_ = 0;
  u32 most_shared_ = 0;
  bool pdl_ = false;
  void* context_ = nullptr;
  void* stream_ = nullptr;
  Module module_{};  // of the only image
  std::map<std::string, Function> functions_;
  std::map<u64, u64> buffers_;  // bytes by address
  std::set<u8*> pinned_;
  std::set<void*> graphs_;
  std::vector<Staging> staging_;
};

}  // namespace edgelm::gpu
