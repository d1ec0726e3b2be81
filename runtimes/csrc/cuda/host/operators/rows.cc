#include "cuda/host/operators/rows.h"

#include <initializer_list>

#include "cuda/host/planners.h"
#include "cuda/rows_args.cuh"

namespace edgelm::gpu {

namespace {

constexpr i64 kTopPart = 4096;  // columns of which a block of the first argmax kernel finds the largest
constexpr i64 kWarpSums = 4 * kRowThreads / 32;

bool is_low_precision(const std::string& type) { return type == "bf16" || type == "f16"; }

// Of rows or columns: the arguments are i32.
void require_sizes(std::initializer_list<i64> sizes) {
  for (i64 size : sizes) {
    if (size < 0 || size > kMostSize) {
      throw Error("a size of " + std::to_string(size) + ", expected 0 to " + std::to_string(kMostSize));
    }
  }
}

void require_even(i64 columns, const char* what) {
  if (columns % 2) throw Error(what + std::to_string(columns) + " columns, expected an even number");
}

Conversion conversion_of(const Fields& fields) {
  Conversion c;
  c.x = fields.address("x");
  c.y = fields.address("y");
  c.rows = fields.size("rows");
  c.columns = fields.size("columns");
  c.source = fields.text("source");
  c.target = fields.text("target");
  c.x_float = fields.flag("x_float");
  c.norm = fields.address("norm");
  c.epsilon = float(fields.number("epsilon"));
  c.rounding = float(fields.number("rounding"));
  c.scales = fields.address("scales");
  return c;
}

RmsNorm rms_norm_of(const Fields& fields) {
  RmsNorm n;
  n.x = fields.address("x");
  n.weight = fields.address("weight");
  n.y = fields.address("y");
  n.rows = fields.size("rows");
  n.columns = fields.size("columns");
  n.source = fields.text("source");
  n.residual = fields.address("residual");
  n.epsilon = float(fields.number("epsilon"));
  return n;
}

}  // namespace

Launch convert_launch(const Conversion& c) {
  if (!is_low_precision(c.source) || (c.target != c.source && c.target != "fp8")) {
    throw Error("there is no conversion from " + c.source + " to " + c.target +
                ": use bf16 or f16, to itself or to fp8");
  }
  require_sizes({c.rows, c.columns});
  require_even(c.columns, "rows have ");
  auto args = zeroed<RowsArgs>();
  point(args.x, c.x);
  point(args.norm, c.norm);
  point(args.y, c.y);
  point(args.scales, c.scales);
  args.rows = i32(c.rows);
  args.k = i32(c.columns);
  args.x_float = c.x_float;
  args.epsilon = c.epsilon;
  args.round_scale = c.rounding;
  return make_launch("convert_rows_" + c.source + "_" + c.target, c.rows, 1, 1, kRowThreads, kWarpSums, args);
}

std::string rms_norm_kernel(const std::string& source) {
  if (!is_low_precision(source) && source != "f32") {
    throw Error("there is no norm of " + source + ", expected bf16, f16 or f32");
  }
  return "rms_norm_" + source + "_f32";
}

Launch rms_norm_launch(const RmsNorm& n) {
  std::string kernel = rms_norm_kernel(n.source);
  require_sizes({n.rows, n.columns});
  require_even(n.columns, "a norm of ");
  auto args = zeroed<RmsNormArgs>();
  point(args.x, n.x);
  point(args.weight, n.weight);
  point(args.residual, n.residual);
  point(args.y, n.y);
  args.k = i32(n.columns);
  args.epsilon = n.epsilon;
  return make_launch(std::move(kernel), n.rows, 1, 1, kRowThreads, kWarpSums, args);
}

std::string embedding_kernel(const Matrix& matrix) { return "quant_embedding_" + matrix.kind + "_f32"; }

Launch embedding_launch(u64 ids, const Matrix& matrix, u64 blob, u64 y, i64 rows) {
  if (matrix.swiglu || matrix.count != 1) {
    throw Error("an embedding's table is " + matrix.text() + ", expected one matrix without SwiGLU");
  }
  require_sizes({rows});
  auto args = zeroed<EmbeddingArgs>();
  point(args.ids, ids);
  point(args.codes, blob);
  point(args.scales, matrix.scales_at(blob));
  point(args.zeros, matrix.zeros_at(blob));
  point(args.y, y);
  args.rows = i32(rows);
  args.n = i32(matrix.rows);
  args.k = i32(matrix.columns);
  args.group = matrix.scale_bytes() ? i32(matrix.group) : 1;
  const i64 lanes = matrix.columns / matrix.tile_columns() * 4;  // four read a row of a tile
  return make_launch(embedding_kernel(matrix), rows, divide_up(lanes, kRowThreads), 1, kRowThreads, 0, args);
}

Launch last_token_launch(u64 x, u64 y, i64 batch, i64 tokens, i64 columns) {
  require_sizes({batch, tokens, columns});
  auto args = zeroed<LastTokenArgs>();
  point(args.x, x);
  point(args.y, y);
  args.tokens = i32(tokens);
  args.k = i32(columns);
  return make_launch("last_token_f32", batch, 1, 1, kRowThreads, 0, args);
}

u64 argmax_workspace_bytes(i64 rows, i64 columns) { return 2 * round_up(4 * rows * divide_up(columns, kTopPart)); }

Launches argmax_launches(u64 x, u64 ids, i64 rows, i64 columns, u64 workspace) {
  require_sizes({rows, columns});
  const i64 parts = divide_up(columns, kTopPart);
  auto args = zeroed<TopArgs>();
  point(args.x, x);
  point(args.values, workspace);
  point(args.ids, workspace + round_up(4 * rows * parts));
  point(args.out_ids, ids);
  args.n = i32(columns);
  args.parts = i32(parts);
  args.part = kTopPart;
  return {make_launch("top_parts_f32", parts, rows, 1, kRowThreads, 2 * kWarpSums, args),
          make_launch("top_all_f32", rows, 1, 1, kRowThreads, 2 * kWarpSums, args)};
}

Functions rows_functions() {
  return {
      {"convert", [](const Fields& f) { return serialised({convert_launch(conversion_of(f))}); }},
      {"rms_norm", [](const Fields& f) { return serialised({rms_norm_launch(rms_norm_of(f))}); }},
      {"embedding",
       [](const Fields& f) {
         return serialised({embedding_launch(f.address("ids"), Matrix::of(f, "matrix_"), f.address("blob"),
                                             f.address("y"), f.size("rows"))});
       }},
      {"last_token",
       [](const Fields& f) {
         return serialised(
             {last_token_launch(f.address("x"), f.address("y"), f.size("batch"), f.size("tokens"), f.size("columns"))});
       }},
      {"argmax_workspace",
       [](const Fields& f) { return std::to_string(argmax_workspace_bytes(f.size("rows"), f.size("columns"))); }},
      {"argmax",
       [](const Fields& f) {
         return serialised(argmax_launches(f.address("x"), f.address("ids"), f.size("rows"), f.size("columns"),
                                           f.address("workspace")));
       }},
  };
}

}  // namespace edgelm::gpu
