// Products of activations that are rounded to 8 bits with quantized weights, for any number of rows, as an XLA custom call
// and as C functions. Several weights may share the activations, which are then rounded once.
//
// An output is computed by one thread, always in the same order, so results depend neither on the number of threads nor on
// the other rows of activations.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "blockwise.h"
#include "machine.h"
#include "parts.h"
#include "product.h"
#include "tiles.h"

namespace llm_jax {

#define LLM_JAX_PATH_HEADER "blockwise_path.h"
#include "every_path.h"

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
#include "quads_avx2.h"
#include "blockwise_avx2.h"
LLM_JAX_END_TARGET
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "vnni_loads.h"
#include "blockwise_vnni.h"
#include "blockwise_rows_vnni.h"
LLM_JAX_END_TARGET
#if LLM_JAX_AMX
LLM_JAX_TARGET(LLM_JAX_AMX_TARGET)
#include "blockwise_amx.h"
LLM_JAX_END_TARGET
#endif
#elif LLM_JAX_ARM
LLM_JAX_TARGET(LLM_JAX_DOT_PRODUCTS)
#include "blockwise_neon.h"
LLM_JAX_END_TARGET
#endif

static void RoundRow(const Product& p, Path path, const Blocks& blocks, const ByteValues& values, int64_t row, Rounded* r) {
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Round(p, blocks, values, row, r);
  if (path == kAvx2) return avx2::Round(p, blocks, values, row, r);
#endif
  portable::Round(p, blocks, values, row, r);
}

static void AnyOutputs(const Product& p, Path path, const Blocks& blocks, const ByteValues& v, const Rounded& r,
                       int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Outputs(p, blocks, v, r, first_row, last_row, begin, end);
  if (path == kAvx2) return avx2::Outputs(p, blocks, v, r, first_row, last_row, begin, end);
#elif LLM_JAX_ARM
  if (path == kNeonDot) return neon::Outputs(p, blocks, v, r, first_row, last_row, begin, end);
#endif
  portable::Outputs(p, blocks, v, r, first_row, last_row, begin, end);
}

#if LLM_JAX_X86
template <int BITS, bool TABLE, bool SIGNED>
static void VnniOf(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r,
                   const vnni::Lanes* lanes, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
  if (lanes) return vnni::OutputsOfRows<BITS, TABLE, SIGNED>(p, blocks, v, *lanes, begin, end);
  if (last_row - first_row != 1 || blocks.panels.empty() || p.by_output) {
    return vnni::ManyRows(p, blocks, v, r, first_row, last_row, begin, end);
  }
  if (blocks.joint) return vnni::OneRow<BITS, TABLE, SIGNED, true>(p, blocks, v, r, first_row, begin, end);
  vnni::OneRow<BITS, TABLE, SIGNED, false>(p, blocks, v, r, first_row, begin, end);
}

static void Vnni(const Product& p, Path path, const Blocks& blocks, const ByteValues& v, const Rounded& r,
                 const vnni::Lanes* lanes, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
#if LLM_JAX_AMX
  if (path == kAmx && !lanes && last_row - first_row >= amx::kFewestRows) {
    return amx::ManyRows(p, blocks, v, r, first_row, last_row, begin, end);
  }
#endif
  const auto call = [&](auto function) { function(p, blocks, v, r, lanes, first_row, last_row, begin, end); };
  if (p.kind == kInt8) return call(VnniOf<8, false, true>);
  if (p.bits == 8) return call(VnniOf<8, false, false>);
  if (p.bits == 4) return v.table ? call(VnniOf<4, true, false>) : call(VnniOf<4, false, false>);
  v.table ? call(VnniOf<2, true, false>) : call(VnniOf<2, false, false>);
}
#endif

// The products of the same x with `count` weights of the same format, group and layout.
template <typename Schedule>
static void Run(const Product* products, int64_t count, Path path, int64_t threads, const Schedule& schedule) {
  if (path == kAuto) path = FastestPath();
  if (products[0].tiled && path != kAvx2 && path != kAvx512) {
    return Run(Untiled(products, count).data(), count, path, threads, schedule);
  }
  const Product& p = products[0];
  const Blocks blocks = BlocksOf(p);
  const ByteValues values = ByteValuesOf(p);
  const int64_t num_blocks = blocks.list.size();
  const int64_t useful = UsefulThreads(products, count, threads, std::min<int64_t>(p.rows, 64));
  thread_local Rounded memory;  // keeps its memory from call to call
  Rounded* rounded = &memory;
  rounded->codes.resize(p.rows * num_blocks * blocks.stride);
  rounded->scale.resize(p.rows * num_blocks);
  rounded->total.resize(p.rows * num_blocks);
  rounded->start.resize(p.rows * num_blocks);
#if LLM_JAX_X86
  thread_local avx2::Quads quads_memory;
  avx2::Quads* quads = (path == kAvx2 || path == kAvx512) && avx2::HasQuads(p, blocks) ? &quads_memory : nullptr;
  avx2::SignedValues signed_values{};
  if (quads) {
    signed_values = avx2::SignedValuesOf(p, values);
    avx2::Divide(p, blocks, values.table, quads);
  }
  if (products[0].tiled && !quads) return Run(Untiled(products, count).data(), count, path, threads, schedule);
#endif
  constexpr int64_t kRowsOfPart = 16;
  const bool again = p.rows <= kRowsOfPart;
  InParallel(
      (p.rows + kRowsOfPart - 1) / kRowsOfPart, useful, again,
      [&](int64_t i) {
        const int64_t last = std::min((i + 1) * kRowsOfPart, p.rows);
        for (int64_t row = i * kRowsOfPart; row < last; ++row) {
          RoundRow(p, path, blocks, values, row, rounded);
#if LLM_JAX_X86
          if (quads) avx2::ArrangeRow(p, blocks, values.table, signed_values, *rounded, row, quads);
#endif
        }
      },
      schedule);
  bool divide_rows = true;
#if LLM_JAX_X86
  thread_local vnni::Lanes lanes_memory;
  const vnni::Lanes* lanes = nullptr;
  if (path >= kVnni && p.by_output && vnni::HasLanes(p, blocks)) {
    vnni::LanesOf(p, blocks, values, *rounded, &lanes_memory);
    lanes = &lanes_memory;
    divide_rows = false;
  }
#endif
  const std::vector<Part> parts = PartsOf(products, count, useful, divide_rows);
  InParallel(
      parts.size(), useful, again,
      [&](int64_t i) {
        const Part& part = parts[i];
        const Product& product = products[part.weight];
#if LLM_JAX_X86
        if (quads) {
          return avx2::Outputs(product, blocks, values.table, signed_values, *rounded, *quads, part.first_row, part.last_row,
                               part.begin, part.end);
        }
        if (path >= kVnni) {
          return Vnni(product, path, blocks, values, *rounded, lanes, part.first_row, part.last_row, part.begin, part.end);
        }
#endif
        AnyOutputs(product, path, blocks, values, *rounded, part.first_row, part.last_row, part.begin, part.end);
      },
      schedule);
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the products of one x with `count` weights, with `threads` new threads. Returns what is wrong
// with their sizes, or null.
const char* llm_jax_blockwise_product(const llm_jax::Product* products, int64_t count, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(products, count)) return reason;
  llm_jax::OnNewThreads(
      [&](const auto& schedule) { llm_jax::Run(products, count, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "operands.h"

namespace llm_jax {

static ffi::Error BlockwiseProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs weights,
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

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxBlockwiseProduct, llm_jax::BlockwiseProduct,
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
