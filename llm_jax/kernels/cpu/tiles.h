// Weights whose codes lie in tiles: the layout in which a kernel reads them from the first to the last byte.
//
// A tile has all inputs of 16 outputs. It consists of quads of rows: for each output, the bytes of four rows of codes
// follow each other. Codes that do not lie so are copied to tiles for one product.

#ifndef LLM_JAX_KERNELS_CPU_TILES_H_
#define LLM_JAX_KERNELS_CPU_TILES_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

namespace llm_jax {

constexpr int64_t kQuadBytes = kTileOutputs * kTileRows;

inline int64_t NumQuads(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// A copy of tiled products whose codes lie by inputs.
class Untiled {
 public:
  explicit Untiled(const Product* products, int64_t count) : products_(products, products + count) {
    for (Product& p : products_) {
      p.codes = Codes(p);
      p.tiled = 0;
      p.scale = ScalesOf(p.scale);
      p.offset = ScalesOf(p.offset);
    }
  }

  const Product* data() const { return products_.data(); }

 private:
  uint8_t* Memory(int64_t size) {
    memory_.emplace_back(size);
    return memory_.back().data();
  }

  const uint8_t* Codes(const Product& p) {
    const int64_t rows = NumGroups(p) * GroupBytes(p);
    uint8_t* codes = Memory(rows * p.outputs);
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t n = 0; n < p.outputs; ++n) {
        const int64_t quad = n / kTileOutputs * (rows / kTileRows) + row / kTileRows;
        codes[row * p.outputs + n] = p.codes[quad * kQuadBytes + n % kTileOutputs * kTileRows + row % kTileRows];
      }
    }
    return codes;
  }

  Scales ScalesOf(Scales s) {
    if (!s.tiled) return s;
    const int64_t size = s.kind == kFloat32 ? 4 : s.kind == kFloat16 ? 2 : 1;
    uint8_t* data = Memory(s.rows * s.columns * size);
    for (int64_t row = 0; row < s.rows; ++row) {
      for (int64_t column = 0; column < s.columns; ++column) {
        std::memcpy(data + (row * s.columns + column) * size,
                    static_cast<const uint8_t*>(s.data) + ScaleIndex(s, row, column) * size, size);
      }
    }
    s.data = data;
    s.tiled = 0;
    return s;
  }

  std::vector<Product> products_;
  std::vector<std::vector<uint8_t>> memory_;
};

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_TILES_H_
