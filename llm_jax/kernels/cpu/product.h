// A product y = x W^T of float32 rows with a weight of codes, and the scales of its groups.

#ifndef LLM_JAX_KERNELS_CPU_PRODUCT_H_
#define LLM_JAX_KERNELS_CPU_PRODUCT_H_

#include <cstdint>
#include <cstring>

namespace llm_jax {

enum CodeKind : int64_t { kInt8 = 0, kUint8 = 1, kTable = 2 };
enum ScaleKind : int64_t { kNone = 0, kFloat32 = 1, kFloat16 = 2, kExponent = 3, kNested = 4 };

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
  int64_t tiled;  // `data` is (columns / 16, rows, 16)
};

constexpr int64_t kTileOutputs = 16, kTileRows = 4;

// Letters of shapes: M rows of x, K inputs, N outputs, B = bits K / 8 bytes of the codes of an output.
struct Product {
  const float* x;        // (M, K)
  const uint8_t* codes;  // by_output: (N, B); tiled: (N / 16, B / 4, 16, 4), codes (B, N) in tiles; else (B, N)
  float* y;              // (M, N)
  int64_t rows, inputs, outputs;
  int64_t kind, bits, group, by_output, tiled;  // group: inputs that share a scale; it divides K
  const float* table;                    // values of the codes of kTable, 2^bits
  Scales scale, offset;                  // by_output: (N, K / group), else (K / group, N)
};

// A byte holds 8 / bits codes, lowest bits first: those at one index of the equal parts of a group. So byte
// `b` of a group that has `group_bytes` bytes holds the inputs b, b + group_bytes, ... of the group.
inline int64_t CodesPerByte(const Product& p) { return 8 / p.bits; }
inline int64_t GroupBytes(const Product& p) { return p.group / CodesPerByte(p); }
inline int64_t NumGroups(const Product& p) { return p.inputs / p.group; }

inline int64_t ScaleIndex(const Scales& s, int64_t row, int64_t column) {
  if (!s.tiled) return row * s.columns + column;
  return (column / kTileOutputs * s.rows + row) * kTileOutputs + column % kTileOutputs;
}

// Whether the values of the table are consecutive integers.
inline bool IsConsecutive(const Product& p) {
  const int64_t first = static_cast<int64_t>(p.table[0]);
  for (int64_t i = 0; i < 1 << p.bits; ++i) {
    if (p.table[i] != static_cast<float>(first + i)) return false;
  }
  return true;
}

inline float HalfToFloat(uint16_t half) {
#if defined(__aarch64__)
  __fp16 number;
  std::memcpy(&number, &half, 2);
  return number;
#else
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
#endif
}

// Never inlined: a compiler that joins the operations for one caller only would make results depend on the caller.
__attribute__((noinline)) inline float NestedScale(const Scales& s, int64_t row, int64_t column) {
  const int64_t inner_row = row * s.inner_rows / s.rows, inner_column = column * s.inner_columns / s.columns;
  const float inner = s.inner[inner_row * s.inner_columns + inner_column];
  return s.table[static_cast<const uint8_t*>(s.data)[ScaleIndex(s, row, column)]] * inner + s.mean;
}

inline float ScaleAt(const Scales& s, int64_t row, int64_t column) {
  row = s.rows == 1 ? 0 : row;
  column = s.columns == 1 ? 0 : column;
  const int64_t index = ScaleIndex(s, row, column);
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
    case kNested:
      return NestedScale(s, row, column);
    default:
      return 0.0f;
  }
}

inline bool Divides(int64_t part, int64_t whole) { return part > 0 && whole % part == 0; }

inline const char* CheckScales(const Product& p, const Scales& s) {
  const int64_t groups = NumGroups(p), rows = p.by_output ? p.outputs : groups,
                columns = p.by_output ? groups : p.outputs;
  if ((s.rows != rows && s.rows != 1) || (s.columns != columns && s.columns != 1)) return "the shape of the scales";
  if (s.kind == kNested && !(Divides(s.inner_rows, s.rows) && Divides(s.inner_columns, s.columns))) {
    return "the shape of the scales of the scales";
  }
  if (s.tiled && !(p.tiled && s.columns == p.outputs)) return "the layout of the scales";
  return nullptr;
}

// What is wrong with the sizes of a product, or null.
inline const char* Check(const Product& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (p.rows < 0 || p.inputs < 1 || p.outputs < 0) return "the shape of the operands";
  if (p.rows > kMost || p.inputs > (1 << 20) || p.outputs > kMost) return "the size of the operands";
  if (p.bits != 8 && p.bits != 4 && p.bits != 2) return "the bits of a code";
  if (p.kind != (p.bits < 8 ? kTable : p.kind) || p.kind < kInt8 || p.kind > kUint8 + (p.bits < 8)) return "the codes";
  if (!Divides(p.group, p.inputs) || !Divides(CodesPerByte(p), p.group)) return "the size of a group";
  if (p.tiled && (p.by_output || p.outputs % kTileOutputs || GroupBytes(p) % kTileRows)) return "the layout of the codes";
  if (const char* reason = CheckScales(p, p.scale)) return reason;
  return p.offset.kind == kNone ? nullptr : CheckScales(p, p.offset);
}

// What is wrong with the sizes of the products of one x with `count` weights of the same format, group and layout, or null.
inline const char* Check(const Product* products, int64_t count) {
  if (count < 1) return "the number of weights";
  for (int64_t i = 0; i < count; ++i) {
    const Product &p = products[i], &first = products[0];
    if (const char* reason = Check(p)) return reason;
    if (p.rows != first.rows || p.inputs != first.inputs || p.group != first.group || p.bits != first.bits ||
        p.kind != first.kind || p.by_output != first.by_output || p.tiled != first.tiled || p.x != first.x) {
      return "one of several weights";
    }
  }
  return nullptr;
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_PRODUCT_H_
