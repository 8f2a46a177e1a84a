// `RoundBlock` of every instruction set of this CPU: it writes the codes of a block up to its stride and nothing else, sets
// those beyond its size to 0, and reads no activation beyond it: the activations end at a page without access.

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include "blockwise.h"
#include "machine.h"

namespace llm_jax {
#define LLM_JAX_PATH_HEADER "blockwise_path.h"
#include "every_path.h"
}  // namespace llm_jax

template <typename Function>
static bool Right(const char* name, Function round, float* end, int64_t size, int64_t stride) {
  constexpr int8_t kUntouched = 99;
  float* x = end - size;
  int32_t expected = 0, sum;
  for (int64_t i = 0; i < size; ++i) x[i] = static_cast<float>((i * 37) % 127 - 90);
  x[0] = 127;  // the scale is 1
  for (int64_t i = 0; i < size; ++i) expected += static_cast<int32_t>(x[i]);
  int8_t codes[96];
  std::memset(codes, kUntouched, sizeof(codes));
  bool right = round(x, size, stride, codes + 32, &sum) == 0x42fe0000u && sum == expected;  // the bits of 127
  for (int64_t i = -32; i < 64; ++i) {
    const int8_t wanted = i < 0 || i >= stride ? kUntouched : i < size ? static_cast<int8_t>(x[i]) : 0;
    right &= codes[32 + i] == wanted;
  }
  if (!right) std::fprintf(stderr, "%s: %d of %d codes are wrong\n", name, static_cast<int>(size), static_cast<int>(stride));
  return right;
}

int main() {
  using namespace llm_jax;
  constexpr int64_t kPage = 4096;
  char* memory = static_cast<char*>(mmap(nullptr, 2 * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (memory == MAP_FAILED || mprotect(memory + kPage, kPage, PROT_NONE)) return 2;
  float* end = reinterpret_cast<float*>(memory + kPage);
  bool right = true;
  for (int64_t size = 1; size <= kBlock; ++size) {
    for (int64_t stride = (size + 3) / 4 * 4; stride <= kBlock; stride += 4) {
      right &= Right("portable", portable::RoundBlock, end, size, stride);
#if LLM_JAX_X86
      if (HasPath(kAvx2)) right &= Right("avx2", avx2::RoundBlock, end, size, stride);
      if (HasPath(kAvx512)) right &= Right("avx512", avx512::RoundBlock, end, size, stride);
#endif
    }
  }
  return !right;
}
