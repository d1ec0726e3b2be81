#include "capi/parity/device/machine.h"

#include <algorithm>
#include <cctype>
#include <ctime>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>

#if defined(_WIN32)
#include "system/machine_windows.h"
#else
#include <sys/resource.h>
#include <sys/utsname.h>
#endif
#if defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "arm_cores_json.h"
#include "capi/runtime/cpu_cores.h"

namespace edgelm::capi {
namespace {

// The instruction sets that the choice of kernels depends on.
constexpr const char* kFeatures[] = {"sse4_2",   "avx",      "fma",      "f16c",        "avx2",
                                     "avx_vnni", "avx512f",  "avx512bw", "avx512_vnni", "avx512_bf16",
                                     "amx_tile", "amx_int8", "amx_bf16", "asimd",       "asimdhp",
                                     "asimddp",  "i8mm",     "bf16",     "sve",         "sve2"};

std::string trimmed(const std::string& text) {
  const char* space = " \t\r\n";
  const std::size_t first = text.find_first_not_of(space);
  return first == text.npos ? "" : text.substr(first, text.find_last_not_of(space) - first + 1);
}

std::string read_text(const std::string& path) {
  std::ifstream stream(path);
  std::ostringstream text;
  text << stream.rdbuf();
  return trimmed(text.str());
}

// The value of the first line "KEY : VALUE" with one of the keys.
[[maybe_unused]] std::string field(const std::string& text, const std::set<std::string>& keys) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t colon = line.find(':');
    if (colon != line.npos && keys.count(trimmed(line.substr(0, colon)))) return trimmed(line.substr(colon + 1));
  }
  return "";
}

[[maybe_unused]] std::optional<std::int64_t> whole(const std::string& text) {
  if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != text.npos) return {};
  return std::stoll(text);
}

#if defined(__APPLE__)
std::string sysctl_text(const char* name) {
  char text[4096];
  std::size_t size = sizeof(text);
  return sysctlbyname(name, text, &size, nullptr, 0) == 0 ? trimmed(std::string(text)) : "";
}
#endif

#if !defined(__APPLE__) && !defined(_WIN32)
// The kinds of cores that an Arm machine's /proc/cpuinfo lists by number, since it has no names; empty elsewhere.
std::string arm_cores(const std::string& text) {
  struct Kind {
    std::string implementer, part;
    int count;
  };
  std::vector<Kind> kinds;
  std::istringstream lines(text);
  std::string implementer;
  for (std::string line; std::getline(lines, line);) {
    if (const std::string found = field(line, {"CPU implementer"}); !found.empty()) implementer = found;
    const std::string part = field(line, {"CPU part"});
    if (part.empty() || implementer.empty()) continue;
    const auto known = std::find_if(kinds.begin(), kinds.end(), [&](const Kind& kind) {
      return kind.implementer == implementer && kind.part == part;
    });
    if (known == kinds.end()) {
      kinds.push_back({implementer, part, 1});
    } else {
      ++known->count;
    }
  }
  if (kinds.empty()) return "";
  const Json table = Json::parse(kArmCoresJson, "arm_cores.json", EDGELM_INTERNAL);
  std::string names;
  for (const Kind& kind : kinds) {
    std::string name = concat("CPU implementer ", kind.implementer), part = concat("part ", kind.part);
    if (const Json* designer = table.find(kind.implementer)) {
      name = designer->find("name")->string();
      if (const Json* known = designer->find("parts")->find(kind.part)) part = known->string();
    }
    const std::string count = kinds.size() == 1 ? "" : concat(kind.count, " x ");
    names += concat(names.empty() ? "" : ", ", count, name, " ", part);
  }
  return names;
}
#endif

std::string cpu_name(const std::string& architecture) {
#if defined(__APPLE__)
  const std::string name = sysctl_text("machdep.cpu.brand_string");
#elif defined(_WIN32)
  const std::string name = trimmed(system::cpu_model());
#else
  const std::string text = read_text("/proc/cpuinfo"), cores = arm_cores(text);
  std::string name = field(text, {"model name", "Model", "Hardware", "cpu model"});
  if (name.empty()) {
    name = read_text("/proc/device-tree/model");
    name = name.substr(0, name.find('\0'));
  }
  if (!name.empty() && !cores.empty()) return concat(name, " (", cores, ")");
  if (name.empty()) name = cores;
#endif
  return name.empty() ? architecture : name;
}

Json instruction_sets(const std::string& architecture) {
#if defined(__APPLE__)
  std::string text = sysctl_text("machdep.cpu.features") + " " + sysctl_text("machdep.cpu.leaf7_features");
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return char(std::tolower(c)); });
  if (architecture == "arm64") text += " asimd";
#elif defined(_WIN32)
  (void)architecture;
  const std::string text = system::cpu_features();
#else
  (void)architecture;
  const std::string text = field(read_text("/proc/cpuinfo"), {"flags", "Features"});
#endif
  std::set<std::string> flags;
  std::istringstream words(text);
  for (std::string word; words >> word;) flags.insert(word);
  Json::Array found;
  for (const char* name : kFeatures) {
    if (flags.count(name)) found.push_back(name);
  }
  return found;
}

// Bytes of a control group's memory usage that the kernel can reclaim: page cache and slabs.
[[maybe_unused]] std::int64_t reclaimable(const std::string& folder) {
  std::istringstream lines(read_text(folder + "/memory.stat"));
  std::int64_t plain[3] = {}, totals[3] = {}, value = 0;
  const char* names[3] = {"active_file", "inactive_file", "slab_reclaimable"};
  bool has_total[3] = {};
  for (std::string name; lines >> name >> value;) {
    for (int i = 0; i < 3; ++i) {
      if (name == names[i]) plain[i] = value;
      if (name == concat("total_", names[i])) totals[i] = value, has_total[i] = true;
    }
  }
  std::int64_t sum = 0;
  for (int i = 0; i < 3; ++i) sum += has_total[i] ? totals[i] : plain[i];
  return sum;
}

struct Memory { Json total, available; };

// Within the container's limit.
Memory memory() {
#if defined(__linux__)
  const std::string text = read_text("/proc/meminfo");
  const auto bytes = [&](const char* key) {
    const std::string value = field(text, {key});
    return whole(value.substr(0, value.find(' '))).value_or(0) * 1024;
  };
  std::int64_t total = bytes("MemTotal"), available = bytes("MemAvailable");
  if (!total) return {};
  std::vector<std::string> folders = own_cgroups();
  folders.push_back("/sys/fs/cgroup/memory");
  std::optional<std::int64_t> limit, left;
  for (const std::string& folder : folders) {
    auto most = whole(read_text(folder + "/memory.max")), used = whole(read_text(folder + "/memory.current"));
    if (!most) most = whole(read_text(folder + "/memory.limit_in_bytes"));
    if (!used) used = whole(read_text(folder + "/memory.usage_in_bytes"));
    if (!most || !used) continue;
    limit = std::min(limit.value_or(*most), *most);
    const std::int64_t free = *most - *used + std::min(*used, reclaimable(folder));
    left = std::max<std::int64_t>(0, std::min(left.value_or(free), free));
  }
  if (limit && *limit < total) {
    total = *limit;
    available = std::min(available, *left);
  }
  return {total, available};
#elif defined(__APPLE__)
  std::int64_t total = 0;
  std::size_t size = sizeof(total);
  if (sysctlbyname("hw.memsize", &total, &size, nullptr, 0) == 0) return {total, {}};
  return {};
#elif defined(_WIN32)
  const system::MemoryBytes found = system::memory_bytes();
  if (found.total == 0) return {};
  return {found.total, found.available};
#else
  return {};
#endif
}

}  // namespace

Json describe_machine() {
  std::string architecture, system;
#if defined(_WIN32)
  architecture = system::cpu_architecture();
  system = system::windows_version();
#else
  utsname names = {};
  if (uname(&names) == 0) {
    architecture = names.machine;
    system = concat(names.sysname, " ", names.release);
  }
#endif
  const int logical = machine_logical_cores(), physical = machine_physical_cores();
  Memory bytes = memory();
  return Json::Object{{"cpu", cpu_name(architecture)},
                      {"architecture", architecture},
                      {"system", system},
                      {"logical_cores", logical},
                      {"physical_cores", physical ? physical : logical},
                      {"allowed_cores", allowed_cores()},
                      {"memory_total", std::move(bytes.total)},
                      {"memory_available", std::move(bytes.available)},
                      {"instruction_sets", instruction_sets(architecture)}};
}

std::optional<std::int64_t> resident_peak() {
#if defined(__linux__)
  // getrusage would count what the process was before exec.
  const std::string peak = field(read_text("/proc/self/status"), {"VmHWM"});
  const auto kilobytes = whole(peak.substr(0, peak.find(' ')));
  if (kilobytes) return *kilobytes * 1024;
  return {};
#elif defined(_WIN32)
  const std::int64_t peak = system::peak_memory();
  if (peak > 0) return peak;
  return {};
#else
  rusage usage = {};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return {};
#if defined(__APPLE__)
  return std::int64_t(usage.ru_maxrss);
#else
  return std::int64_t(usage.ru_maxrss) * 1024;
#endif
#endif
}

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts = {};
#if defined(_WIN32)
  gmtime_s(&parts, &now);
#else
  gmtime_r(&now, &parts);
#endif
  char text[40];
  return std::string(text, std::strftime(text, sizeof(text), "%Y-%m-%dT%H:%M:%S+00:00", &parts));
}

}  // namespace edgelm::capi
