// Includes the header LLM_JAX_PATH_HEADER once for every instruction set, in a namespace of its own.
// No guard: each kernel includes this file with a header of its own.

namespace portable {
#include LLM_JAX_PATH_HEADER
}  // namespace portable

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
namespace avx2 {
#include LLM_JAX_PATH_HEADER
}  // namespace avx2
LLM_JAX_END_TARGET
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include LLM_JAX_PATH_HEADER
}  // namespace avx512
LLM_JAX_END_TARGET
#endif

#undef LLM_JAX_PATH_HEADER
