// y = x W^T for many rows (prefill) on tensor cores. A block computes TM rows of a matrix times TN tokens.
//
// Weights are copied to shared memory as they are stored, in tiles of which a lane reads 16 bytes, and become mma
// operands in registers. x is copied in rows of 128 bytes whose 16-byte parts are swizzled for ldmatrix. Both are
// copied with cp.async, several stages ahead. Scales per group multiply the float32 sums of a group; a scale per row
// multiplies at the end. Results go through shared memory, so that stores are whole cache lines.
//
// XF8: x is E4M3 (from convert_rows) and so are the weights; A is then only a type of y.
#pragma once

#include "linear/linear_output.cuh"

// Devices whose mma.sync multiplies E4M3 directly: Ada and consumer Blackwell (SM 89, 120). On Hopper and data-centre
// Blackwell the compiler would convert every operand to float16 for each mma; this kernel converts it once.
#if defined(EDGELM_HAS_FP8) && !(__CUDA_ARCH__ >= 900 && __CUDA_ARCH__ < 1200)
#define EDGELM_FP8_MMA 1
#endif

namespace edgelm {

constexpr int kGemmThreads = 256;
constexpr int kGemmRowBytes = 128;  // of a row of x in a stage

template <class W, bool XF8, int TM, int TN> struct GemmShape {
  static constexpr int step_columns = XF8 ? 32 : 16;          // of one mma
  static constexpr int columns = 4 * step_columns;            // of a stage
  static constexpr int tiles = columns / Format<W>::columns;  // of 16 rows in a stage
  static constexpr int steps_per_tile = 4 / tiles;
  static constexpr int weight_bytes = TM / kTileRows * tiles * kTileBytes;
  // Small tiles are bound by memory: they need many bytes in flight, so they get more stages.
  static constexpr int stages = TN == 64 ? 6 : 3;
  static constexpr int stage_bytes = weight_bytes + TN * kGemmRowBytes;
};

// Tiles are assigned in an order in which 8 tiles of tokens share each tile of weights, so that weights that are read
// again are likely to be in L2.
struct GemmTile { int weights, tokens; };
EDGELM_DEVICE GemmTile gemm_tile() {
  const int number = block_y() * grid_x() + block_x();
  const int panel = number / (8 * grid_x()), inside = number % (8 * grid_x());
  const int height = min_(8, grid_y() - panel * 8);
  return {inside / height, panel * 8 + inside % height};
}

// The rows of a block: slots `first` .. `first` + `rows` - 1 of expert `expert`.
struct GemmRows { int expert, first, rows; };

// Tile number `tile` of TN slots, counted over all experts in order. Every warp searches for it by itself.
template <int TN> EDGELM_DEVICE GemmRows gemm_rows(const LinearArgs& args, int tile) {
  if (args.experts == 0) return {0, tile * TN, min_(TN, args.rows - tile * TN)};
  const int lane = thread_index() % kWarp;
  int before = 0;
  for (int base = 0; base < args.experts; base += kWarp) {
    const int expert = base + lane;
    const int first = args.offsets[min_(expert, args.experts)], end = args.offsets[min_(expert + 1, args.experts)];
    const int own = (end - first + TN - 1) / TN;
    int sum = own;
    for (int delta = 1; delta < kWarp; delta *= 2) {
      const int up = shuffle_up(sum, delta);
      if (lane >= delta) sum += up;
    }
    const int all = shuffle(sum, kWarp - 1);
    if (tile < before + all) {
      const u32 found = ballot(before + sum > tile);
      const int owner = lowest_bit(found);
      const int skipped = (tile - before - shuffle(sum - own, owner)) * TN;
      const int start = shuffle(first, owner) + skipped;
      return {base + owner, start, min_(TN, shuffle(end, owner) - start)};
    }
    before += all;
  }
  return {0, 0, 0};
}

// A scale and a zero point.
template <class W> struct GemmScale {
  float scale;
  int zero;
};

template <class A, class W, bool XF8, bool GROUPED, int TM, int TN, int WARPS_M> struct Gemm {
  using Shape = GemmShape<W, XF8, TM, TN>;
  static constexpr int kWarps = kGemmThreads / kWarp;
  static constexpr int kWarpsN = kWarps / WARPS_M;
  static constexpr int kStrips = TM / kTileRows / WARPS_M;  // blocks of 16 rows of a warp
  static constexpr int kParts = TN / 8 / kWarpsN;           // of 8 tokens of a warp
  static_assert(kParts % 2 == 0, "ldmatrix loads 16 tokens");
  static constexpr int kXCopies = TN * 8 / kGemmThreads;
  static constexpr int kAtOnce = kGemmThreads * 16;  // bytes that all threads copy
  static constexpr int kWeightCopies = (Shape::weight_bytes + kAtOnce - 1) / kAtOnce;
  static constexpr int kBlocksAtOnce = kAtOnce / (Shape::tiles * kTileBytes);
  static constexpr int kPitch = TM + 4;  // floats from one token's results to the next's in shared memory
  static constexpr bool kScaled = Is<W>::scaled;

  const LinearArgs& args;
  const int warp, lane, warp_m, warp_n;
  const GemmTile tile;
  const int block0, blocks, tiles, stages;
  GemmRows rows;
  const u8* x_from[kXCopies];
  u32 x_valid;
  const u8* weights_from;  // of this thread's first copy of the first stage
  int weights_block, weights_tile;
  i64 weights_stride;  // bytes of 16 rows

  EDGELM_INLINE explicit Gemm(const LinearArgs& a)
      : args(a),
        warp(shuffle(thread_index() / kWarp, 0)),  // from a shuffle the compiler knows that it is the same in all lanes
        lane(thread_index() % kWarp),
        warp_m(warp % WARPS_M),
        warp_n(warp / WARPS_M),
        tile(gemm_tile()),
        block0(tile.weights * (TM / kTileRows)),
        blocks(blocks_of(a)),
        tiles(a.k / Format<W>::columns),
        stages((a.k + Shape::columns - 1) / Shape::columns),
        rows(gemm_rows<TN>(a, tile.tokens)) {}

  EDGELM_INLINE void prepare() {
    constexpr int kBlockBytes = Shape::tiles * kTileBytes;
    weights_stride = i64(tiles) * kTileBytes;
    weights_block = block0 + thread_index() * 16 / kBlockBytes;
    weights_tile = thread_index() * 16 % kBlockBytes / kTileBytes;
    weights_from = args.codes + rows.expert * args.codes_stride + weights_block * weights_stride +
                   thread_index() * 16 % kBlockBytes;
    const int row_bytes = XF8 ? args.k : 2 * args.k;
    x_valid = 0;
    EDGELM_UNROLL
    for (int i = 0; i < kXCopies; ++i) {
      const int token = thread_index() / 8 + i * (kGemmThreads / 8);
      const bool valid = token < rows.rows;
      const int row = valid ? source_row(args, rows.first + token) : 0;
      x_from[i] = static_cast<const u8*>(args.x) + i64(row) * row_bytes + thread_index() % 8 * 16;
      x_valid |= u32(valid) << i;
    }
  }

  // Start copying stage `stage`, with zeros beyond the matrix.
  EDGELM_INLINE void copy_weights(int stage, u8* to) const {
    const bool inside = thread_index() * 16 < Shape::weight_bytes && stage * Shape::tiles + weights_tile < tiles;
    const u8* from = weights_from + i64(stage) * (Shape::tiles * kTileBytes);
    EDGELM_UNROLL
    for (int i = 0; i < kWeightCopies; ++i) {
      const bool valid = inside && weights_block + i * kBlocksAtOnce < blocks;
      if (Shape::weight_bytes % kAtOnce == 0 || thread_index() * 16 < Shape::weight_bytes) {
        cp_async16(to + thread_index() * 16 + i * kAtOnce,
                   valid ? from + i * kBlocksAtOnce * weights_stride : args.codes, valid);
      }
    }
  }
  EDGELM_INLINE void copy_x(int stage, u8* to) const {
    const int row_bytes = XF8 ? args.k : 2 * args.k;
    const int at = stage * kGemmRowBytes;
    const bool inside = at + thread_index() % 8 * 16 < row_bytes;
    u8* to_row = to + thread_index() / 8 * kGemmRowBytes + ((thread_index() % 8) ^ (thread_index() / 8 & 7)) * 16;
    EDGELM_UNROLL
    for (int i = 0; i < kXCopies; ++i) {
      const bool valid = inside && (x_valid >> i & 1);
      cp_async16(to_row + i * (kGemmThreads / 8 * kGemmRowBytes),
                 valid ? x_from[i] + at : static_cast<const u8*>(args.x), valid);
    }
  }

  // The scale and the zero point of row g + 8 * high of a block of 16, in a group.
  EDGELM_INLINE GemmScale<W> scale(int strip, int high, int group, int groups) const {
    const int block = min_(block0 + warp_m * kStrips + strip, blocks - 1);
    const i64 index = (i64(block) * groups + group) * kTileRows + lane / 4 + 8 * high;
    GemmScale<W> found;
    found.scale = scale_at<W>(args.scales + rows.expert * args.scales_stride, index);
    found.zero = Is<W>::integer && args.zeros ? int(args.zeros[rows.expert * args.zeros_stride + index]) : middle<W>();
    return found;
  }
};

// d += a b for E4M3, 32 columns.
template <int STRIPS, int PARTS>
EDGELM_DEVICE void multiply_fp8(float (&d)[STRIPS][PARTS][4], const Words4 (&a)[STRIPS], const u32 (&b)[PARTS][2]) {
#ifdef EDGELM_FP8_MMA
  EDGELM_UNROLL
  for (int i = 0; i < STRIPS; ++i) {
    const u32 words[4] = {a[i].x, a[i].y, a[i].z, a[i].w};
    EDGELM_UNROLL
    for (int n = 0; n < PARTS; ++n) mma_16x8x32_fp8(d[i][n], words, b[n]);
  }
#else  // convert to float16, which is exact
  EDGELM_UNROLL
  for (int step = 0; step < 2; ++step) {
    u32 x[PARTS][2];
    EDGELM_UNROLL
    for (int n = 0; n < PARTS; ++n) {
      x[n][0] = e4m3x2_to_f16x2(b[n][step] & 0xffff);
      x[n][1] = e4m3x2_to_f16x2(b[n][step] >> 16);
    }
    EDGELM_UNROLL
    for (int i = 0; i < STRIPS; ++i) {
      u32 weights[4];
      fragment<f16, e4m3>(a[i], step, 0, 0, weights);
      EDGELM_UNROLL
      for (int n = 0; n < PARTS; ++n) mma_16x8x16<f16>(d[i][n], weights, x[n]);
    }
  }
#endif
}

template <bool GROUPED, class T, class U> EDGELM_DEVICE auto& sums_of(T& all, U& group) {
  if constexpr (GROUPED) return group;
  else return all;
}

template <class A, class W, bool XF8, bool GROUPED, int TM, int TN, int WARPS_M>
EDGELM_BODY void linear_gemm(const LinearArgs& args) {
  using My = Gemm<A, W, XF8, GROUPED, TM, TN, WARPS_M>;
  using Shape = typename My::Shape;
  constexpr int kStrips = My::kStrips, kParts = My::kParts;
  let_next_kernel_start();
  wait_for_previous_kernel();
  My my(args);
  if (my.rows.rows <= 0) return;
  my.prepare();
  u8* shared = shared_memory();
  EDGELM_UNROLL
  for (int s = 0; s < Shape::stages - 1; ++s) {
    if (s < my.stages) {
      my.copy_weights(s, shared + s * Shape::stage_bytes);
      my.copy_x(s, shared + s * Shape::stage_bytes + Shape::weight_bytes);
    }
    cp_async_commit();
  }

  const int groups = My::kScaled ? args.k / args.group : 1;
  const int group_steps = My::kScaled ? args.group / Shape::step_columns : 0;
  float sums[kStrips][kParts][4] = {};
  float group_sums[GROUPED ? kStrips : 1][GROUPED ? kParts : 1][4] = {};
  GemmScale<W> scales[kStrips][2], next_scales[GROUPED ? kStrips : 1][2];
  u32 zeros[kStrips][2];
  if constexpr (My::kScaled) {
    EDGELM_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      EDGELM_UNROLL
      for (int h = 0; h < 2; ++h) {
        scales[i][h] = my.scale(i, h, 0, groups);
        if constexpr (GROUPED) next_scales[i][h] = my.scale(i, h, min_(1, groups - 1), groups);
      }
    }
  }
  EDGELM_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    EDGELM_UNROLL
    for (int h = 0; h < 2; ++h) zeros[i][h] = My::kScaled ? zero_pair<A, W>(scales[i][h].zero) : 0;
  }
  int group = 0, steps_left = group_steps;

  // Offsets that this lane reads at: its 16 bytes of a tile of weights, its row of an ldmatrix matrix.
  const int weights_at = my.warp_m * kStrips * Shape::tiles * kTileBytes + my.lane * 16;
  const int token = my.warp_n * kParts * 8 + my.lane / 16 * 8 + my.lane % 8;
  const int part = my.lane / 8 % 2;

  for (int stage = 0; stage < my.stages; ++stage) {
    cp_async_wait<Shape::stages - 2>();
    sync_block();
    const int ahead = stage + Shape::stages - 1;
    if (ahead < my.stages) {
      u8* to = shared + ahead % Shape::stages * Shape::stage_bytes;
      my.copy_weights(ahead, to);
      my.copy_x(ahead, to + Shape::weight_bytes);
    }
    cp_async_commit();
    const u8* weights = shared + stage % Shape::stages * Shape::stage_bytes + weights_at;
    const u8* x = shared + stage % Shape::stages * Shape::stage_bytes + Shape::weight_bytes;
    Words4 raw[kStrips];
    EDGELM_UNROLL
    for (int step = 0; step < 4; ++step) {
      if (step % Shape::steps_per_tile == 0) {
        EDGELM_UNROLL
        for (int i = 0; i < kStrips; ++i) {
          raw[i] = load16(weights + (i * Shape::tiles + step / Shape::steps_per_tile) * kTileBytes);
        }
      }
      u32 b[kParts][2];
      EDGELM_UNROLL
      for (int n = 0; n < kParts; n += 2) {
        u32 four[4];
        const int row = token + n * 8;
        ldmatrix_x4(four, x + row * kGemmRowBytes + ((2 * step + part) ^ (row & 7)) * 16);
        b[n][0] = four[0];
        b[n][1] = four[1];
        b[n + 1][0] = four[2];
        b[n + 1][1] = four[3];
      }
      float (&to)[kStrips][kParts][4] = sums_of<GROUPED>(sums, group_sums);
      if constexpr (XF8) {
        multiply_fp8(to, raw, b);
      } else {
        EDGELM_UNROLL
        for (int i = 0; i < kStrips; ++i) {
          u32 a[4];
          fragment<A, W>(raw[i], step % Shape::steps_per_tile, zeros[i][0], zeros[i][1], a);
          EDGELM_UNROLL
          for (int n = 0; n < kParts; ++n) mma_16x8x16<A>(to[i][n], a, b[n]);
        }
      }
      if constexpr (GROUPED) {
        if (--steps_left == 0) {
          steps_left = group_steps;
          ++group;
          EDGELM_UNROLL
          for (int i = 0; i < kStrips; ++i) {
            EDGELM_UNROLL
            for (int n = 0; n < kParts; ++n) {
              EDGELM_UNROLL
              for (int j = 0; j < 4; ++j) {
                sums[i][n][j] = fma_(group_sums[i][n][j], scales[i][j / 2].scale, sums[i][n][j]);
                group_sums[i][n][j] = 0.f;
              }
            }
            EDGELM_UNROLL
            for (int h = 0; h < 2; ++h) {
              scales[i][h] = next_scales[i][h];
              zeros[i][h] = zero_pair<A, W>(scales[i][h].zero);
              next_scales[i][h] = my.scale(i, h, min_(group + 1, groups - 1), groups);
            }
          }
        }
      }
    }
  }

  // -- results: [token][row] in shared memory, then line by line ----------------------------------------------------------
  cp_async_wait<0>();
  sync_block();
  float* results = reinterpret_cast<float*>(shared);
  EDGELM_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    float low_scale = 1.f, high_scale = 1.f;
    if constexpr (My::kScaled && !GROUPED) {  // read only here, since registers are scarce in the loop
      low_scale = my.scale(i, 0, 0, groups).scale;
      high_scale = my.scale(i, 1, 0, groups).scale;
    }
    const int strip = my.warp_m * kStrips + i;
    EDGELM_UNROLL
    for (int n = 0; n < kParts; ++n) {
      EDGELM_UNROLL
      for (int c = 0; c < 2; ++c) {
        const int column = my.warp_n * kParts * 8 + n * 8 + my.lane % 4 * 2 + c;
        float factor = 1.f;
        if (args.x_scales && column < my.rows.rows) {
          factor = args.x_scales[source_row(args, my.rows.first + column)];
        }
        const float low = sums[i][n][c] * low_scale * factor, high = sums[i][n][c + 2] * high_scale * factor;
        float* to = results + column * My::kPitch + my.lane / 4;
        if (args.swiglu) {
          to[strip * 8] = silu(low) * high;
        } else {
          to[strip * kTileRows] = low;
          to[strip * kTileRows + 8] = high;
        }
      }
    }
  }
  sync_block();
  const int outputs = outputs_of(args);
  const int width = args.swiglu ? TM / 2 : TM;
  const int first_output = my.tile.weights * width;
  const bool whole = outputs % 4 == 0;
  for (int i = thread_index(); i < my.rows.rows * (width / 4); i += kGemmThreads) {
    const int row = i / (width / 4), column = i % (width / 4) * 4;
    if (first_output + column >= outputs) continue;
    const float* from = results + row * My::kPitch + column;
    const int slot = my.rows.first + row;
    if (!whole) {
      EDGELM_UNROLL
      for (int j = 0; j < 4; ++j) put<A>(args, slot, first_output + column + j, from[j]);
      continue;
    }
    const i64 at = i64(slot) * outputs + first_output + column;
    Words4 four = load16(from);
    float values[4] = {bits_to_float(four.x), bits_to_float(four.y), bits_to_float(four.z), bits_to_float(four.w)};
    if (bias_of(args)) {
      four = load16(bias_of(args) + first_output + column);
      values[0] += bits_to_float(four.x);
      values[1] += bits_to_float(four.y);
      values[2] += bits_to_float(four.z);
      values[3] += bits_to_float(four.w);
    }
    if (args.residual) {
      four = load16(args.residual + at);
      values[0] += bits_to_float(four.x);
      values[1] += bits_to_float(four.y);
      values[2] += bits_to_float(four.z);
      values[3] += bits_to_float(four.w);
    }
    if (args.y_float) {
      store16(static_cast<float*>(args.y) + at,
              {float_to_bits(values[0]), float_to_bits(values[1]), float_to_bits(values[2]), float_to_bits(values[3])});
    } else {
      store8(static_cast<A*>(args.y) + at, {pack2<A>(values[0], values[1]), pack2<A>(values[2], values[3])});
    }
  }
}

}  // namespace edgelm
