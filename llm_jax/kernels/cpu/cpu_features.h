// What an x86-64 CPU and its operating system announce by CPUID and XGETBV. Included by machine.h.

#ifndef LLM_JAX_KERNELS_CPU_CPU_FEATURES_H_
#define LLM_JAX_KERNELS_CPU_CPU_FEATURES_H_

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>

namespace llm_jax {

struct Features {
  uint32_t leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx;
  uint32_t states;  // XCR0: the registers that the operating system saves; 0 if it does not say
};

static inline Features FeaturesOfCpu() {
  Features f{};
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) f.leaf1_ecx = c;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    f.leaf7_ebx = b;
    f.leaf7_ecx = c;
    f.leaf7_edx = d;
  }
  constexpr uint32_t kOsXsave = 1u << 27;
  if (f.leaf1_ecx & kOsXsave) asm volatile("xgetbv" : "=a"(f.states), "=d"(d) : "c"(0));
  return f;
}

static inline bool HasAll(uint32_t bits, uint32_t wanted) { return (bits & wanted) == wanted; }

// Each instruction set that the compiler may use for a path; see every_path.h.
static inline bool HasAvx2(const Features& f) {
  constexpr uint32_t kFma = 1u << 12, kAvx = 1u << 28, kF16c = 1u << 29, kAvx2 = 1u << 5, kYmm = 3u << 1;
  return HasAll(f.leaf1_ecx, kFma | kAvx | kF16c) && HasAll(f.leaf7_ebx, kAvx2) && HasAll(f.states, kYmm);
}

static inline bool HasAvx512(const Features& f) {
  constexpr uint32_t kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31, kZmm = 7u << 5;
  return HasAvx2(f) && HasAll(f.leaf7_ebx, kF | kDq | kBw | kVl) && HasAll(f.states, kZmm);
}

static inline bool HasVnni(const Features& f) {
  constexpr uint32_t kVnni = 1u << 11;
  return HasAvx512(f) && HasAll(f.leaf7_ecx, kVnni);
}

}  // namespace llm_jax
#endif

#endif  // LLM_JAX_KERNELS_CPU_CPU_FEATURES_H_
