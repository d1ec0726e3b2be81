#include "capi/runtime/cpu_cores.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <set>
#include <sstream>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sched.h>
#include <unistd.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(_WIN32)
#include "system/machine_windows.h"
#endif

#include "capi/common/error.h"

namespace edgelm::capi {
namespace {

[[maybe_unused]] int hardware_threads() { return std::max(1, int(std::thread::hardware_concurrency())); }

#if defined(__linux__)

std::string read_text(const std::string& path) {
  std::ifstream stream(path);
  std::ostringstream text;
  text << stream.rdbuf();
  std::string found = text.str();
  while (!found.empty() && std::isspace(static_cast<unsigned char>(found.back()))) found.pop_back();
  return found;
}

std::vector<int> allowed_logical() {
  // The kernel refuses a set that is smaller than its own.
  for (int most = 1024; most <= 1 << 20; most *= 2) {
    cpu_set_t* cpus = CPU_ALLOC(most);
    if (cpus == nullptr) break;
    const size_t size = CPU_ALLOC_SIZE(most);
    std::vector<int> found;
    if (sched_getaffinity(0, size, cpus) == 0) {
      for (int cpu = 0; cpu < most; ++cpu) {
        if (CPU_ISSET_S(cpu, size, cpus)) found.push_back(cpu);
      }
    }
    CPU_FREE(cpus);
    if (!found.empty()) return found;
  }
  std::vector<int> all(hardware_threads());
  for (size_t i = 0; i < all.size(); ++i) all[i] = int(i);
  return all;
}

// 0 if the system does not say.
int physical_cores(const std::vector<int>& logical) {
  std::set<std::string> cores;
  for (const int cpu : logical) {
    // Core ids repeat over dies and clusters; the list of sibling threads identifies a core.
    const std::string topology = concat("/sys/devices/system/cpu/cpu", cpu, "/topology/");
    std::string siblings = read_text(topology + "core_cpus_list");
    if (siblings.empty()) siblings = read_text(topology + "thread_siblings_list");
    if (siblings.empty()) return 0;
    cores.insert(siblings);
  }
  return int(cores.size());
}

}  // namespace

std::vector<std::string> own_cgroups() {
  const std::string root = "/sys/fs/cgroup";
  std::vector<std::string> folders = {root, root + "/cpu"};
  std::istringstream lines(read_text("/proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    std::vector<std::string> bases = {root};
    std::istringstream names(controllers);
    for (std::string name; std::getline(names, name, ',');) bases.push_back(concat(root, "/", name));
    for (const std::string& base : bases) {
      for (std::string inner = path; inner.size() > 1; inner.resize(inner.rfind('/'))) {
        folders.push_back(base + inner);
        if (inner.find('/') == std::string::npos) break;
      }
    }
  }
  return folders;
}

namespace {

// The container's CPU quota in cores; infinity if there is no limit.
double cgroup_quota() {
  double least = INFINITY;
  for (const std::string& folder : own_cgroups()) {
    std::istringstream fields(read_text(folder + "/cpu.max"));
    double quota = 0, period = 0;  // the quota is "max" without a limit
    if (fields >> quota >> period && period > 0) least = std::min(least, quota / period);
    std::istringstream quota_text(read_text(folder + "/cpu.cfs_quota_us"));
    std::istringstream period_text(read_text(folder + "/cpu.cfs_period_us"));
    if (quota_text >> quota && period_text >> period && quota >= 0 && period > 0) {
      least = std::min(least, quota / period);
    }
  }
  return least;
}

int logical_cores() { return int(allowed_logical().size()); }

int physical_cores() { return physical_cores(allowed_logical()); }

#else

}  // namespace

std::vector<std::string> own_cgroups() { return {}; }

namespace {

double cgroup_quota() { return INFINITY; }

#if defined(_WIN32)
int logical_cores() { return system::count_cores(true).logical; }

int physical_cores() { return system::count_cores(true).physical; }
#else
int logical_cores() { return hardware_threads(); }

int physical_cores() {
#if defined(__APPLE__)
  int32_t count = 0;
  size_t size = sizeof count;
  if (sysctlbyname("hw.physicalcpu", &count, &size, nullptr, 0) == 0 && count > 0) return count;
#endif
  return 0;
}
#endif

#endif

}  // namespace

int allowed_cores() {
  int cores = physical_cores();
  if (cores == 0) cores = logical_cores();
  const double quota = cgroup_quota();
  // Round down, but to 1 at least: with a quota of 2.5 cores, 2 threads are faster than 3 that are throttled.
  if (quota < cores) cores = std::max(1, int(quota));
  return std::max(1, cores);
}

int machine_logical_cores() {
#if defined(__linux__)
  return std::max(1, int(sysconf(_SC_NPROCESSORS_ONLN)));
#elif defined(_WIN32)
  return std::max(1, system::count_cores(false).logical);
#else
  return hardware_threads();
#endif
}

int machine_physical_cores() {
#if defined(__linux__)
  std::vector<int> all(static_cast<size_t>(machine_logical_cores()));
  for (size_t i = 0; i < all.size(); ++i) all[i] = int(i);
  return physical_cores(all);
#elif defined(_WIN32)
  return system::count_cores(false).physical;
#else
  return physical_cores();
#endif
}

std::string thread_problem(int threads) {
  const double quota = cgroup_quota();
  int most = logical_cores();
  if (quota < most) most = std::max(1, int(std::ceil(quota)));
  if (threads <= most) return "";
  return concat(threads, " threads are more than the ", most, most == 1 ? " CPU" : " CPUs",
                " that this process may use: give at most ", most, ", or leave it out");
}

}  // namespace edgelm::capi
