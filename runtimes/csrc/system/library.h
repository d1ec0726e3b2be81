// Dynamic libraries that are opened at run time, and environment variables. Paths and values are UTF-8 on every system.
#ifndef EDGELM_SYSTEM_LIBRARY_H_
#define EDGELM_SYSTEM_LIBRARY_H_

#include <optional>
#include <string>

namespace edgelm::system {

// Open a library; nullptr, and the reason in `why`, on failure. The system searches for a name without a folder. The
// library stays open.
void* open_library(const std::string& path, std::string* why);

// A function of an open library; nullptr if it has none of this name.
void* symbol(void* library, const char* name);

// The loaded library, or the program, that `address` belongs to; nullptr if there is none.
void* library_of(const void* address);

// The file of the library or program that `address` belongs to; empty if unknown.
std::string file_of(const void* address);

// An environment variable; nothing if it is not set.
std::optional<std::string> variable(const char* name);

// Set an environment variable; nothing removes it. No other thread may use the environment meanwhile.
void set_variable(const char* name, const std::optional<std::string>& value);

}  // namespace edgelm::system

#endif  // EDGELM_SYSTEM_LIBRARY_H_
