// The parts of products of one x with several weights, which threads take one after the other.

#ifndef LLM_JAX_KERNELS_CPU_PARTS_H_
#define LLM_JAX_KERNELS_CPU_PARTS_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "product.h"

namespace llm_jax {

struct Part {
  int64_t weight, first_row, last_row, begin, end;
};

// The threads that are worth waking, where `rows` rows of x are computed in about the time of their products.
inline int64_t UsefulThreads(const Product* products, int64_t count, int64_t threads, int64_t rows) {
  constexpr int64_t kWorth = 1 << 17;  // codes times rows
  int64_t codes = 0;
  for (int64_t i = 0; i < count; ++i) codes += products[i].inputs * products[i].outputs;
  return std::max<int64_t>(1, std::min(threads, codes * rows / kWorth));
}

// Several parts for each thread, so that none waits long for another: few where codes lie by inputs, because the bytes of a
// part that lie together in memory are then as many as its outputs. Rows are divided only where there are many.
inline std::vector<Part> PartsOf(const Product* products, int64_t count, int64_t threads, bool divide_rows) {
  constexpr int64_t kUnit = 64, kFewRows = 48;
  int64_t units = 0;
  for (int64_t i = 0; i < count; ++i) units += (products[i].outputs + kUnit - 1) / kUnit;
  const int64_t rows = products[0].rows, wanted = threads > 1 ? (products[0].by_output ? 16 : 4) * threads : 1;
  const int64_t size = (units + wanted - 1) / wanted * kUnit;
  int64_t row_parts = 1;
  if (divide_rows) row_parts = std::max<int64_t>(1, std::min(rows / kFewRows, (wanted + units - 1) / std::max<int64_t>(units, 1)));
  const int64_t row_size = std::max<int64_t>(1, (rows + row_parts - 1) / row_parts);
  std::vector<Part> parts;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < products[i].outputs; n += size) {
      for (int64_t m = 0; m < rows; m += row_size) {
        parts.push_back({i, m, std::min(m + row_size, rows), n, std::min(n + size, products[i].outputs)});
      }
    }
  }
  return parts;
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_PARTS_H_
