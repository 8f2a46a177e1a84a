// Activations as 24-bit integers in units of a power of two.

#ifndef LLM_JAX_KERNELS_CPU_INTEGERS_H_
#define LLM_JAX_KERNELS_CPU_INTEGERS_H_

#include <cstdint>
#include <cstring>

#include "product.h"

namespace llm_jax {

constexpr float kLargest = 8355711;  // 127 (65536 + 256 + 1): three balanced digits of base 256, or two of base 4096

// 2^e for exponents of normal numbers.
inline float PowerOfTwo(int e) {
  const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// The power of two by which numbers up to `largest`, a normal number, are multiplied to be integers up to `kLargest`.
inline int Exponent(float largest) {
  uint32_t bits;
  std::memcpy(&bits, &largest, 4);
  const int e = 22 - (static_cast<int>(bits >> 23) - 127);
  return largest * PowerOfTwo(e) <= kLargest ? e : e - 1;
}

// The input that byte `b` of a row of codes holds in its lowest bits.
inline int64_t InputOfByte(const Product& p, int64_t b) {
  const int64_t bytes = GroupBytes(p);
  return b / bytes * p.group + b % bytes;
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_INTEGERS_H_
