// The compiled kernels of a bundle, in an archive behind the library's own ELF file.
//
//   ELF | images | index | u64 offset of the index | u64 its bytes | "EDGELMK1"
//
// Loaders ignore what is behind an ELF file, so that the library with its kernels is one file, which TensorRT can also
// store in an engine. runtimes/tensorrt/kernel_archive.py writes the archive. The index is lines of `name=value`:
//
//   images=sm_86 compute_80     targets
//   sm_86.offset, .bytes        of the image in the file
//   sm_86.compiler=13.0         the version of NVRTC
//   sm_86.pdl=NAME NAME         kernels that support programmatic dependent launch
//   arguments.NAME=64           bytes of a kernel's arguments
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "cuda/driver/kernel_images.h"
#include "system/files.h"

namespace edgelm::gpu {

class KernelArchive {
 public:
  // The archive of this library; it is opened when the library is loaded, since TensorRT may delete the file then.
  static const KernelArchive& get();

  // The file must stay open. An archive without images: the file ends with its ELF.
  explicit KernelArchive(const system::File& file);

  const std::vector<KernelTarget>& targets() const { return targets_; }
  // The image of a target, and a zero byte, which must follow PTX. Throws Error (kBundle) if it cannot be read.
  std::string image(const std::string& target) const;
  const std::set<std::string>& pdl(const std::string& target) const { return entries_.at(target).pdl; }
  // Bytes of each kernel's arguments, by name.
  const std::map<std::string, u64>& argument_bytes() const { return argument_bytes_; }

 private:
  struct Entry {
    u64 offset, bytes;
    std::set<std::string> pdl;
  };
  std::string read(u64 offset, u64 bytes) const;

  const system::File& file_;
  std::vector<KernelTarget> targets_;
  std::map<std::string, Entry> entries_;
  std::map<std::string, u64> argument_bytes_;
};

}  // namespace edgelm::gpu
