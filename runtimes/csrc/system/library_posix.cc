#include "system/library.h"

#include <dlfcn.h>

#include <cstdlib>

namespace edgelm::system {

void* open_library(const std::string& path, std::string* why) {
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  const char* said = library == nullptr ? dlerror() : nullptr;
  if (library == nullptr) *why = said == nullptr ? "no reason given" : said;
  return library;
}

void* symbol(void* library, const char* name) { return dlsym(library, name); }

void* library_of(const void* address) {
  Dl_info info;
  if (address == nullptr || dladdr(address, &info) == 0 || info.dli_fname == nullptr) return nullptr;
  void* library = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  if (library != nullptr) dlclose(library);  // it is loaded anyway
  return library;
}

std::string file_of(const void* address) {
  Dl_info info;
  return dladdr(address, &info) == 0 || info.dli_fname == nullptr ? "" : info.dli_fname;
}

std::optional<std::string> variable(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? std::nullopt : std::optional<std::string>(value);
}

void set_variable(const char* name, const std::optional<std::string>& value) {
  if (value) setenv(name, value->c_str(), 1);
  else unsetenv(name);
}

}  // namespace edgelm::system
