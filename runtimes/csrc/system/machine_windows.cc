#include "system/machine_windows.h"

#include <vector>

#include "system/windows_text.h"
// After windows.h.
#include <psapi.h>

namespace edgelm::system {

namespace {

int bits(KAFFINITY mask) {
  int count = 0;
  for (; mask != 0; mask &= mask - 1) ++count;
  return count;
}

// The hardware threads of a core that the mask allows; it is of the only group, or 0, which allows all.
int allowed_threads(const PROCESSOR_RELATIONSHIP& core, KAFFINITY allowed) {
  int count = 0;
  for (WORD i = 0; i < core.GroupCount; ++i)
    count += bits(allowed ? core.GroupMask[i].Mask & allowed : core.GroupMask[i].Mask);
  return count;
}

}  // namespace

Cores count_cores(bool allowed) {
  DWORD_PTR mask = 0, all = 0;
  // With several groups of CPUs the process's mask is that of one of them only, or 0: then all count.
  if (!allowed || GetActiveProcessorGroupCount() != 1 || !GetProcessAffinityMask(GetCurrentProcess(), &mask, &all)) {
    mask = 0;
  }
  DWORD size = 0;
  GetLogicalProcessorInformationEx(RelationProcessorCore, nullptr, &size);
  std::vector<char> buffer(size);
  const auto entry = [&](DWORD at) {
    return reinterpret_cast<SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX*>(buffer.data() + at);
  };
  Cores found = {0, 0};
  if (size > 0 && GetLogicalProcessorInformationEx(RelationProcessorCore, entry(0), &size)) {
    for (DWORD at = 0; at < size; at += entry(at)->Size) {
      if (entry(at)->Relationship != RelationProcessorCore) continue;
      const int threads = allowed_threads(entry(at)->Processor, mask);
      found.logical += threads;
      found.physical += threads > 0;
    }
  }
  if (found.logical == 0) {
    found.logical = mask ? bits(mask) : int(GetActiveProcessorCount(ALL_PROCESSOR_GROUPS));
    found.physical = 0;
  }
  return found;
}

MemoryBytes memory_bytes() {
  MEMORYSTATUSEX status = {};
  status.dwLength = sizeof status;
  if (!GlobalMemoryStatusEx(&status)) return {0, 0};
  return {std::int64_t(status.ullTotalPhys), std::int64_t(status.ullAvailPhys)};
}

std::int64_t peak_memory() {
  PROCESS_MEMORY_COUNTERS counters = {};
  if (!K32GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters)) return 0;
  return std::int64_t(counters.PeakWorkingSetSize);
}

std::string cpu_model() {
  wchar_t name[256];
  DWORD size = sizeof name;
  const LSTATUS status = RegGetValueW(HKEY_LOCAL_MACHINE, L"HARDWARE\\DESCRIPTION\\System\\CentralProcessor\\0",
                                      L"ProcessorNameString", RRF_RT_REG_SZ, nullptr, name, &size);
  return status == ERROR_SUCCESS ? to_utf8(name) : "";
}

std::string cpu_architecture() {
  SYSTEM_INFO info = {};
  GetNativeSystemInfo(&info);
  switch (info.wProcessorArchitecture) {
    case PROCESSOR_ARCHITECTURE_AMD64: return "AMD64";
    case PROCESSOR_ARCHITECTURE_ARM64: return "ARM64";
    default: return "";
  }
}

// GetVersionEx names the version that the program was made for; RtlGetVersion, which no header declares, the real one.
std::string windows_version() {
  RTL_OSVERSIONINFOW version = {};
  version.dwOSVersionInfoSize = sizeof version;
  const HMODULE library = GetModuleHandleW(L"ntdll.dll");
  using Get = LONG(WINAPI*)(RTL_OSVERSIONINFOW*);
  const auto get = library ? reinterpret_cast<Get>(reinterpret_cast<void*>(GetProcAddress(library, "RtlGetVersion")))
                           : nullptr;
  if (get == nullptr || get(&version) != 0) return "Windows";
  return "Windows " + std::to_string(version.dwMajorVersion) + "." + std::to_string(version.dwMinorVersion) + "." +
         std::to_string(version.dwBuildNumber);
}

std::string cpu_features() {
  // The numbers of winnt.h, of which older headers lack some.
  const struct {
    DWORD number;
    const char* name;
  } features[] = {{38, "sse4_2"}, {39, "avx"}, {40, "avx2"}, {41, "avx512f"}, {19, "asimd"}, {43, "asimddp"}};
  std::string found;
  for (const auto& feature : features) {
    if (IsProcessorFeaturePresent(feature.number)) found += std::string(feature.name) + " ";
  }
  return found;
}

}  // namespace edgelm::system
