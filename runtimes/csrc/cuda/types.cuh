// Number types of kernels and of their arguments. Also compiled for the host, which fills in the arguments.
#pragma once

// A function of constants: kernels evaluate it while they are compiled, the host when it plans a launch.
#ifdef __CUDACC__
#define EDGELM_CONSTEXPR __host__ __device__ constexpr
#else
#define EDGELM_CONSTEXPR constexpr
#endif

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

// Division by a number that the host knows: x / d = x * factor >> shift for 0 <= x < 2^31, with
// shift = 31 + ceil(log2 d) and factor = ceil(2^shift / d), which has 32 bits. See Hacker's Delight, chapter 10.
struct Divisor { u32 factor, shift; };

}  // namespace edgelm
