// Includes the header LLM_JAX_PATH_HEADER once for every instruction set, in a namespace of its own.
// LLM_JAX_VECTOR_BITS is the width of its vectors, 0 if portable: g++ does not define __AVX2__ by a pragma.
// No guard: each kernel includes this file with a header of its own.

#define LLM_JAX_VECTOR_BITS 0
namespace portable {
#include LLM_JAX_PATH_HEADER
}  // namespace portable
#undef LLM_JAX_VECTOR_BITS

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
#define LLM_JAX_VECTOR_BITS 256
namespace avx2 {
#include LLM_JAX_PATH_HEADER
}  // namespace avx2
#undef LLM_JAX_VECTOR_BITS
LLM_JAX_END_TARGET
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
#define LLM_JAX_VECTOR_BITS 512
namespace avx512 {
#include LLM_JAX_PATH_HEADER
}  // namespace avx512
#undef LLM_JAX_VECTOR_BITS
LLM_JAX_END_TARGET
#endif

#undef LLM_JAX_PATH_HEADER
