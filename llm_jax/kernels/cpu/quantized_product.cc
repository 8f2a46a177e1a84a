// Products with quantized weights for few rows of activations, as an XLA custom call and as a C function.
//
// The instruction set is chosen when a product runs. An output is computed by one thread, always in the same order, so
// results depend neither on the number of threads nor on the other rows of activations.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"
#include "product.h"

namespace llm_jax {

#define LLM_JAX_PATH_HEADER "float_path.h"
#include "every_path.h"

#if LLM_JAX_X86
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "vnni_loads.h"
#include "vnni_operands.h"
#include "vnni_path.h"
LLM_JAX_END_TARGET
#endif

static void FloatOutputs(const Product& p, Path path, int64_t row, int64_t begin, int64_t end) {
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Outputs(p, row, begin, end);
  if (path == kAvx2) return avx2::Outputs(p, row, begin, end);
#endif
  portable::Outputs(p, row, begin, end);
}

// The parts of a product, which threads take one after the other: several for each, so that none waits long for another.
struct Parts {
  int64_t size, count, threads;  // outputs of a part
};

static Parts PartsOf(const Product& p, int64_t threads) {
  constexpr int64_t kWorth = 1 << 17, kUnit = 64;  // codes times rows that are worth the waking of a thread
  const int64_t work = p.inputs * p.outputs * std::min<int64_t>(p.rows, 4);
  const int64_t useful = std::max<int64_t>(1, std::min(threads, work / kWorth));
  const int64_t units = (p.outputs + kUnit - 1) / kUnit, count = useful > 1 ? 4 * useful : 1;
  const int64_t size = (units + count - 1) / count * kUnit;
  return {size, (p.outputs + size - 1) / size, useful};
}

template <typename Schedule>
static void Run(const Product& p, Path path, int64_t threads, const Schedule& schedule) {
  if (path == kAuto) path = FastestPath();
  const Parts parts = PartsOf(p, threads);
#if LLM_JAX_X86
  if (path == kVnni && vnni::Has(p)) {
    thread_local vnni::Activations activations;  // keeps its memory from call to call
    const vnni::Planes planes = vnni::PlanesOf(p);
    vnni::Prepare(p, planes, &activations);
    const vnni::Activations& prepared = activations;
    InParallel(
        parts.count, parts.threads,
        [&](int64_t i) {
          const int64_t begin = i * parts.size, end = std::min(begin + parts.size, p.outputs);
          if (!prepared.finite.empty()) vnni::Outputs(p, planes, prepared, begin, end);
          for (int64_t row : prepared.others) FloatOutputs(p, path, row, begin, end);
        },
        schedule);
    return;
  }
#endif
  InParallel(
      parts.count, parts.threads,
      [&](int64_t i) {
        const int64_t begin = i * parts.size, end = std::min(begin + parts.size, p.outputs);
        for (int64_t row = 0; row < p.rows; ++row) FloatOutputs(p, path, row, begin, end);
      },
      schedule);
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the product with `threads` new threads. Returns what is wrong with its sizes, or null.
const char* llm_jax_quantized_product(const llm_jax::Product* p, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(*p)) return reason;
  llm_jax::OnNewThreads(
      [&](const auto& schedule) { llm_jax::Run(*p, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}

int64_t llm_jax_fastest_path() { return llm_jax::FastestPath(); }
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "operands.h"

namespace llm_jax {

static ffi::Error QuantizedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes,
                                   ffi::AnyBuffer scale, ffi::AnyBuffer inner, ffi::AnyBuffer mean,
                                   ffi::AnyBuffer offset, ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group,
                                   int64_t by_output, int64_t path, ffi::Span<const float> values,
                                   ffi::Span<const float> scale_values) {
  const auto shape = x.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || result.size() != 2) return Refused("the rank of an operand");
  Product p{};
  const Weight weight{codes, scale, inner, mean, offset, bits, group, by_output, values, scale_values};
  if (const char* reason = ToProduct(weight, &p)) return Refused(reason);
  p.x = x.typed_data();
  p.y = y->typed_data();
  p.rows = shape[0];
  if (shape[1] != p.inputs || result[0] != p.rows || result[1] != p.outputs) return Refused("the shape of the operands");
  if (const char* reason = Check(p)) return Refused(reason);
  Run(p, static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()),
      [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxQuantizedProduct, llm_jax::QuantizedProduct,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .Arg<xla::ffi::AnyBuffer>()              // codes
                                  .Arg<xla::ffi::AnyBuffer>()              // scale
                                  .Arg<xla::ffi::AnyBuffer>()              // inner scale, or of size 0
                                  .Arg<xla::ffi::AnyBuffer>()              // mean of the scales, or of size 0
                                  .Arg<xla::ffi::AnyBuffer>()              // offset, or of size 0
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("by_output")
                                  .Attr<int64_t>("path")
                                  .Attr<xla::ffi::Span<const float>>("values")
                                  .Attr<xla::ffi::Span<const float>>("scale_values"));
#endif  // LLM_JAX_WITHOUT_XLA
