// Products of activations that are rounded to 8 bits, in blocks of at most 32 inputs, with a weight of codes.
//
// A block never crosses a group of the weight. The largest magnitude of a block over 127 is its scale s, and its
// activations are the integers q, so that y = sum over blocks of s * scale * (sum of q * value of a code), plus s * offset *
// (sum of q). The inner sums are exact; the outer sum is in float32, in the order of the blocks. Values of codes are
// unit * (P - zero) with P of one byte; the values of a table such as NF4 are rounded to 1 / 127 of its largest.
// A row with a NaN or an inf gives NaN.

#ifndef LLM_JAX_KERNELS_CPU_BLOCKWISE_H_
#define LLM_JAX_KERNELS_CPU_BLOCKWISE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

namespace llm_jax {

constexpr int64_t kBlock = 32;  // most inputs of a block, as in ggml's Q8_0

// The values of codes as bytes.
struct ByteValues {
  bool table;  // else P is the code itself
  float unit;
  int32_t zero;
  alignas(16) uint8_t bytes[16];
};

inline ByteValues ByteValuesOf(const Product& p) {
  ByteValues v{};
  v.unit = 1;
  if (p.kind == kInt8) v.zero = 128;
  if (p.kind != kTable) return v;
  if (IsConsecutive(p)) {
    v.zero = -static_cast<int32_t>(p.table[0]);
    return v;
  }
  float largest = 0;
  for (int64_t i = 0; i < 1 << p.bits; ++i) largest = std::max(largest, std::fabs(p.table[i]));
  bool halves = largest <= 63;
  for (int64_t i = 0; i < 1 << p.bits; ++i) halves &= p.table[i] * 2 == std::nearbyint(p.table[i] * 2);
  const float inverse = halves ? 2.0f : 127.0f / largest;
  v.table = true;
  v.unit = 1.0f / inverse;
  v.zero = 128;
  for (int64_t i = 0; i < 16; ++i) {
    v.bytes[i] = static_cast<uint8_t>(128 + static_cast<int>(std::nearbyint(p.table[i % (1 << p.bits)] * inverse)));
  }
  return v;
}

// The byte P of the code of an input and an output.
inline int32_t ByteAt(const Product& p, const ByteValues& v, int64_t input, int64_t output) {
  const int64_t bytes = GroupBytes(p), in_group = input % p.group, row = input / p.group * bytes + in_group % bytes;
  const int64_t all = NumGroups(p) * bytes;
  const uint8_t byte = p.codes[p.by_output ? output * all + row : row * p.outputs + output];
  if (p.bits == 8) return p.kind == kInt8 ? static_cast<int8_t>(byte) + 128 : byte;
  const int code = (byte >> (in_group / bytes * p.bits)) & ((1 << p.bits) - 1);
  return v.table ? v.bytes[code] : code;
}

struct Block {
  int64_t first, size, group;  // its first input, its number of inputs, and their group of the weight
};

// Rows of codes that hold one block, with `joint` parts of a byte, or one block for each part.
struct Panel {
  int64_t begin, size, group, block;
};

struct Blocks {
  std::vector<Block> list;
  std::vector<Panel> panels;  // empty where blocks do not follow the bytes; they are then in the order of the inputs
  int64_t stride;             // bytes of the codes of a block: its size rounded up to 4
  bool joint;
};

inline Blocks BlocksOf(const Product& p) {
  Blocks b{};
  const int64_t bytes = GroupBytes(p), parts = CodesPerByte(p);
  b.stride = (std::min(kBlock, p.group) + 3) / 4 * 4;
  b.joint = p.group <= kBlock;
  const bool by_bytes = parts == 1 || (b.joint ? bytes % 4 == 0 : bytes % kBlock == 0);
  for (int64_t g = 0; g < NumGroups(p); ++g) {
    if (!by_bytes || b.joint) {
      if (by_bytes) b.panels.push_back({g * bytes, bytes, g, static_cast<int64_t>(b.list.size())});
      for (int64_t i = 0; i < p.group; i += kBlock) b.list.push_back({g * p.group + i, std::min(kBlock, p.group - i), g});
      continue;
    }
    for (int64_t i = 0; i < bytes; i += kBlock) {
      const int64_t size = std::min(kBlock, bytes - i);
      b.panels.push_back({g * bytes + i, size, g, static_cast<int64_t>(b.list.size())});
      for (int64_t s = 0; s < parts; ++s) b.list.push_back({g * p.group + s * bytes + i, size, g});
    }
  }
  return b;
}

constexpr uint32_t kInfinity = 0x7f800000u;  // the bits of an infinity; those of NaN are larger

inline float FromBits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The factor from the activations of a block to their codes, from the bits of the largest magnitude.
inline float Inverse(uint32_t bits) {
  const float largest = FromBits(bits);
  return bits < kInfinity && largest >= 1e-30f ? 127.0f / largest : 0.0f;
}

// Rounded activations; J is the number of blocks, S their stride.
struct Rounded {
  std::vector<int8_t> codes;   // (M, J, S), 0 beyond the size of a block
  std::vector<float> scale;    // (M, J): times the unit of the weight
  std::vector<float> total;    // (M, J): the sum of the rounded activations, for offsets
  std::vector<int32_t> start;  // (M, J): -zero times the sum of the codes
};

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_BLOCKWISE_H_
