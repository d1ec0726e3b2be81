// How the kernels are compiled. Vector code is inlined into loops of its own, so that values stay in registers. The scalar
// table has no registers to fill: there the same took ten times as much code as the calls do, a megabyte.
#ifndef EDGELM_KERNELS_FLAT_H_
#define EDGELM_KERNELS_FLAT_H_

#if defined(EDGELM_FOR_SIZE)
#define EDGELM_FLAT
#else
#define EDGELM_FLAT __attribute__((always_inline))
#endif

#endif  // EDGELM_KERNELS_FLAT_H_
