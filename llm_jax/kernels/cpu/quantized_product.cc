// Products with quantized weights for few rows of activations, as an XLA custom call and as a C function. Several weights
// may share the activations, which are then prepared once.
//
// The instruction set is chosen when a product runs. An output is computed by one thread, always in the same order, so
// results depend neither on the number of threads nor on the other rows of activations.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "integers.h"
#include "machine.h"
#include "parts.h"
#include "product.h"
#include "tiles.h"

namespace llm_jax {

#define LLM_JAX_PATH_HEADER "float_path.h"
#include "every_path.h"

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
#include "quads_avx2.h"
#include "quantized_avx2.h"
LLM_JAX_END_TARGET
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

// The products of the same x with `count` weights of the same format, group and layout.
template <typename Schedule>
static void Run(const Product* products, int64_t count, Path path, int64_t threads, const Schedule& schedule) {
  if (path == kAuto) path = FastestPath();
  if (products[0].tiled && path != kAvx2 && path != kAvx512) {
    return Run(Untiled(products, count).data(), count, path, threads, schedule);
  }
  const int64_t useful = UsefulThreads(products, count, threads, std::min<int64_t>(products[0].rows, 4));
  const std::vector<Part> parts = PartsOf(products, count, useful, false);
  // Calls outputs(product, begin, end) for each part, and computes the rows `others` of x in float32.
  const auto run = [&](const std::vector<int64_t>& others, const auto& outputs) {
    InParallel(
        parts.size(), useful, true,
        [&](int64_t i) {
          const Part& part = parts[i];
          const Product& p = products[part.weight];
          outputs(p, part.begin, part.end);
          for (int64_t row : others) FloatOutputs(p, path, row, part.begin, part.end);
        },
        schedule);
  };
#if LLM_JAX_X86
  if (path >= kVnni && vnni::Has(products[0])) {
    thread_local vnni::Activations activations;  // keeps its memory from call to call
    const vnni::Planes planes = vnni::PlanesOf(products[0]);
    vnni::Prepare(products[0], planes, &activations);
    const vnni::Activations& prepared = activations;
    return run(prepared.others, [&](const Product& p, int64_t begin, int64_t end) {
      if (!prepared.finite.empty()) vnni::Outputs(p, planes, prepared, begin, end);
    });
  }
  if (path == kAvx2 || path == kAvx512) {
    thread_local avx2::Activations activations;  // keeps its memory from call to call
    const avx2::Values values = avx2::ValuesOf(products[0]);
    if (avx2::Has(products[0], values)) {
      avx2::Prepare(products[0], values, &activations);
      const avx2::Activations& prepared = activations;
      if (products[0].tiled && !prepared.others.empty()) {  // `FloatOutputs` reads no tiles
        return Run(Untiled(products, count).data(), count, path, threads, schedule);
      }
      return run(prepared.others, [&](const Product& p, int64_t begin, int64_t end) {
        if (!prepared.finite.empty()) avx2::Outputs(p, values, prepared, begin, end);
      });
    }
  }
#endif
  if (products[0].tiled) return Run(Untiled(products, count).data(), count, path, threads, schedule);
  std::vector<int64_t> all(products[0].rows);
  std::iota(all.begin(), all.end(), 0);
  run(all, [](const Product&, int64_t, int64_t) {});
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the products of one x with `count` weights, with `threads` new threads. Returns what is wrong
// with their sizes, or null.
const char* llm_jax_quantized_product(const llm_jax::Product* products, int64_t count, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(products, count)) return reason;
  llm_jax::OnNewThreads(
      [&](const auto& schedule) { llm_jax::Run(products, count, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}

int64_t llm_jax_fastest_path() { return llm_jax::FastestPath(); }

// All calls with the path kAuto use `path` from now on; kAuto: the fastest one of this CPU.
void llm_jax_use_path(int64_t path) { llm_jax::ChosenPath() = path; }

// The reason why kAmx is not a path of this process, or "".
const char* llm_jax_amx_reason() { return llm_jax::AmxReason(); }

int64_t llm_jax_has_path(int64_t path) { return llm_jax::HasPath(static_cast<llm_jax::Path>(path)); }

#if LLM_JAX_X86
// For tests: the fastest path of a CPU with these features, but not kAmx.
int64_t llm_jax_path_of(const llm_jax::Features* features) { return llm_jax::PathOf(*features); }
#endif
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "operands.h"

namespace llm_jax {

static ffi::Error QuantizedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights,
                                   ffi::RemainingRets results, int64_t bits, int64_t group, int64_t by_output,
                                   int64_t path, ffi::Span<const float> values, ffi::Span<const float> scale_values) {
  std::vector<Product> products;
  if (const char* reason = ToProducts(x, weights, results, bits, group, by_output, values, scale_values, &products)) {
    return Refused(reason);
  }
  Run(products.data(), products.size(), static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()),
      [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxQuantizedProduct, llm_jax::QuantizedProduct,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()  // x
                                  .RemainingArgs()                         // kOperands of every weight
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("by_output")
                                  .Attr<int64_t>("path")
                                  .Attr<xla::ffi::Span<const float>>("values")
                                  .Attr<xla::ffi::Span<const float>>("scale_values"));
#endif  // LLM_JAX_WITHOUT_XLA
