#include "capi/runtime/onnxruntime/library.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <vector>

#include "capi/common/files.h"
#include "capi/common/unicode.h"
#include "system/library.h"

namespace edgelm::capi {
namespace {

constexpr const char* kVariable = "EDGELM_ONNXRUNTIME";
constexpr const char* kLeastVersion = "1.31.1";  // for bundles that do not state it

#if defined(_WIN32)
constexpr const char* kNames[] = {"onnxruntime.dll"};
#elif defined(__APPLE__)
constexpr const char* kNames[] = {"libonnxruntime.1.dylib", "libonnxruntime.dylib"};
#else
constexpr const char* kNames[] = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif

using system::open_library;
using system::symbol;

// The folder of this library, or of the program that it is linked into.
std::string own_folder() {
  const std::string file = system::file_of(reinterpret_cast<void*>(&own_folder));
  return file.empty() ? "" : parent(resolved(file));
}

OrtLibrary describe(void* opened, const std::string& path) {
  const auto get = reinterpret_cast<OrtGetApiBaseFunction>(symbol(opened, "OrtGetApiBase"));
  const OrtApiBase* base = get == nullptr ? nullptr : get();
  if (base == nullptr) {
    fail(EDGELM_UNAVAILABLE, path, " is not ONNX Runtime: it has no OrtGetApiBase; name libonnxruntime itself");
  }
  const std::string version = base->GetVersionString();
  const OrtApi* api = nullptr;
  // An older one writes to stderr if it is asked for this version.
  if (version_numbers(version) >= std::vector<int>{1, int(ort::kApiVersion)}) api = base->GetApi(ort::kApiVersion);
  if (api == nullptr) {
    fail(EDGELM_UNAVAILABLE, path, " is ONNX Runtime ", version, ": bundles need ", kLeastVersion, " or newer");
  }
  return {path, version, base, api};
}

[[noreturn]] void fail_missing(const std::string& folder) {
  fail(EDGELM_UNAVAILABLE, "ONNX Runtime was not found: there is no ", kNames[0], " in ", folder,
       ", and the system finds none. Put it there, or give its path in the option `onnxruntime` or in the environment "
       "variable ",
       kVariable);
}

// The library and the path by which it was opened.
void* find(const std::string& named, std::string* path) {
  const std::string variable = system::variable(kVariable).value_or("");
  const bool by_variable = named.empty() && !variable.empty();
  std::string why;
  if (!named.empty() || by_variable) {
    *path = by_variable ? variable : named;
    const std::string source = by_variable ? concat(kVariable, "=", *path) : concat("ONNX Runtime's library ", *path);
    if (!is_file(*path)) fail(EDGELM_UNAVAILABLE, source, ": the file does not exist");
    // A name without a slash would be searched in the system's folders.
    if (path->find_first_of("/\\") == std::string::npos) *path = join(".", *path);
    void* opened = open_library(*path, &why);
    if (opened == nullptr) fail(EDGELM_UNAVAILABLE, source, " cannot be opened: ", why);
    return opened;
  }
  const std::string folder = own_folder();
  for (const char* name : kNames) {
    *path = join(folder, name);
    if (folder.empty() || !is_file(*path)) continue;
    void* opened = open_library(*path, &why);
    if (opened == nullptr) fail(EDGELM_UNAVAILABLE, *path, " cannot be opened: ", why);
    return opened;
  }
  for (const char* name : kNames) {
    *path = name;
    void* opened = open_library(name, &why);
    if (opened == nullptr) continue;
    // Windows has one of its own: messages name the file.
    const std::string file = system::file_of(symbol(opened, "OrtGetApiBase"));
    if (!file.empty()) *path = file;
    return opened;
  }
  fail_missing(folder);
}

}  // namespace

std::string OrtLibrary::problem(OrtStatus* status) const {
  if (status == nullptr) return "";
  std::string text = ort::GetErrorMessage(api, status);
  ort::ReleaseStatus(api, status);
  text.erase(0, text.find_first_not_of(" \t\r\n"));
  text.resize(std::min(text.find_first_of("\r\n"), text.size()));
  if (text.empty()) return "it gives no reason";
  // Names of a damaged graph may be any bytes.
  Utf8Stream stream;
  std::string valid = stream.push(text);
  return valid + stream.flush();
}

void OrtLibrary::require(OrtStatus* status, edgelm_code code) const {
  if (status != nullptr) fail(code, "onnxruntime ", version, " failed: ", problem(status));
}

const OrtLibrary& open_onnxruntime(const std::string& path) {
  static std::mutex mutex;
  // By the library's handle: opening it again gives the same. Never destroyed, as the libraries.
  static auto& libraries = *new std::map<void*, OrtLibrary>;
  const std::lock_guard<std::mutex> lock(mutex);
  std::string found;
  void* opened = find(path, &found);
  const auto known = libraries.find(opened);
  if (known != libraries.end()) return known->second;
  return libraries.emplace(opened, describe(opened, found)).first->second;
}

void check_version(const OrtLibrary& library, const Bundle& bundle) {
  std::string wanted = kLeastVersion, subject = concat(bundle.path(), " needs");
  std::vector<int> most;
  for (const Requirement& need : bundle.manifest().requires_) {
    const std::vector<int> numbers = version_numbers(need.version);
    if (need.package != "onnxruntime" || numbers <= most) continue;
    most = numbers;
    wanted = need.version;
    subject = concat(bundle.path(), " has ", need.feature, ", which needs");
  }
  if (version_numbers(library.version) >= version_numbers(wanted)) return;
  fail(EDGELM_UNAVAILABLE, subject, " ONNX Runtime ", wanted, " or newer, here is ", library.version, " (",
       library.path, "): ship a newer library with the app");
}

}  // namespace edgelm::capi
