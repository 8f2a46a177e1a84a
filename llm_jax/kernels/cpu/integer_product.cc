// Products of int8 activations and int8 weights with exact int32 sums, by the 8-bit dot products of AVX-512 VNNI and
// of NEON and by AMX, as an XLA custom call and as a C function.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

namespace llm_jax {

// y = float(x w) * x_scale * scale. Letters of shapes: M rows of x, K inputs, N outputs.
struct IntegerProduct {
  const int8_t* x;       // (M, K)
  const float* x_scale;  // (M)
  const int8_t* codes;   // by_output: (N, K), else (K, N)
  const float* scale;    // (scales), one for each output, or one for all
  float* y;              // (M, N)
  int64_t rows, inputs, outputs, by_output, scales;
};

#if LLM_JAX_X86
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "integer_vnni.h"
LLM_JAX_END_TARGET
#if LLM_JAX_AMX
LLM_JAX_TARGET(LLM_JAX_AMX_TARGET)
#include "integer_amx.h"
LLM_JAX_END_TARGET
#endif

template <typename Schedule>
static void Run(const IntegerProduct& p, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 18;  // multiplications that are worth the waking of a thread
#if LLM_JAX_AMX
  const bool by_amx = FastestPath() == kAmx && p.rows >= amx::kFewestRows;
#else
  const bool by_amx = false;
#endif
  const int64_t unit = by_amx ? 64 : 4, stride = (p.inputs + unit - 1) / unit * unit;
  // The sums start from -128 times those of x, because the weights are 128 too large.
  std::vector<int32_t> start(p.rows);
  for (int64_t m = 0; m < p.rows; ++m) {
    int32_t total = 0;
    for (int64_t k = 0; k < p.inputs; ++k) total += p.x[m * p.inputs + k];
    start[m] = static_cast<int32_t>(-128u * static_cast<uint32_t>(total));
  }
  std::vector<int8_t> padded;
  const int8_t* x = p.x;
  if (stride != p.inputs) {
    padded.resize(p.rows * stride);
    for (int64_t m = 0; m < p.rows; ++m) std::memcpy(padded.data() + m * stride, p.x + m * p.inputs, p.inputs);
    x = padded.data();
  }
  InParallel(
      (p.outputs + integers::kTile - 1) / integers::kTile,
      std::max<int64_t>(1, std::min(threads, p.rows * p.inputs * p.outputs / kWorth)), p.rows <= 16,
      [&](int64_t i) {
        thread_local std::vector<int8_t> packed;  // keeps its memory from call to call
        packed.resize(stride * integers::kTile + 64);
        const auto address = (reinterpret_cast<uintptr_t>(packed.data()) + 63) / 64 * 64;
        auto* tile = reinterpret_cast<__m512i*>(address);
#if LLM_JAX_AMX
        if (by_amx) return amx::Tile(p, x, stride, start.data(), i * integers::kTile, tile);
#endif
        integers::Tile(p, x, stride, start.data(), i * integers::kTile, tile);
      },
      schedule);
}
#elif LLM_JAX_ARM
LLM_JAX_TARGET(LLM_JAX_DOT_PRODUCTS)
#include "integer_neon.h"
LLM_JAX_END_TARGET

template <typename Schedule>
static void Run(const IntegerProduct& p, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 18;  // multiplications that are worth the waking of a thread
  const int64_t stride = (p.inputs + 15) / 16 * 16;
  std::vector<int8_t> padded(p.rows * stride);
  for (int64_t m = 0; m < p.rows; ++m) std::memcpy(padded.data() + m * stride, p.x + m * p.inputs, p.inputs);
  InParallel(
      (p.outputs + neon::kOutputs - 1) / neon::kOutputs,
      std::max<int64_t>(1, std::min(threads, p.rows * p.inputs * p.outputs / kWorth)), p.rows <= 16,
      [&](int64_t i) {
        thread_local std::vector<int8_t> packed;  // keeps its memory from call to call
        packed.resize(stride * neon::kOutputs);
        neon::Tile(p, padded.data(), stride, i * neon::kOutputs, packed.data());
      },
      schedule);
}
#else
template <typename Schedule>
static void Run(const IntegerProduct&, int64_t, const Schedule&) {}
#endif

// What is wrong with the sizes, or null.
static const char* Check(const IntegerProduct& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (FastestPath() < kVnni) return "the instruction set of the CPU";
  if (p.rows < 0 || p.inputs < 1 || p.outputs < 0) return "the shape of the operands";
  if (p.rows > kMost || p.inputs > (1 << 20) || p.outputs > kMost) return "the size of the operands";
  return p.scales == 1 || p.scales == p.outputs ? nullptr : "the shape of the scales";
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the product with `threads` new threads. Returns what is wrong with its sizes, or null.
const char* llm_jax_integer_product(const llm_jax::IntegerProduct* p, int64_t threads) {
  if (const char* reason = llm_jax::Check(*p)) return reason;
  llm_jax::OnNewThreads([&](const auto& schedule) { llm_jax::Run(*p, threads, schedule); });
  return nullptr;
}
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "xla/ffi/api/ffi.h"

namespace llm_jax {

namespace ffi = xla::ffi;

static ffi::Error IntegerProductCall(ffi::ThreadPool pool, ffi::Buffer<ffi::S8> x, ffi::Buffer<ffi::F32> x_scale,
                                     ffi::Buffer<ffi::S8> codes, ffi::Buffer<ffi::F32> scale,
                                     ffi::ResultBuffer<ffi::F32> y, int64_t by_output) {
  const auto refused = [](const char* what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("integer product: ") + what + " is wrong");
  };
  const auto shape = x.dimensions(), weight = codes.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || weight.size() != 2 || result.size() != 2) return refused("the rank of an operand");
  const IntegerProduct p{x.typed_data(), x_scale.typed_data(), codes.typed_data(), scale.typed_data(), y->typed_data(),
                         shape[0], shape[1], weight[by_output ? 0 : 1], by_output,
                         static_cast<int64_t>(scale.element_count())};
  if (weight[by_output ? 1 : 0] != p.inputs || result[0] != p.rows || result[1] != p.outputs) {
    return refused("the shape of the operands");
  }
  if (static_cast<int64_t>(x_scale.element_count()) != p.rows) return refused("the shape of the scales");
  if (const char* reason = Check(p)) return refused(reason);
  Run(p, std::max<int64_t>(1, pool.num_threads()), [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxIntegerProduct, llm_jax::IntegerProductCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()   // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // scales of x
                                  .Arg<xla::ffi::Buffer<xla::ffi::S8>>()   // codes
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // scales of the codes
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("by_output"));
#endif  // LLM_JAX_WITHOUT_XLA
