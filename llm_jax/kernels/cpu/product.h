// A product y = x W^T of float32 rows with a weight of codes, and the scales of its groups.

#ifndef LLM_JAX_KERNELS_CPU_PRODUCT_H_
#define LLM_JAX_KERNELS_CPU_PRODUCT_H_

#include <cstdint>
#include <cstring>

namespace llm_jax {

enum CodeKind : int64_t { kInt8 = 0, kUint8 = 1, kTable = 2 };
enum ScaleKind : int64_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kExponent = 3, kNested = 4 };
enum Path : int64_t { kAuto = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3, kVnni = 4 };

// A matrix of scales (rows, columns); an axis of size 1 is shared by all rows or columns.
// kExponent: a byte e is 2^(e - 127). kNested: a byte c is table[c] * inner + mean, and `inner` has
// (inner_rows, inner_columns) float32 values, each for an equal part of an axis.
struct Scales {
  const void* data;
  int64_t kind, rows, columns;
  const float* table;
  const float* inner;
  int64_t inner_rows, inner_columns;
  float mean;
};

// Letters of shapes: M rows of x, K inputs, N outputs, B = bits K / 8 bytes of the codes of an output.
struct Product {
  const float* x;        // (M, K)
  const uint8_t* codes;  // by_output: (N, B), else (B, N)
  float* y;              // (M, N)
  int64_t rows, inputs, outputs;
  int64_t kind, bits, group, by_output;  // group: inputs that share a scale; it divides K
  const float* table;                    // values of the codes of kTable, 2^bits
  Scales scale, offset;                  // by_output: (N, K / group), else (K / group, N)
};

// A byte holds 8 / bits codes, lowest bits first: those at one index of the equal parts of a group. So byte
// `b` of a group that has `group_bytes` bytes holds the inputs b, b + group_bytes, ... of the group.
inline int64_t CodesPerByte(const Product& p) { return 8 / p.bits; }
inline int64_t GroupBytes(const Product& p) { return p.group / CodesPerByte(p); }
inline int64_t NumGroups(const Product& p) { return p.inputs / p.group; }

// Whether the values of the table are consecutive integers.
inline bool IsConsecutive(const Product& p) {
  const int64_t first = static_cast<int64_t>(p.table[0]);
  for (int64_t i = 0; i < 1 << p.bits; ++i) {
    if (p.table[i] != static_cast<float>(first + i)) return false;
  }
  return true;
}

inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff;
  uint32_t bits = sign | ((exponent + 112) << 23) | (fraction << 13);
  if (exponent == 31) bits = sign | 0x7f800000u | (fraction << 13);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    std::memcpy(&bits, &magnitude, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline float ScaleAt(const Scales& s, int64_t row, int64_t column) {
  row = s.rows == 1 ? 0 : row;
  column = s.columns == 1 ? 0 : column;
  const int64_t index = row * s.columns + column;
  switch (s.kind) {
    case kFloat32:
      return static_cast<const float*>(s.data)[index];
    case kFloat16:
      return HalfToFloat(static_cast<const uint16_t*>(s.data)[index]);
    case kExponent: {
      const uint32_t bits = static_cast<uint32_t>(static_cast<const uint8_t*>(s.data)[index]) << 23;
      float value;
      std::memcpy(&value, &bits, 4);
      return value;
    }
    case kNested: {
      const int64_t inner_row = row * s.inner_rows / s.rows, inner_column = column * s.inner_columns / s.columns;
      const float inner = s.inner[inner_row * s.inner_columns + inner_column];
      return s.table[static_cast<const uint8_t*>(s.data)[index]] * inner + s.mean;
    }
    default:
      return 0.0f;
  }
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_PRODUCT_H_
