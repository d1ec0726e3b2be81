#include "cuda/host/matrix.h"

namespace edgelm::gpu {

Matrix Matrix::of(const Fields& fields, const std::string& prefix) {
  Matrix m{fields.text(prefix + "kind"),       fields.integer(prefix + "rows"), fields.integer(prefix + "columns"),
           fields.integer(prefix + "group"),   fields.flag(prefix + "zeros"),   fields.flag(prefix + "swiglu"),
           fields.integer(prefix + "count", 1)};
  for (i64 size : {m.rows, m.columns, m.group, m.count}) {
    if (size < 1 || size > kMostSize)
      throw Error("a matrix has a size of " + std::to_string(size), Error::Kind::kBundle);
  }
  if (m.columns % m.tile_columns() || m.columns % m.group || (m.swiglu && m.rows % 2)) {
    throw Error(std::to_string(m.rows) + " rows of " + std::to_string(m.columns) + " columns in groups of " +
                    std::to_string(m.group) + ", which no " + m.kind + " matrix has",
                Error::Kind::kBundle);
  }
  if (double(m.count) * double(m.rows) * double(m.columns) > 1e15) {  // bytes of parts then fit 64 bits
    throw Error(m.text() + ": too large", Error::Kind::kBundle);
  }
  return m;
}

std::string Matrix::text() const {
  return std::to_string(count) + (swiglu ? " SwiGLU" : "") + (count == 1 ? " matrix [" : " matrices [") +
         std::to_string(rows) + ", " + std::to_string(columns) + "] of " + kind + " in groups of " +
         std::to_string(group) + (zeros ? " with zero points" : "");
}

i64 Matrix::tile_columns() const {
  if (kind == "int4") return 64;
  if (kind == "int8" || kind == "fp8") return 32;
  if (kind == "f16" || kind == "bf16") return 16;
  if (kind == "f32") return 8;
  throw Error("weights of the kind " + kind + ": upgrade edgelm", Error::Kind::kBundle);
}

i64 Matrix::scale_bytes() const { return kind == "int4" || kind == "int8" ? 2 : kind == "fp8" ? 4 : 0; }

}  // namespace edgelm::gpu
