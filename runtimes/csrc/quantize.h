// Quantise and dequantise weight matrices: the C ABI of _edgelm_quant, which quant/native.py loads.
//
// The algorithm is that of quant/primitives.py, and the results are equal bit for bit: one order of summation, no fused
// multiply-adds, on every instruction set.
#ifndef EDGELM_QUANTIZE_H_
#define EDGELM_QUANTIZE_H_

#include <stdint.h>

#if defined(_WIN32)
#define EDGELM_EXPORT __declspec(dllexport)
#else
#define EDGELM_EXPORT __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Raised by one whenever a struct or the meaning of a field changes; the caller must see the number it was written for.
#define EDGELM_QUANT_ABI 3

enum edgelm_quant_status {
  EDGELM_QUANT_OK = 0,
  EDGELM_QUANT_BAD_ARGUMENT = 1,  // see edgelm_quant_check_*: a shape or pointer that no matrix has
  EDGELM_QUANT_NOT_FINITE = 2,    // a weight is NaN or infinite
  EDGELM_QUANT_TOO_LARGE = 3,     // a weight's scale would be past float16's range
  EDGELM_QUANT_NO_SUCH_ISA = 4,   // this processor, or this build, lacks the instruction set asked for
};

enum edgelm_weight_type { EDGELM_FLOAT32 = 0, EDGELM_BFLOAT16 = 1 };

enum edgelm_isa {
  EDGELM_ISA_AUTO = 0,      // the widest that the processor has
  EDGELM_ISA_SCALAR = 1,    // the plain reference
  EDGELM_ISA_BASELINE = 2,  // what the compiler assumes of every processor of this kind: SSE2, or NEON
  EDGELM_ISA_AVX2 = 3,
  EDGELM_ISA_AVX512 = 4,
};

// A matrix [rows, columns] and where its quantised form lies. w = (code - zero) * scale.
struct edgelm_quant_matrix {
  int64_t rows, columns;
  int64_t group;  // values per scale; divides columns
  int32_t bits;   // 3 to 6, or 8; codes lie one after the other from the lowest bit up, and each group fills its bytes
  int32_t symmetric;
  uint8_t* codes;    // [rows, columns * bits / 8]
  uint16_t* scales;  // float16 [rows, columns / group]
  uint8_t* zeros;    // [rows, columns / group]; null where symmetric: the zero point is 2^(bits - 1)
  int32_t threads;   // how many to use, at least 1
  int32_t isa;       // edgelm_isa
};

struct edgelm_quantize_arguments {
  struct edgelm_quant_matrix matrix;
  const void* weights;  // [rows, columns], `row_stride` elements from row to row
  int64_t row_stride;
  const float* targets;  // trial scales, see primitives.search_targets
  int32_t target_count;
  int32_t weight_type;  // edgelm_weight_type
  int64_t bad_index;    // out: row * columns + column of the first weight refused, else -1
};

struct edgelm_dequantize_arguments {
  struct edgelm_quant_matrix matrix;
  float* values;  // [rows, columns], `row_stride` elements from row to row
  int64_t row_stride;
};

EDGELM_EXPORT int32_t edgelm_quant_abi(void);
// Whether `isa` can be used here.
EDGELM_EXPORT int32_t edgelm_quant_has_isa(int32_t isa);
EDGELM_EXPORT int32_t edgelm_quantize(struct edgelm_quantize_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_dequantize(const struct edgelm_dequantize_arguments* arguments);

#ifdef __cplusplus
}
#endif

#endif  // EDGELM_QUANTIZE_H_
