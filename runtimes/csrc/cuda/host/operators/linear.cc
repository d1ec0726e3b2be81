#include "cuda/host/operators/linear.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "cuda/host/operators/skinny.h"
#include "cuda/host/planners.h"

namespace edgelm::gpu {

namespace {

constexpr i64 kSkinnyRows = 32;  // up to so many rows a single matrix uses the skinny kernel
constexpr i64 kFusedRows = 8;    // up to so many rows of x the skinny kernel norms and rounds them, in each block
constexpr i64 kGemmThreads = 256;
constexpr i64 kExactTokens = 4, kExactWarps = 8;
constexpr i64 kReservedShared = 1024;  // bytes of a multiprocessor's shared memory that the device keeps for each block
constexpr i64 kMostCells = i64(1) << 48;

struct GemmTile {
  i64 rows, tokens;  // of the matrix, of x
  i64 warps;         // along the rows
  i64 stages;
  double speed;  // estimated, relative, on a busy device; used only to choose a tile
};
constexpr GemmTile kGemmTiles[] = {{256, 128, 4, 3, 1.0}, {128, 128, 2, 3, 0.8}, {64, 64, 2, 6, 0.5}};

// How the gemm kernel scales: not at all, by row, by group of columns.
std::string gemm_scales(const Matrix& matrix) {
  return !matrix.scale_bytes() ? "plain" : matrix.groups() == 1 ? "row" : "group";
}

// The largest tile has no registers left for scales or for unpacking weights.
bool has_tile(const std::string& scales, const GemmTile& tile) { return scales == "plain" || tile.rows < 256; }

std::string gemm_name(const Matrix& matrix, const std::string& activation, const GemmTile& tile, bool fp8) {
  const std::string scales = gemm_scales(matrix), size = "_" + std::to_string(tile.rows);
  // For FP8 times FP8, `activation` is only the type of y.
  if (fp8) return "linear_gemm_fp8_fp8_" + scales + "_" + activation + size;
  return "linear_gemm_" + activation + "_" + matrix.kind + "_" + scales + size;
}

void check_matrix(const Matrix& matrix, const std::string& activation) {
  if (activation != "f32" && activation != "bf16" && activation != "f16") {
    throw Error("activation is '" + activation + "', expected bf16, f16 or f32");
  }
  const std::string& kind = matrix.kind;
  if (activation != "f32" && !matrix.scale_bytes() && kind != activation) {
    throw Error(kind + " weights need " + kind + " activations, found " + activation);
  }
  const i64 multiple = std::max<i64>(16, matrix.tile_columns());
  if (matrix.columns % multiple || matrix.columns < 16) {
    throw Error(kind + " has " + std::to_string(matrix.columns) + " columns, expected a multiple of " +
                std::to_string(multiple));
  }
  if (matrix.scale_bytes() && (matrix.group % 16 || matrix.columns % matrix.group)) {
    throw Error("groups of " + std::to_string(matrix.group) + " do not divide " + std::to_string(matrix.columns) +
                " columns into multiples of 16");
  }
  if (matrix.swiglu && matrix.rows % 2) {
    throw Error("gate and up have " + std::to_string(matrix.rows) + " rows together, expected an even number");
  }
}

LinearArgs args_of(const Matmul& m, u64 scales) {
  auto args = zeroed<LinearArgs>();
  point(args.x, m.x);
  point(args.codes, m.blob);
  point(args.scales, m.matrix.scales_at(m.blob));
  point(args.zeros, m.matrix.zeros_at(m.blob));
  point(args.norm, m.norm);
  point(args.residual, m.residual);
  point(args.x_scales, scales);
  point(args.y, m.y);
  point(args.row_map, m.row_map);
  if (m.offsets) {
    point(args.offsets, m.offsets);
  } else {
    point(args.bias, m.bias);
  }
  args.codes_stride = m.matrix.codes_stride();
  args.scales_stride = m.matrix.scales_stride();
  args.zeros_stride = m.matrix.zeros_stride();
  args.rows = i32(m.rows);
  args.n = i32(m.matrix.rows);
  args.k = i32(m.matrix.columns);
  args.group = i32(m.matrix.group);
  args.experts = m.offsets ? i32(m.matrix.count) : 0;
  args.swiglu = m.matrix.swiglu;
  args.x_float = m.x_float;
  args.y_float = m.y_float;
  args.epsilon = m.epsilon;
  args.round_scale = m.rounding;
  return args;
}

// -- the three kinds of matmuls ---------------------------------------------------------------------------------------

Launch exact_launch(Matmul m) {
  m.x_float = m.y_float = true;
  const i64 depth = std::min<i64>(divide_up(most_rows_of(m), kExactTokens), 64);
  return make_launch("linear_exact_f32_" + m.matrix.kind, divide_up(m.matrix.blocks(), kExactWarps),
                     m.offsets ? m.matrix.count : 1, depth, 32 * kExactWarps, 8 * kExactTokens, args_of(m, 0));
}

Launch gemm_launch(const Matmul& m, const DeviceInfo& device, u64 scales) {
  const Matrix& matrix = m.matrix;
  const bool fp8 = scales != 0;
  const i64 whole = device.shared_bytes(), experts = m.offsets ? matrix.count : 0;
  double best_time = 0;
  std::optional<Launch> best;
  for (const GemmTile& tile : kGemmTiles) {
    if (!has_tile(gemm_scales(matrix), tile)) continue;
    const i64 columns = 4 * (fp8 ? 32 : 16);
    const i64 weights = tile.rows / kRows * (columns / matrix.tile_columns()) * kTileBytes;
    const i64 shared = std::max(tile.stages * (weights + tile.tokens * 128),
                                tile.tokens * (tile.rows + 4) * i64(sizeof(float)));
    if (shared > whole - kReservedShared) continue;
    const i64 across = divide_up(matrix.blocks() * kRows, tile.rows), down = divide_up(m.rows, tile.tokens);
    // The last tile of each expert is half full on average, and all `active` experts may have one.
    const double used = experts ? double(m.rows) / double(tile.tokens) + double(m.active()) / 2 : double(down);
    const i64 most = experts ? std::min(m.rows, m.rows / tile.tokens + experts) : down;
    const double turns = std::ceil(double(across) * used / device.multiprocessors);
    const double time = turns * double(tile.rows * tile.tokens) / tile.speed;
    if (best && time >= best_time) continue;
    best_time = time;
    best = make_launch(gemm_name(matrix, m.activation, tile, fp8), across, most, 1, kGemmThreads, shared,
                       args_of(m, scales));
  }
  if (!best) throw Error("no tile fits into this device's " + std::to_string(whole / 1024) + " KiB of shared memory");
  return *best;
}

}  // namespace

// -- matmuls ----------------------------------------------------------------------------------------------------------

void Matmul::check() const {
  check_matrix(matrix, activation);
  if (norm && !x_float && activation != "f32") {
    throw Error("a norm needs float32 x, and x is " + activation + ": pass x_float=True");
  }
  if (matrix.count > 1 && !offsets) {
    throw Error("a blob of " + std::to_string(matrix.count) + " matrices needs offsets: pass them");
  }
  if (bias && (offsets || matrix.swiglu)) throw Error("a bias needs a single matrix without SwiGLU: pass bias=0");
  if (rounding != 0 && activation != "f32" && matrix.kind != "fp8") {
    throw Error("x is rounded to FP8, which needs fp8 weights, found " + matrix.kind);
  }
  if (row_map && !x_rows) throw Error("a row_map needs x_rows: pass the number of rows of x");
  for (i64 count : {rows, x_rows, most_rows}) {
    if (count < 0) throw Error("rows is " + std::to_string(count) + ", expected 0 or more");
    if (count > kMostSize || count * matrix.columns > kMostCells) {
      throw Error(std::to_string(count) + " rows of " + std::to_string(matrix.columns) +
                  " are too many for one launch: divide the prompt");
    }
  }
}

i64 Matmul::active() const { return offsets ? std::min(matrix.count, rows) : 1; }

bool Matmul::is_skinny() const {
  // With many experts most have few rows, even if one expert may have all of them.
  return most_rows_of(*this) <= kSkinnyRows || (offsets && rows <= matrix.count * 12);
}

bool Matmul::prepares_x() const {
  if (rows == 0 || activation == "f32" || (!x_float && rounding == 0)) return false;
  return !is_skinny() || rows_of_x() > kFusedRows;
}

KernelNames matmul_kernels(const Matrix& matrix, const std::string& activation, float rounding) {
  check_matrix(matrix, activation);
  if (activation == "f32") return {"linear_exact_f32_" + matrix.kind};
  KernelNames names = skinny_kernels(matrix, activation);
  for (const GemmTile& tile : kGemmTiles) {
    if (has_tile(gemm_scales(matrix), tile)) names.push_back(gemm_name(matrix, activation, tile, rounding != 0));
  }
  names.push_back("convert_rows_" + activation + "_" + activation);
  if (rounding != 0) names.push_back("convert_rows_" + activation + "_fp8");
  return names;
}

u64 matmul_workspace_bytes(const Matmul& m) {
  m.check();
  if (m.activation == "f32" || (!m.x_float && m.rounding == 0)) return 0;
  const i64 rows = m.rows_of_x();
  return u64(round_up(2 * rows * m.matrix.columns) + (m.rounding != 0 ? round_up(4 * rows) : 0));
}

Launches matmul_launches(const Matmul& matmul, const DeviceInfo& device, u64 workspace) {
  matmul.check();
  if (matmul.rows == 0) return {};
  if (matmul.activation == "f32") return {exact_launch(matmul)};
  Launches launches;
  Matmul m = matmul;
  u64 scales = 0;
  if (m.prepares_x()) {
    if (!workspace) {
      throw Error("this matmul needs a workspace: pass the address of " + std::to_string(matmul_workspace_bytes(m)) +
                  " bytes");
    }
    const bool rounds = m.rounding != 0;
    // The skinny kernel takes rounded x in the activations' type, which represents FP8 exactly.
    const std::string target = rounds && !m.is_skinny() ? "fp8" : m.activation;
    const i64 cells = m.rows_of_x() * m.matrix.columns;
    if (rounds) scales = workspace + u64(round_up(target == "fp8" ? cells : 2 * cells));
    launches.push_back(convert_launch({m.x, workspace, m.rows_of_x(), m.matrix.columns, m.activation, target, m.x_float,
                                       m.norm, m.epsilon, m.rounding, scales}));
    m.x = workspace;
    m.x_float = false;
    m.norm = 0;
    m.rounding = 0;
  }
  launches.push_back(m.is_skinny() ? skinny_launch(m, device, args_of(m, scales)) : gemm_launch(m, device, scales));
  return launches;
}

// -- list of all kernels ----------------------------------------------------------------------------------------------

namespace {

constexpr char kHeader[] = "linear/linear.cuh";

void add_gemms(KernelSources& to, const std::string& a, const std::string& w, const std::string& scales, bool fp8) {
  const std::string inputs = fp8 ? "fp8_fp8_" + scales + "_" + a : a + "_" + w + "_" + scales;
  for (const GemmTile& tile : kGemmTiles) {
    if (!has_tile(scales, tile)) continue;
    // Two blocks of the middle tile fit on a multiprocessor if there are no scales and no unpacking.
    const i64 blocks = scales == "plain" && tile.rows == 128 ? 2 : 1;
    const std::string body = "linear_gemm<" + a + ", " + cuda_type(w) + (fp8 ? ", true" : ", false") +
                             (scales == "group" ? ", true, " : ", false, ") + std::to_string(tile.rows) + ", " +
                             std::to_string(tile.tokens) + ", " + std::to_string(tile.warps) + ">";
    to.push_back(
        {"linear_gemm_" + inputs + "_" + std::to_string(tile.rows), kHeader, "LinearArgs", kGemmThreads, blocks, body});
  }
}

void add_rows(KernelSources& to, const std::string& name, const char* args, const std::string& body) {
  to.push_back({name, kHeader, args, kRowThreads, 1, body});
}

KernelSources all_linear_kernels() {
  KernelSources all;
  for (const std::string a : {"bf16", "f16"}) {
    for (const std::string& w : {std::string("int4"), std::string("int8"), std::string("fp8"), a}) {
      add_skinny_kernels(all, kHeader, a, w);
      if (w == a) {
        add_gemms(all, a, w, "plain", false);
      } else {
        for (const char* scales : {"row", "group"}) add_gemms(all, a, w, scales, false);
      }
    }
    for (const char* scales : {"row", "group"}) add_gemms(all, a, "fp8", scales, true);
    add_rows(all, "convert_rows_" + a + "_" + a, "RowsArgs", "convert_rows<" + a + ", " + a + ">");
    add_rows(all, "convert_rows_" + a + "_fp8", "RowsArgs", "convert_rows<" + a + ", e4m3>");
  }
  for (const std::string w : {"int4", "int8", "fp8", "f16", "bf16", "f32"}) {
    const std::string type = cuda_type(w);
    all.push_back({"linear_exact_f32_" + w, kHeader, "LinearArgs", 32 * kExactWarps, 1, "linear_exact<" + type + ">"});
    add_rows(all, "quant_embedding_" + w + "_f32", "EmbeddingArgs", "quant_embedding<" + type + ">");
  }
  for (const std::string a : {"bf16", "f16", "f32"}) {
    add_rows(all, rms_norm_kernel(a), "RmsNormArgs", std::string("rms_norm<") + cuda_type(a) + ">");
  }
  add_rows(all, "last_token_f32", "LastTokenArgs", "last_token<float>");
  add_rows(all, "top_parts_f32", "TopArgs", "top_parts<float>");
  add_rows(all, "top_all_f32", "TopArgs", "top_all<float>");
  return all;
}

Matmul matmul_of(const Fields& fields) {
  Matmul m;
  m.matrix = Matrix::of(fields, "matrix_");
  m.blob = fields.address("blob");
  m.x = fields.address("x");
  m.y = fields.address("y");
  m.rows = fields.integer("rows");
  m.activation = fields.text("activation");
  m.x_float = fields.flag("x_float");
  m.y_float = fields.flag("y_float");
  m.norm = fields.address("norm");
  m.residual = fields.address("residual");
  m.bias = fields.address("bias");
  m.row_map = fields.address("row_map");
  m.offsets = fields.address("offsets");
  m.x_rows = fields.integer("x_rows");
  m.most_rows = fields.integer("most_rows");
  m.rounding = float(fields.number("rounding"));
  m.epsilon = float(fields.number("epsilon"));
  return m;
}

}  // namespace

const KernelSources& linear_kernels() {
  static const KernelSources kAll = all_linear_kernels();
  return kAll;
}

Functions linear_functions() {
  return {
      {"matmul",
       [](const Fields& f) { return serialised(matmul_launches(matmul_of(f), device_of(f), f.address("workspace"))); }},
      {"matmul_workspace", [](const Fields& f) { return std::to_string(matmul_workspace_bytes(matmul_of(f))); }},
      {"matmul_kernels",
       [](const Fields& f) {
         return lines_of(matmul_kernels(Matrix::of(f, "matrix_"), f.text("activation"), float(f.number("rounding"))));
       }},
  };
}

}  // namespace edgelm::gpu
