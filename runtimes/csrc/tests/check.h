// EXPECT for tests: prints what failed and where. The program's exit status says whether anything failed.
#ifndef EDGELM_TESTS_CHECK_H_
#define EDGELM_TESTS_CHECK_H_

#include <cstdio>

namespace edgelm_test {

inline int failures = 0;

// `...` is a printf format with its arguments: the case that was being tried.
#define EXPECT(condition, ...)                                                                                         \
  do {                                                                                                                 \
    if (!(condition) && ++::edgelm_test::failures <= 20) {                                                             \
      std::fprintf(stderr, "%s:%d: failed: %s: ", __FILE__, __LINE__, #condition);                                     \
      std::fprintf(stderr, __VA_ARGS__);                                                                               \
      std::fputc('\n', stderr);                                                                                        \
    }                                                                                                                  \
  } while (0)

// The exit status of a test program.
inline int Finish() {
  if (failures != 0) std::fprintf(stderr, "%d failure(s)\n", failures);
  return failures != 0;
}

}  // namespace edgelm_test

#endif  // EDGELM_TESTS_CHECK_H_
