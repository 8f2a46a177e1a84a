// Calls the kernels with operands from a file, which tests/kernels/remote.py writes, and leaves the results in it: for CPUs
// that only an emulator has. Operands end where memory that cannot be read begins.

#include <fcntl.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

extern "C" {
const char* llm_jax_quantized_product(const void*, int64_t, int64_t, int64_t);
const char* llm_jax_blockwise_product(const void*, int64_t, int64_t, int64_t);
const char* llm_jax_integer_product(const void*, int64_t);
const char* llm_jax_bfloat16_product(const void*, int64_t, int64_t);
const char* llm_jax_cached_attention(const void*, int64_t, int64_t);
int64_t llm_jax_has_path(int64_t);
}

struct Call {
  int64_t function, path, threads, request;
};

static const char* Run(const Call& c, const void* request) {
  switch (c.function) {
    case 0: return llm_jax_quantized_product(request, 1, c.path, c.threads);
    case 1: return llm_jax_blockwise_product(request, 1, c.path, c.threads);
    case 2: return llm_jax_integer_product(request, c.threads);
    case 3: return llm_jax_bfloat16_product(request, c.path, c.threads);
    case 4: return llm_jax_cached_attention(request, c.path, c.threads);
  }
  return "the function";
}

// remote FILE ADDRESS SIZE CALLS GUARDS: the file is mapped at the address; at offset 0 lie the calls and, after them, the
// offsets of the pages without access. `remote PATH` exits with 0 if this CPU has the path.
int main(int argc, char** argv) {
  if (argc == 2) return !llm_jax_has_path(std::atoll(argv[1]));
  if (argc != 6) return 2;
  const int64_t address = std::atoll(argv[2]), size = std::atoll(argv[3]), calls = std::atoll(argv[4]),
                guards = std::atoll(argv[5]);
  void* at = reinterpret_cast<void*>(address);
  const int file = open(argv[1], O_RDWR);
  if (mmap(at, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) != at) return 3;
  const Call* call = reinterpret_cast<const Call*>(at);
  const int64_t* guard = reinterpret_cast<const int64_t*>(call + calls);
  for (int64_t i = 0; i < guards; ++i) {
    if (mprotect(reinterpret_cast<void*>(address + guard[i]), 4096, PROT_NONE)) return 4;
  }
  for (int64_t i = 0; i < calls; ++i) {
    if (const char* reason = Run(call[i], reinterpret_cast<const void*>(call[i].request))) {
      std::fprintf(stderr, "call %lld: %s\n", static_cast<long long>(i), reason);
      return 1;
    }
  }
}
