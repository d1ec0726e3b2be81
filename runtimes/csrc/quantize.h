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
#define EDGELM_QUANT_ABI 4

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

// Most columns of a block that is rounded with feedback.
#define EDGELM_FEEDBACK_COLUMNS 128

enum edgelm_numbers { EDGELM_INTEGERS = 0, EDGELM_E4M3 = 1, EDGELM_E5M2 = 2 };

// Some columns of a matrix, transposed: arrays are [columns, rows], `stride` floats from column to column. Columns are
// rounded in turn, each after what the errors of those before it have added to its target:
//
//   round:   value = nearest(target / scale),                                 error = weight - value * scale,
//            target[k] += coupling[j, k] * error            for each k > j
//   recode:  value = nearest((weight - error + target * (1 / coupling[j, j])) / scale), error as above,
//            target[k] += coupling[j, k] * (error - error before)
//
// See quant/methods/gptq.py for what coupling and target are.
struct edgelm_feedback_arguments {
  int64_t rows, columns;  // at most EDGELM_FEEDBACK_COLUMNS columns
  int64_t stride;
  const float* weights;
  const float* target;    // what to round (round), or the pull of all errors on each value (recode)
  float* values;          // out
  float* error;           // out; recode: in as well
  const float* coupling;  // [columns, columns], `coupling_stride` floats from row to row; only j <= k is read
  int64_t coupling_stride;
  const float* scale;    // [rows]
  const float* inverse;  // [rows], 1 / scale, or 0
  const float* lowest;   // [rows], integers: the least value; the largest is `range` above it
  float range;
  int32_t numbers;  // edgelm_numbers
  int32_t recode;
  int32_t threads;
  int32_t isa;
};

// The best scale for a group of columns, transposed as above: for each row the trial that leaves the least sum of
// importance * (weight - value * scale)^2, after its scale was fitted to the values that it gives (least squares).
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
// Whether `isa` can be used here.
EDGELM_EXPORT int32_t edgelm_quant_has_isa(int32_t isa);
EDGELM_EXPORT int32_t edgelm_quantize(struct edgelm_quantize_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_dequantize(const struct edgelm_dequantize_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_fit(const struct edgelm_fit_arguments* arguments);
EDGELM_EXPORT int32_t edgelm_feedback(const struct edgelm_feedback_arguments* arguments);

#ifdef __cplusplus
}
#endif

#endif  // EDGELM_QUANTIZE_H_
