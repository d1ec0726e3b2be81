#include "cuda/host/fields.h"

#include <cerrno>
#include <cstdlib>
#include <locale>
#include <sstream>

namespace edgelm::gpu {

namespace {

Error wrong(const std::string& name, const std::string& value, const char* expected) {
  return Error(name + " is " + value.substr(0, 60) + ", expected " + expected);
}

}  // namespace

Fields::Fields(std::string_view text) {
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    if (line.empty()) continue;
    const std::size_t equals = line.find('=');
    if (equals == std::string_view::npos) throw Error("a field without a value: " + std::string(line.substr(0, 60)));
    values_.insert_or_assign(std::string(line.substr(0, equals)), std::string(line.substr(equals + 1)));
  }
}

const std::string& Fields::text(const std::string& name) const {
  const auto found = values_.find(name);
  if (found == values_.end()) throw Error(name + " is missing");
  return found->second;
}

i64 Fields::integer(const std::string& name) const {
  const std::string& value = text(name);
  char* end = nullptr;
  errno = 0;
  const i64 number = std::strtoll(value.c_str(), &end, 10);
  if (value.empty() || *end || errno) throw wrong(name, value, "a whole number");
  return number;
}

i64 Fields::size(const std::string& name) const {
  const i64 number = integer(name);
  if (number < 0 || number > kMostSize) throw wrong(name, text(name), "0 to 2147483647");
  return number;
}

u64 Fields::address(const std::string& name) const {
  if (!has(name)) return 0;
  const std::string& value = text(name);
  char* end = nullptr;
  errno = 0;
  const u64 number = std::strtoull(value.c_str(), &end, 10);
  if (value.empty() || value[0] < '0' || value[0] > '9' || *end || errno) throw wrong(name, value, "an address");
  return number;
}

double Fields::number(const std::string& name) const {
  // Not strtod, which reads the decimal separator of the application's locale.
  std::istringstream stream(text(name));
  stream.imbue(std::locale::classic());
  double number = 0;
  if (!(stream >> std::noskipws >> number) || stream.peek() != EOF) throw wrong(name, text(name), "a number");
  return number;
}

std::string Fields::text(const std::string& name, const std::string& otherwise) const {
  return has(name) ? text(name) : otherwise;
}
i64 Fields::integer(const std::string& name, i64 otherwise) const { return has(name) ? integer(name) : otherwise; }
double Fields::number(const std::string& name, double otherwise) const { return has(name) ? number(name) : otherwise; }

}  // namespace edgelm::gpu
