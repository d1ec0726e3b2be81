#include "cpu.h"

#include <cstdlib>
#include <cstring>

#if defined(EDGELM_X86)
#include <cpuid.h>
#elif defined(EDGELM_ARM64) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(EDGELM_ARM64)
#include <sys/auxv.h>
#endif

namespace edgelm {
namespace {

// A CPU feature that a table needs, by its name in /proc/cpuinfo.
struct Feature {
  const char* name;
  bool present;
};

std::string Missing(const std::vector<Feature>& needed) {
  std::string missing;
  for (const Feature& feature : needed) {
    if (!feature.present) missing += (missing.empty() ? "this CPU lacks " : ", ") + std::string(feature.name);
  }
  return missing;
}

#if defined(EDGELM_X86)

struct Registers { unsigned a = 0, b = 0, c = 0, d = 0; };

Registers Cpuid(unsigned leaf, unsigned subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d) == 0) return {};
  return r;
}

constexpr bool Bit(uint64_t word, int bit) { return (word >> bit & 1) != 0; }

// XCR0: the registers that the operating system saves when it switches threads.
uint64_t SavedState() {
  if (!Bit(Cpuid(1, 0).c, 27)) return 0;  // OSXSAVE: without it XGETBV must not be executed
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}

std::vector<InstructionSet> Detect() {
  const Registers one = Cpuid(1, 0), seven = Cpuid(7, 0), more = seven.a >= 1 ? Cpuid(7, 1) : Registers{};
  const uint64_t saved = SavedState();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xE6) == 0xE6;
  const std::vector<Feature> avx2 = {
      {"avx2", Bit(one.c, 28) && Bit(seven.b, 5)}, {"fma", Bit(one.c, 12)}, {"f16c", Bit(one.c, 29)}};
  std::vector<Feature> avx2_vnni = avx2, avx512 = avx2;
  avx2_vnni.push_back({"avx_vnni", Bit(more.a, 4)});
  avx512.insert(avx512.end(), {{"avx512f", Bit(seven.b, 16)},
                               {"avx512dq", Bit(seven.b, 17)},
                               {"avx512bw", Bit(seven.b, 30)},
                               {"avx512vl", Bit(seven.b, 31)},
                               {"avx512_vnni", Bit(seven.c, 11)}});
  const auto with_state = [](const std::vector<Feature>& needed, bool state) {
    const std::string missing = Missing(needed);
    return !missing.empty() || state ? missing : std::string("the operating system does not save its registers");
  };
  return {{&kAvx512VnniKernels, with_state(avx512, zmm)},
          {&kAvx2VnniKernels, with_state(avx2_vnni, ymm)},
          {&kAvx2Kernels, with_state(avx2, ymm)},
          {&kScalarKernels, ""}};
}

#elif defined(EDGELM_ARM64)

std::vector<InstructionSet> Detect() {
#if defined(__APPLE__)
  const auto has = [](const char* key) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value != 0;
  };
  const bool fp16 = has("hw.optional.arm.FEAT_FP16"), dot = has("hw.optional.arm.FEAT_DotProd"),
             i8mm = has("hw.optional.arm.FEAT_I8MM");
#else
  // Bits of Linux's AT_HWCAP and AT_HWCAP2 (asm/hwcap.h), as numbers, since older headers lack the last name.
  const unsigned long caps = getauxval(AT_HWCAP), caps2 = getauxval(AT_HWCAP2);
  const bool fp16 = (caps >> 9 & caps >> 10 & 1) != 0, dot = (caps >> 20 & 1) != 0, i8mm = (caps2 >> 13 & 1) != 0;
#endif
  const std::vector<Feature> with_dot = {{"asimdhp", fp16}, {"asimddp", dot}};
  std::vector<Feature> with_i8mm = with_dot;
  with_i8mm.push_back({"i8mm", i8mm});
  return {{&kNeonI8mmKernels, Missing(with_i8mm)}, {&kNeonDotKernels, Missing(with_dot)}, {&kScalarKernels, ""}};
}

#else

std::vector<InstructionSet> Detect() { return {{&kScalarKernels, ""}}; }

#endif

}  // namespace

const std::vector<InstructionSet>& InstructionSets() {
  static const std::vector<InstructionSet> sets = Detect();
  return sets;
}

const Kernels* ChooseKernels(std::string* why) {
  const char* named = std::getenv("EDGELM_ISA");
  const bool forced = named != nullptr && *named != '\0';
  std::string valid, problem = "there is no such instruction set";
  const InstructionSet* before = nullptr;
  for (const InstructionSet& set : InstructionSets()) {
    if (forced && std::strcmp(named, set.kernels->name) == 0) {
      *why = "EDGELM_ISA asks for it";
      if (set.available()) return set.kernels;
      problem = set.missing;
    } else if (!forced && set.available()) {
      *why = "the best that this CPU has";
      // The set before is the one that asks for least of those with vectors.
      if (before != nullptr && set.kernels == &kScalarKernels) {
        *why = "works, but slowly: " + before->missing + " for " + before->kernels->name +
               "; a bundle with portable operators may be faster";
      }
      return set.kernels;
    }
    if (set.available()) valid += (valid.empty() ? "" : ", ") + std::string(set.kernels->name);
    before = &set;
  }
  *why = "EDGELM_ISA=" + std::string(named) + ": " + problem + ". Set it to one of " + valid +
         ", or unset it for the best";
  return nullptr;
}

}  // namespace edgelm
