// Numbers in texts, as Python's format() writes them in every locale.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace edgelm::capi {

std::string general(double value, int digits = 6);     // "{:.3g}"
std::string general_signed(double value, int digits);  // "{:+.3g}"
std::string grouped(std::int64_t value);               // "{:,}": "50,304"
// Thousands separators, and `digits` decimals below a thousand: edgelm.sizes.format_number.
std::string format_number(double value, int digits);
// A string as Python's repr writes it, but for unusual characters beyond ASCII.
std::string python_quoted(std::string_view text);

}  // namespace edgelm::capi
