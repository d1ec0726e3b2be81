// Benchmark of the matmul kernels of one instruction set on random weights, without ONNX Runtime.
//
//   linear_bench [table] [threads] [rows] [N] [K]
//
// Prints, per kind of weights: billions of operations per second (two per multiply-add), the bandwidth at which packed
// weights are read, and weights read a second. There are enough matrices that weights come from memory, not from a
// cache, as in decoding.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels/kernels.h"

namespace {

using edgelm::Kind;
using edgelm::Matrix;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::vector<uint8_t> RandomMatrix(Kind kind, int64_t rows, int64_t columns, int64_t group, Matrix* matrix) {
  edgelm::MatrixHeader header = {};
  std::memcpy(header.magic, "EDLM", 4);
  const bool integer = kind < Kind::kFp8E4M3;
  const int64_t span = group == edgelm::kHalf ? edgelm::kBlock : group;
  const int64_t in_record = integer ? span / group : 1;
  const int64_t head = integer ? 64 * in_record : kind == Kind::kFp8E4M3 ? 128 : 0;
  header.version = edgelm::kLayoutVersion;
  header.kind = kind;
  header.scale = integer     ? edgelm::ScaleKind::kFloat16
                 : head != 0 ? edgelm::ScaleKind::kFloat32
                             : edgelm::ScaleKind::kNone;
  header.rows = rows;
  header.columns = columns;
  header.group = integer ? group : columns;
  const int64_t tiles = (rows + 31) / 32, records = columns / (header.group * in_record);
  const int64_t record = head + edgelm::CodeBytes(kind, header.group * in_record);
  int64_t bytes = 64 + tiles * records * record;
  if (kind == Kind::kInt8Split) {
    header.low_offset = bytes;
    bytes += tiles * (columns / 32) * 512;
  }
  header.bytes = bytes;
  std::vector<uint8_t> blob(bytes + 64);
  uint8_t* start = blob.data() + (64 - reinterpret_cast<uintptr_t>(blob.data()) % 64) % 64;
  std::memcpy(start, &header, 64);
  uint64_t state = 1;
  for (int64_t i = 64; i + 8 <= bytes; i += 8) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t value = state ^ state >> 29;
    std::memcpy(start + i, &value, 8);
  }
  const uint16_t scale16 = 0x2000;
  const float scale32 = 0.01f;
  for (int64_t r = 0; r < tiles * records; ++r)
    for (int64_t n = 0; n < (head != 0 ? 32 * in_record : 0); ++n) {
      if (integer) std::memcpy(start + 64 + r * record + 2 * n, &scale16, 2);
      if (!integer) std::memcpy(start + 64 + r * record + 4 * n, &scale32, 4);
    }
  if (const char* wrong = edgelm::ParseMatrix(start, bytes, matrix)) std::fprintf(stderr, "%s\n", wrong), std::exit(1);
  return blob;
}

}  // namespace

int main(int count, char** args) {
  const edgelm::Kernels* tables[] = {
      &edgelm::kScalarKernels,
#if defined(EDGELM_X86)
      &edgelm::kAvx2Kernels,
      &edgelm::kAvx2VnniKernels,
      &edgelm::kAvx512VnniKernels,
#elif defined(EDGELM_ARM64)
      &edgelm::kNeonDotKernels,
      &edgelm::kNeonI8mmKernels,
#endif
  };
  const edgelm::Kernels* kernels = nullptr;
  for (const auto* table : tables)
    if (count > 1 && std::strcmp(table->name, args[1]) == 0) kernels = table;
  if (kernels == nullptr) {
    std::fprintf(stderr, "usage: linear_bench TABLE [threads] [rows] [N] [K]; TABLE is one of");
    for (const auto* table : tables) std::fprintf(stderr, " %s", table->name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  const int threads = count > 2 ? std::atoi(args[2]) : 2;
  const int64_t rows = count > 3 ? std::atoll(args[3]) : 1;
  const int64_t n = count > 4 ? std::atoll(args[4]) : 2048, k = count > 5 ? std::atoll(args[5]) : 2048;
  struct Case {
    const char* name;
    Kind kind;
    int64_t group;
    bool high_only;
  };
  const Case cases[] = {{"int3 g32", Kind::kInt3, 32, false},
                        {"int4 g16", Kind::kInt4, 16, false},
                        {"int4 g32", Kind::kInt4, 32, false},
                        {"int4 g128", Kind::kInt4, 128, false},
                        {"int5 g32", Kind::kInt5, 32, false},
                        {"int6 g32", Kind::kInt6, 32, false},
                        {"int8 g16", Kind::kInt8, 16, false},
                        {"int8 g32", Kind::kInt8, 32, false},
                        {"int8 g128", Kind::kInt8, 128, false},
                        {"split g128", Kind::kInt8Split, 128, false},
                        {"high nibbles g128", Kind::kInt8Split, 128, true},
                        {"fp8 row", Kind::kFp8E4M3, 0, false},
                        {"bfloat16", Kind::kBFloat16, 0, false},
                        {"float32", Kind::kFloat32, 0, false}};
  std::vector<float> x(rows * k), y(rows * n);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(static_cast<int>(i * 7919 % 255) - 127);
  std::vector<int8_t> codes(rows * k);
  std::vector<float> scales(rows * k / 32);
  std::vector<int32_t> offsets(rows * k / 32);
  edgelm::QuantRows quantised;
  quantised.codes = codes.data(), quantised.scales = scales.data(), quantised.offsets = offsets.data();
  quantised.columns = k;
  kernels->linear.quantize_rows(x.data(), k, rows, k, quantised);
  std::printf("%s, %d threads, %lld rows, N=%lld K=%lld\n", kernels->name, threads, static_cast<long long>(rows),
              static_cast<long long>(n), static_cast<long long>(k));
  for (const Case& c : cases) {
    const bool integer = c.kind < Kind::kFp8E4M3;
    std::vector<Matrix> matrices;
    std::vector<std::vector<uint8_t>> blobs;
    int64_t bytes = 0;
    while (bytes < (rows > 4 ? 32 << 20 : 400 << 20)) {
      matrices.emplace_back();
      blobs.push_back(RandomMatrix(c.kind, n, k, c.group, &matrices.back()));
      bytes += static_cast<int64_t>(blobs.back().size());
    }
    double best = 1e9;
    for (int repeat = 0; repeat < 5; ++repeat) {
      const double start = Now();
      std::vector<std::thread> workers;
      for (int t = 0; t < threads; ++t)
        workers.emplace_back([&, t] {
          edgelm::Output out;
          out.y = y.data(), out.ldy = n;
          for (const Matrix& m : matrices) {
            const int64_t begin = m.units() * t / threads, end = m.units() * (t + 1) / threads;
            if (!integer) kernels->linear.linear_float(m, begin, end, x.data(), k, rows, out);
            else if (c.high_only) kernels->linear.linear_high(m, begin, end, quantised, rows, out);
            else kernels->linear.linear_int8(m, begin, end, quantised, rows, out);
          }
        });
      for (auto& worker : workers) worker.join();
      best = std::min(best, (Now() - start) / static_cast<double>(matrices.size()));
    }
    const Matrix& m = matrices[0];
    const double read = static_cast<double>(m.tiles) * static_cast<double>(m.tile_bytes) *
                        (c.kind == Kind::kInt8Split && !c.high_only ? 2.0 : 1.0);
    std::printf("  %-17s %8.3f ms %7.0f GOPS %6.1f GB/s %6.2f G weights/s\n", c.name, best * 1e3,
                2.0 * static_cast<double>(rows * n * k) / best / 1e9, read / best / 1e9,
                static_cast<double>(n * k) / best / 1e9);
  }
}
