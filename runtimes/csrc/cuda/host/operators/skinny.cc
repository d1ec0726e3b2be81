#include "cuda/host/operators/skinny.h"

#include <algorithm>

namespace edgelm::gpu {

namespace {

constexpr i64 kWidths[] = {8, 16, 32};  // rows of x that a kernel multiplies at a time
constexpr i64 kReservedShared = 1024;  // bytes of a multiprocessor's shared memory that the device keeps for each block
constexpr i64 kMostAhead = 4;          // slots of a warp's ring

i64 width_of(i64 rows) { return rows <= 8 ? 8 : rows <= 16 ? 16 : 32; }
constexpr i64 threads_of(i64 width) { return width < 32 ? 512 : 256; }

// The groups, in columns, that a kernel is compiled for. Another kernel takes any, 0 here.
std::vector<i64> groups_of(const std::string& kind) {
  if (kind == "fp8") return {128, 0};
  if (kind == "int4" || kind == "int8") return {32, 64, 128, 0};
  return {0};
}
i64 group_of(const Matrix& matrix) {
  for (i64 group : groups_of(matrix.kind)) {
    if (group == matrix.group) return group;
  }
  return 0;
}

// The kernel for 8 rows is compiled once for a single matrix and once for experts, whose position takes registers. The
// others have registers to spare.
std::string name_of(const std::string& activation, const std::string& kind, i64 group, i64 width, bool experts) {
  const std::string scales = group ? "_g" + std::to_string(group) : groups_of(kind).size() > 1 ? "_any" : "";
  return "linear_skinny_" + activation + "_" + kind + scales + (experts && width == 8 ? "_experts" : "") + "_n" +
         std::to_string(width);
}

// Whether the kernel is compiled for two blocks of 16 warps on a multiprocessor, with 64 registers for each thread. More
// tokens need more registers; so do the position among experts and int4 in any groups, of which a tile has up to four.
bool is_lean(const std::string& kind, i64 group, i64 width, bool experts) {
  return width == 8 && !experts && (group || kind != "int4");
}

// The columns that warps divide among them, in units: two tiles of 16-bit weights, or one.
i64 unit_tiles(const Matrix& matrix) { return matrix.tile_columns() < 32 ? 2 : 1; }

// The number of warps that divide the columns of 16 rows: as few as possible, for few sums to add, such that a warp's
// columns fit into its ring; but enough that every warp has some. It decides the order of the sums.
i64 split_of(const Matrix& matrix, i64 warps, i64 work, i64 warps_in_all) {
  const i64 tiles = divide_up(matrix.columns, matrix.tile_columns()), unit = unit_tiles(matrix);
  i64 split = warps;
  while (split > 1 && divide_up(divide_up(tiles, unit), split) < 2 * kMostAhead / unit &&
         work * (split / 2) >= warps_in_all) {
    split /= 2;
  }
  return split;
}

// Sizes in shared memory, and the columns at a time.
struct Room {
  const Matmul& m;
  i64 warps, x_tile, slot;

  i64 pitch(i64 columns) const { return divide_up(columns, 32) * 64 + 16; }
  i64 sums() const { return 2 * warps * width_of(x_tile) * 64; }
  i64 rows() const { return width_of(x_tile) * 8 + width_of(x_tile) * 8 * warps; }
  i64 experts() const { return m.offsets ? round_up(4 + 12 * m.matrix.count, 16) : 0; }
  i64 bytes(i64 ahead, i64 columns) const {
    return warps * ahead * slot + x_tile * pitch(columns) + sums() + rows() + experts();
  }
  // The chunks of columns that fit into `limit` bytes; 0: not even the smallest fits.
  i64 chunks(i64 ahead, i64 limit) const {
    const i64 columns = m.matrix.columns;
    if (bytes(ahead, columns) <= limit) return 1;
    const i64 most = (limit - bytes(ahead, 0)) / (64 * x_tile) * 32 / 64 * 64;
    return most < 64 ? 0 : divide_up(columns, most);
  }
};

}  // namespace

i64 most_rows_of(const Matmul& m) { return std::min(m.most_rows ? m.most_rows : m.rows, m.rows); }

Launch skinny_launch(const Matmul& m, const DeviceInfo& device, const LinearArgs& linear) {
  const Matrix& matrix = m.matrix;
  i64 most = most_rows_of(m);
  // Sized for an expert's usual share; an expert with more rows takes several turns.
  if (m.offsets && most > 8) most = std::min(most, 4 * divide_up(m.rows, matrix.count));
  const i64 width = width_of(most), x_tile = std::min(most, width), group = group_of(matrix);
  const i64 work = m.active() * matrix.blocks();
  // Blocks of 8 warps, two on a multiprocessor; of 16 if loading x takes long or there is too little work.
  const bool small = x_tile <= 2 && work >= 2 * device.multiprocessors;
  const i64 warps = small ? 8 : threads_of(width) / 32;
  const i64 split = split_of(matrix, warps, work, warps * (small ? 2 : 1) * device.multiprocessors);
  const i64 at_a_time = warps / split, strips = divide_up(matrix.blocks(), at_a_time), items = m.active() * strips;

  // Where two blocks of 16 warps fit on a multiprocessor and there are some more items than multiprocessors, all items
  // are in flight at once. Each block loads x for itself, so not with many rows.
  const SkinnySlot slot = skinny_slot(i32(matrix.tile_columns()), i32(matrix.scale_bytes()),
                                      matrix.kind == "int4" || matrix.kind == "int8", i32(group));
  const Room room = {m, warps, x_tile, slot.bytes};
  const i64 whole = device.shared_bytes(), limit = whole - kReservedShared;
  const i64 chunks = room.chunks(1, limit);
  if (chunks == 0) {
    throw Error(std::to_string(matrix.columns) + " columns need more shared memory than this device's " +
                std::to_string(whole / 1024) + " KiB");
  }
  const bool lean = is_lean(matrix.kind, group, width, matrix.count > 1);
  i64 on_one = x_tile <= 2 && (small || lean) ? 2 : 1, ahead = kMostAhead;
  const auto fits = [&] {
    return room.chunks(ahead, limit) == chunks &&
           (on_one == 1 || on_one * (room.bytes(ahead, matrix.columns) + kReservedShared) <= whole);
  };
  // As many slots as leave x its room, but two blocks at a time rather than four slots.
  while (!fits() && ahead > 1) {
    ahead /= 2;
    if (ahead == 1 && on_one == 2) {
      on_one = 1;
      ahead = kMostAhead;
    }
  }
  // Of about the same size.
  const i64 chunk = chunks == 1 ? matrix.columns : round_up(divide_up(matrix.columns, chunks), 64);
  const i64 grid = std::min(items, on_one * device.multiprocessors);
  if (m.offsets && items > kMostSize / std::max(grid, strips)) {
    throw Error(std::to_string(matrix.count) + " experts of " + std::to_string(matrix.rows) +
                " rows are too many for one launch");
  }

  auto args = zeroed<SkinnyArgs>();
  args.linear = linear;
  SkinnyPlan& plan = args.plan;
  const i64 tiles = divide_up(matrix.columns, matrix.tile_columns()), unit = unit_tiles(matrix);
  const i64 units = divide_up(tiles, unit), chunk_units = divide_up(chunk, unit * matrix.tile_columns());
  while (i64(1) << plan.split_shift < split) ++plan.split_shift;
  plan.at_a_time = i32(at_a_time);
  plan.blocks = i32(matrix.blocks());
  plan.strips = i32(strips);
  plan.items_each = i32(items / grid);
  plan.items_left = i32(items % grid);
  plan.grid_factor = skinny_factor(u32(grid));
  plan.strips_factor = skinny_factor(u32(strips));
  plan.x_tile = i32(x_tile);
  plan.chunk_columns = i32(chunk);
  plan.chunks = i32(divide_up(units, chunk_units));
  plan.chunk = i32(chunk_units * unit);
  plan.share = i32(divide_up(std::min(chunk_units, units), split) * unit);
  plan.last_share = i32(divide_up(units - (plan.chunks - 1) * chunk_units, split) * unit);
  plan.tiles = i32(tiles);
  plan.block_bytes = i32(tiles * kTileBytes);
  plan.groups = matrix.scale_bytes() ? i32(matrix.groups()) : 0;
  plan.group_factor = skinny_factor(u32(std::max<i64>(1, matrix.group / 16)));
  plan.ahead = i32(ahead);
  plan.ring = i32(ahead * slot.bytes);
  plan.pitch = i32(room.pitch(chunk));
  plan.x_at = i32(warps * plan.ring);
  plan.sums_at = i32(plan.x_at + x_tile * plan.pitch);
  plan.rows_at = i32(plan.sums_at + room.sums());
  plan.experts_at = i32(plan.rows_at + room.rows());
  return make_launch(name_of(m.activation, matrix.kind, group, width, matrix.count > 1), grid, 1, 1, 32 * warps,
                     room.bytes(ahead, chunk), args);
}

KernelNames skinny_kernels(const Matrix& matrix, const std::string& activation) {
  KernelNames names;
  for (i64 width : kWidths) {
    names.push_back(name_of(activation, matrix.kind, group_of(matrix), width, matrix.count > 1));
  }
  return names;
}

void add_skinny_kernels(KernelSources& to, const char* header, const std::string& activation, const std::string& kind) {
  for (i64 group : groups_of(kind)) {
    for (i64 width : kWidths) {
      for (bool experts : {false, true}) {
        if (!experts && width > 8) continue;
        const std::string body = "linear_skinny<" + activation + ", " + cuda_type(kind) + ", " +
                                 std::to_string(width / 8) + ", " + std::to_string(group) +
                                 (experts ? ", true>" : ", false>");
        to.push_back({name_of(activation, kind, group, width, experts), header, "SkinnyArgs", threads_of(width),
                      is_lean(kind, group, width, experts) ? 2 : 1, body});
      }
    }
  }
}

}  // namespace edgelm::gpu
