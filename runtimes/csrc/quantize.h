// C ABI of _edgelm_quant, which quant/native.py loads: quantise and dequantise weight matrices.
//
// The algorithm is that of quant/primitives.py, with the same results bit for bit on every instruction set: one order
// of summation and no fused multiply-adds.
#ifndef EDGELM_QUANTIZE_H_
#define EDGELM_QUANTIZE_H_

#include <stdint.h>

#include "system/export.h"

#ifdef __cplusplus
extern "C" {
#endif

// Increment this whenever a struct or the meaning of a field changes. The caller checks that it gets its own number.
#define EDGELM_QUANT_ABI 4

enum edgelm_quant_status {
  EDGELM_QUANT_OK = 0,
  EDGELM_QUANT_BAD_ARGUMENT = 1,  // a shape or pointer that no matrix can have
  EDGELM_QUANT_NOT_FINITE = 2,    // a weight is NaN or infinite
  EDGELM_QUANT_TOO_LARGE = 3,     // a weight's scale would exceed float16's range
  EDGELM_QUANT_NO_SUCH_ISA = 4,   // this CPU, or this build, lacks the requested instruction set
};

enum edgelm_weight_type { EDGELM_FLOAT32 = 0, EDGELM_BFLOAT16 = 1 };

enum edgelm_isa {
  EDGELM_ISA_AUTO = 0,      // the widest that the CPU has
  EDGELM_ISA_SCALAR = 1,    // the scalar reference
  EDGELM_ISA_BASELINE = 2,  // what every CPU of the architecture has: SSE2, or NEON
  EDGELM_ISA_AVX2 = 3,
  EDGELM_ISA_AVX512 = 4,
};

// A quantised matrix [rows, columns]: w = (code - zero) * scale.
struct edgelm_quant_matrix {
  int64_t rows, columns;
  int64_t group;  // values per scale; divides columns
  int32_t bits;   // 3 to 6, or 8; codes are packed from the lowest bit up; a group takes whole bytes
  int32_t symmetric;
  uint8_t* codes;    // [rows, columns * bits / 8]
  uint16_t* scales;  // float16 [rows, columns / group]
  uint8_t* zeros;    // [rows, columns / group]; null where symmetric: the zero point is 2^(bits - 1)
  int32_t threads;   // how many to use, at least 1
  int32_t isa;       // edgelm_isa
};

struct edgelm_quantize_arguments {
  struct edgelm_quant_matrix matrix;
  const void* weights;  // [rows, columns], `row_stride` elements per row
  int64_t row_stride;
  const float* targets;  // trial scales, see primitives.search_targets
  int32_t target_count;
  int32_t weight_type;  // edgelm_weight_type
  int64_t bad_index;    // out: row * columns + column of the first bad weight, otherwise -1
};

struct edgelm_dequantize_arguments {
  struct edgelm_quant_matrix matrix;
  float* values;  // [rows, columns], `row_stride` elements per row
  int64_t row_stride;
};

// The largest number of columns of a block for error feedback.
#define EDGELM_FEEDBACK_COLUMNS 128

enum edgelm_numbers { EDGELM_INTEGERS = 0, EDGELM_E4M3 = 1, EDGELM_E5M2 = 2 };

// A block of columns of a matrix, transposed: arrays are [columns, rows], `stride` floats per column. Columns are
// rounded in turn; the error of each is added to the targets of the later ones:
//
//   round:   value = nearest(target / scale),                                 error = weight - value * scale,
//            target[k] += coupling[j, k] * error            for each k > j
//   recode:  value = nearest((weight - error + target * (1 / coupling[j, j])) / scale), error as above,
//            target[k] += coupling[j, k] * (error - error before)
//
// quant/methods/gptq.py defines coupling and target.
struct edgelm_feedback_arguments {
  int64_t rows, columns;  // at most EDGELM_FEEDBACK_COLUMNS columns
  int64_t stride;
  const float* weights;
  const float* target;    // values to round (round), or the sum of all errors' effects on each value (recode)
  float* values;          // out
  float* error;           // out; for recode also in
  const float* coupling;  // [columns, columns], `coupling_stride` floats per row; only j <= k is read
  int64_t coupling_stride;
  const float* scale;    // [rows]
  const float* inverse;  // [rows], 1 / scale, or 0
  const float* lowest;   // [rows], for integers: the smallest value; the largest is lowest + range
  float range;
  int32_t numbers;  // edgelm_numbers
  int32_t recode;
  int32_t threads;
  int32_t isa;
};

// Find the best scale for a group of columns, transposed as above. For each row, take the trial scale with the least
// sum of importance * (weight - value * scale)^2, where each trial's scale is first refitted to its values (least
// squares).
struct edgelm_fit_arguments {
  int64_t rows, columns;
  int64_t stride;
  const float* weights;     // [columns, rows]
  const float* importance;  // [columns]
  const float* trials;      // [trial_count, rows]
  int64_t trial_count;
  const float* lowest;  // [rows], as in edgelm_feedback_arguments
  float* scale;         // out: [rows]
  float range;
  int32_t numbers;  // edgelm_numbers
  int32_t half;     // whether scales are stored as float16
  int32_t threads;
  int32_t isa;
};

EDGELM_EXPORT int32_t edgelm_quant_abi(void);
// Whether this CPU and this build can use `isa`.
EDGELM_EXPORT int32_t edgelm_quant_has_isa(int32_t isa);
EDGELM_EXPORT int32_t edgelm_quantize(struct edgelm_quantize_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_dequantize(const struct edgelm_dequantize_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_fit(const struct edgelm_fit_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_feedback(const struct edgelm_feedback_arguments* arguments);

#ifdef __cplusplus
}
#endif

#endif  // EDGELM_QUANTIZE_H_
