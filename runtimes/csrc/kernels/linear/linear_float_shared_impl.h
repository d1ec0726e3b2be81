// LinearFloat for an instruction set that adds nothing to floats: that of EDGELM_FLOATS_OF, the table of the one below it.
#ifndef EDGELM_KERNELS_LINEAR_FLOAT_SHARED_IMPL_H_
#define EDGELM_KERNELS_LINEAR_FLOAT_SHARED_IMPL_H_

namespace edgelm {

extern const Kernels EDGELM_FLOATS_OF;

namespace {

void LinearFloat(const Matrix& m, int64_t begin, int64_t end, const float* x, int64_t ldx, int64_t rows,
                 const Output& out) {
  EDGELM_FLOATS_OF.linear.linear_float(m, begin, end, x, ldx, rows, out);
}

}  // namespace
}  // namespace edgelm

#endif  // EDGELM_KERNELS_LINEAR_FLOAT_SHARED_IMPL_H_
