#include "cuda/driver/kernel_archive.h"

#include <memory>
#include <sstream>

#include "cuda/host/fields.h"
#include "system/files.h"
#include "system/library.h"

namespace edgelm::gpu {

namespace {

constexpr char kMagic[] = "EDGELMK1";
constexpr u64 kFooter = 24;

std::vector<std::string> words_of(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

Error damaged(const std::string& what) {
  return Error(
      "libedgelm_plugins.so: its kernels are damaged (" + what + "): copy the bundle again, or run `edgelm build`",
      Error::Kind::kBundle);
}

// The library's file: its path is that which TensorRT gave to the loader, which may be a temporary one.
const system::File g_file = system::File::open(system::file_of(reinterpret_cast<const void*>(&words_of)));

}  // namespace

const KernelArchive& KernelArchive::get() {
  static const KernelArchive archive(g_file);
  return archive;
}

KernelArchive::KernelArchive(const system::File& file) : file_(file) {
  const auto status = file.is_open() ? file.status() : std::nullopt;
  const u64 size = status ? status->size : 0;
  if (size < kFooter) return;
  const std::string footer = read(size - kFooter, kFooter);
  if (footer.compare(16, 8, kMagic) != 0) return;
  u64 place[2];
  footer.copy(reinterpret_cast<char*>(place), sizeof place);
  if (place[0] > size || place[1] > size - place[0]) throw damaged("its index lies outside the file");
  const Fields index(read(place[0], place[1]));
  for (const std::string& target : words_of(index.text("images"))) {
    const std::set<std::string> pdl = [&] {
      const auto words = words_of(index.text(target + ".pdl"));
      return std::set<std::string>(words.begin(), words.end());
    }();
    const Entry entry{index.address(target + ".offset"), index.address(target + ".bytes"), pdl};
    if (entry.offset > size || entry.bytes > size - entry.offset) throw damaged(target);
    targets_.push_back({target, CudaVersion::of(index.text(target + ".compiler"))});
    entries_.emplace(target, entry);
  }
  const std::string prefix = "arguments.";
  for (const auto& [name, value] : index.all()) {
    if (name.compare(0, prefix.size(), prefix) == 0) {
      argument_bytes_[name.substr(prefix.size())] = index.address(name);
    }
  }
}

std::string KernelArchive::image(const std::string& target) const {
  const Entry& entry = entries_.at(target);
  return read(entry.offset, entry.bytes) + '\0';
}

std::string KernelArchive::read(u64 offset, u64 bytes) const {
  std::string data(bytes, '\0');
  for (u64 done = 0; done < bytes;) {
    const std::int64_t got = file_.read_at(&data[done], bytes - done, offset + done);
    if (got <= 0) throw damaged("the file cannot be read");
    done += u64(got);
  }
  return data;
}

}  // namespace edgelm::gpu
