// Products of few rows with a bfloat16 weight, with float32 sums, as an XLA custom call and as a C function.
//
// An output is computed by one thread, always in the same order, so results depend neither on the number of threads nor on
// the other rows.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"

namespace llm_jax {

// y = x w. Letters of shapes: M rows of x, K inputs, N outputs.
struct BFloat16Product {
  const uint16_t* x;  // (M, K)
  const uint16_t* w;  // by_output: (N, K), else (K, N)
  float* y;           // (M, N)
  int64_t rows, inputs, outputs, by_output;
};

#define LLM_JAX_PATH_HEADER "bfloat16_path.h"
#include "every_path.h"

#if LLM_JAX_AMX
LLM_JAX_TARGET(LLM_JAX_AMX_TARGET)
#include "bfloat16_amx.h"
LLM_JAX_END_TARGET

template <typename Schedule>
static void RunByAmx(const BFloat16Product& p, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 16;  // weights that are worth the waking of a thread
  const int64_t stride = (p.inputs + amx::kInputs - 1) / amx::kInputs * amx::kInputs;
  std::vector<uint16_t> padded;
  if (stride != p.inputs) {
    padded.resize(p.rows * stride);
    for (int64_t m = 0; m < p.rows; ++m) std::memcpy(padded.data() + m * stride, p.x + m * p.inputs, 2 * p.inputs);
  }
  const uint16_t* x = stride == p.inputs ? p.x : padded.data();
  const int64_t useful = std::max<int64_t>(1, std::min(threads, p.inputs * p.outputs / kWorth));
  InParallel((p.outputs + amx::kOutputs - 1) / amx::kOutputs, useful, p.rows <= 16,
             [&](int64_t i) {
               const int64_t first = i * amx::kOutputs;
               amx::Outputs(p, x, stride, first, std::min(first + amx::kOutputs, p.outputs));
             },
             schedule);
}
#endif

static void Outputs(const BFloat16Product& p, Path path, const float* x, int64_t begin, int64_t end) {
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Outputs(p, x, begin, end);
  if (path == kAvx2) return avx2::Outputs(p, x, begin, end);
#endif
  portable::Outputs(p, x, begin, end);
}

template <typename Schedule>
static void Run(const BFloat16Product& p, Path path, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 16;  // weights that are worth the waking of a thread
#if LLM_JAX_AMX
  // One row is bound by memory, and the weight is not packed for it.
  if (path == kAmx || (path == kAuto && p.rows > 1 && FastestPath() == kAmx)) return RunByAmx(p, threads, schedule);
#endif
  if (path == kAuto) path = FastestPath();
  thread_local std::vector<float> wide;  // keeps its memory from call to call
  wide.resize(p.rows * p.inputs);
  const float* x = wide.data();
  for (int64_t i = 0; i < p.rows * p.inputs; ++i) wide[i] = portable::Wide(p.x[i]);
  const int64_t useful = std::max<int64_t>(1, std::min(threads, p.inputs * p.outputs / kWorth));
  const int64_t unit = p.by_output ? 1 : 64, units = (p.outputs + unit - 1) / unit;
  const int64_t parts = std::max<int64_t>(1, std::min(units, useful > 1 ? 4 * useful : 1));
  const int64_t size = (units + parts - 1) / parts * unit;
  InParallel((p.outputs + size - 1) / size, useful, true,
             [&](int64_t i) { Outputs(p, path, x, i * size, std::min((i + 1) * size, p.outputs)); }, schedule);
}

// What is wrong with the sizes, or null.
static const char* Check(const BFloat16Product& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (p.rows < 0 || p.inputs < 1 || p.outputs < 1) return "the shape of the operands";
  return p.rows > kMost || p.inputs > kMost || p.outputs > kMost ? "the size of the operands" : nullptr;
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the product with `threads` new threads. Returns what is wrong with its sizes, or null.
const char* llm_jax_bfloat16_product(const llm_jax::BFloat16Product* p, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(*p)) return reason;
  llm_jax::OnNewThreads(
      [&](const auto& schedule) { llm_jax::Run(*p, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "xla/ffi/api/ffi.h"

namespace llm_jax {

namespace ffi = xla::ffi;

static ffi::Error BFloat16ProductCall(ffi::ThreadPool pool, ffi::Buffer<ffi::BF16> x, ffi::Buffer<ffi::BF16> w,
                                      ffi::ResultBuffer<ffi::F32> y, int64_t by_output, int64_t path) {
  const auto refused = [](const char* what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("bfloat16 product: ") + what + " is wrong");
  };
  const auto shape = x.dimensions(), weight = w.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || weight.size() != 2 || result.size() != 2) return refused("the rank of an operand");
  const BFloat16Product p{static_cast<const uint16_t*>(x.untyped_data()), static_cast<const uint16_t*>(w.untyped_data()),
                          y->typed_data(), shape[0], shape[1], weight[by_output ? 0 : 1], by_output};
  if (weight[by_output ? 1 : 0] != p.inputs || result[0] != p.rows || result[1] != p.outputs) {
    return refused("the shape of the operands");
  }
  if (const char* reason = Check(p)) return refused(reason);
  Run(p, static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()),
      [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxBFloat16Product, llm_jax::BFloat16ProductCall,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // x
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()  // w
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("by_output")
                                  .Attr<int64_t>("path"));
#endif  // LLM_JAX_WITHOUT_XLA
