// What Windows says of the machine, as edgelm/system/windows.py asks for it.
#ifndef EDGELM_SYSTEM_MACHINE_WINDOWS_H_
#define EDGELM_SYSTEM_MACHINE_WINDOWS_H_

#include <cstdint>
#include <string>

namespace edgelm::system {

// Hardware threads, and the cores that they belong to (0 if Windows does not say): of the machine, or those that the
// affinity of this process allows.
struct Cores { int logical, physical; };
Cores count_cores(bool allowed);

struct MemoryBytes { std::int64_t total, available; };
MemoryBytes memory_bytes();  // zeros if Windows does not say

std::int64_t peak_memory();  // of this process, resident; 0 if Windows does not say

std::string cpu_model();         // empty if Windows does not say
std::string cpu_architecture();  // AMD64 or ARM64, as Python names them; empty for others
std::string windows_version();   // Windows 10.0.19045

// The instruction sets that Windows names, as Linux writes them, separated by spaces.
std::string cpu_features();

}  // namespace edgelm::system

#endif  // EDGELM_SYSTEM_MACHINE_WINDOWS_H_
