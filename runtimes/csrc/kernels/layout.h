// The on-disk layout of packed matrices for the CPU. All kernels read it straight from the mapped file.
//
// A matrix of N rows (outputs) and K columns (inputs) is divided into tiles of 32 rows, and each tile along K into
// groups. There is one record per group; all records of a tile follow one another, and so do all tiles. A matmul with
// one row of activations reads the file from front to back.
//
//   record  [scales: 32 x float16 | float32, or none] [zero points: 32 x uint8, then 32 bytes unused, or none] [codes]
//
// Two groups of 16 share a record: the scales of the first, those of the second, the zero points of the
// first, those of the second, then the codes of all 32 columns.
//
// N and K may have any size. If K is not a multiple of the group, the last record is padded: its codes beyond K stand
// for zero (and no kernel uses them). A group is at most K rounded up to 32.
//
// `n` is a row within its tile, `k` a column within a block of 32; a group holds group / 32 such blocks. The codes of
// four neighbouring columns of one row are stored together, since every instruction set's dot product takes four int8:
//
//   int8   1024 bytes  byte 128 q + 4 n + j       holds column 4 q + j                              (q 0..7, j 0..3)
//   int4    512 bytes  byte 128 p + 4 n + j       holds 8 p + j low, 8 p + 4 + j high               (p 0..3)
//   int3    256 bytes  byte 128 h + 4 n + j       holds the low two bits of 16 h + 4 i + j at bit 2 i (h 0..1, i 0..3)
//         + 128 bytes  byte       4 n + j         holds the third bit of 4 i + j at bit i           (i 0..7)
//   int5    640 bytes  the low nibbles as int4 lays them, then the fifth bits as int3 lays its third
//   int6    768 bytes  the low nibbles as int4 lays them, then the high two bits as int3 lays its low two
//   int8 in split nibbles: the high nibbles as int4 lays its codes, with scales, for the whole matrix; then, from
//                      `low_offset` on, the low nibbles of all blocks, 512 bytes each. Reading the high nibbles alone
//                      (half the bytes) gives a first approximation
//   fp8, float16, bfloat16, float32    element 32 k + n, for all columns of the group (any number of columns)
//
// w = (code - zero) * scale, zero = 4, 8, 16, 32 or 128 (the middle code) if no zero points are stored. Rows that pad
// the last tile have scales (or values) of 0. A SwiGLU matrix holds gate and up in alternating tiles: tile 2 i is rows
// 32 i of gate. All numbers are little-endian. Nothing here allocates or throws.
#ifndef EDGELM_KERNELS_LAYOUT_H_
#define EDGELM_KERNELS_LAYOUT_H_

#include <cstddef>
#include <cstdint>

// Members are forced inline: an out-of-line copy would be compiled for the instruction set that is linked first.
#define EDGELM_INLINE inline __attribute__((always_inline))

namespace edgelm {

constexpr int64_t kTile = 32;   // rows of a tile
constexpr int64_t kBlock = 32;  // columns that share an activation scale
constexpr int64_t kHalf = 16;   // groups of this many columns share a record in pairs

enum class Kind : uint8_t {
  kInt3 = 3,
  kInt4 = 4,
  kInt5 = 5,
  kInt6 = 6,
  kInt8 = 8,
  kInt8Split = 9,
  kFp8E4M3 = 16,
  kFloat16 = 17,
  kBFloat16 = 18,
  kFloat32 = 19,
};

enum class ScaleKind : uint8_t { kNone = 0, kFloat16 = 1, kFloat32 = 2 };

// The first 64 bytes of a packed matrix. Its records follow directly.
struct MatrixHeader {
  char magic[4];  // "EDLM"
  uint8_t version;
  Kind kind;
  ScaleKind scale;
  uint8_t flags;  // kHasZeros | kSwiglu
  int64_t rows;
  int64_t columns;
  int64_t group;       // columns per scale; for one scale per row: `columns`, rounded up to 32 for integers
  int64_t bytes;       // of the whole packed matrix, header included
  int64_t low_offset;  // kInt8Split: offset of the low nibbles from the header's start; otherwise 0
  int64_t reserved[2];
};
static_assert(sizeof(MatrixHeader) == 64, "the header is one cache line");

constexpr uint8_t kLayoutVersion = 1;
constexpr int64_t kAlignment = 64;  // of the matrices of packed experts, in bytes
constexpr uint8_t kHasZeros = 1;
constexpr uint8_t kSwiglu = 2;

// The first 64 bytes of the packed experts of a layer. Then `experts` pairs of int64: the offsets of gate+up and of
// down from this header's start, multiples of 64.
struct ExpertsHeader {
  char magic[4];  // "EDLX"
  uint8_t version;
  uint8_t unused[3];
  int64_t experts;
  int64_t bytes;  // of all experts, this header included
  int64_t reserved[5];
};
static_assert(sizeof(ExpertsHeader) == 64, "the header is one cache line");

// A packed matrix whose header was checked. `data` is its first record.
struct Matrix {
  Kind kind = Kind::kFloat32;
  ScaleKind scale = ScaleKind::kNone;
  bool zeros = false;
  bool swiglu = false;
  int64_t rows = 0, columns = 0, group = 0;
  int64_t tiles = 0;         // tiles of 32 rows; a SwiGLU matrix has an even number
  int64_t span = 0;          // columns of a record: a group, or two of 16
  int64_t records = 0;       // of a tile
  int64_t head_bytes = 0;    // of a record before its codes
  int64_t record_bytes = 0;  // of a record
  int64_t tile_bytes = 0;    // of a tile's records
  const uint8_t* data = nullptr;
  const uint8_t* low = nullptr;  // kInt8Split: low nibbles, tile by tile, block by block

  EDGELM_INLINE bool integer() const { return kind < Kind::kFp8E4M3; }
  // Whether a record holds two groups of 16.
  EDGELM_INLINE bool halves() const { return span != group; }
  // Bytes of a tile's low nibbles.
  EDGELM_INLINE int64_t low_bytes() const { return records * (span / kBlock) * 512; }
  // Bytes of a group's scales in a record.
  EDGELM_INLINE int64_t scale_bytes() const {
    return scale == ScaleKind::kFloat16 ? 2 * kTile : scale == ScaleKind::kFloat32 ? 4 * kTile : 0;
  }
  // Columns of the matmul's result: half the rows for SwiGLU.
  EDGELM_INLINE int64_t outputs() const { return swiglu ? rows / 2 : rows; }
  // Units of work: tiles, or pairs of them for SwiGLU.
  EDGELM_INLINE int64_t units() const { return swiglu ? tiles / 2 : tiles; }
};

// Bytes of `columns` columns of one tile's codes (high nibbles only for kInt8Split).
int64_t CodeBytes(Kind kind, int64_t columns);

// Read and check a header at `blob`, which has `size` bytes. Returns nullptr and fills `matrix`, or returns an error
// message. Scales and floats are read in place, so `blob` must be aligned to 4.
const char* ParseMatrix(const uint8_t* blob, int64_t size, Matrix* matrix);

// Write one row of the matrix as float32 [columns] (embedding lookup). `row` counts as in the checkpoint; for SwiGLU
// the gate's rows come first.
void DequantizeRow(const Matrix& matrix, int64_t row, float* out);

// float16 bits to float32, exact.
float HalfToFloat32(uint16_t bits);
// float32 to float16 bits, to nearest, ties to even.
uint16_t Float32ToHalf(float value);
// FP8 E4M3 (OCP 8-bit floating point, revision 1.0: no infinities, 0x7F and 0xFF are NaN) to float32, exact.
float Fp8ToFloat32(uint8_t bits);

}  // namespace edgelm

#endif  // EDGELM_KERNELS_LAYOUT_H_
