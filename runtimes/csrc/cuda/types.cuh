// Number types of kernels and of their arguments. Also compiled for the host, which fills in the arguments.
#pragma once

namespace edgelm {

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

// 16-bit and 8-bit floats: bits only, converted explicitly.
struct bf16 { u16 bits; };
struct f16 { u16 bits; };
struct e4m3 { u8 bits; };  // OCP FP8: 4 bits of exponent, 3 of mantissa, largest 448

}  // namespace edgelm
