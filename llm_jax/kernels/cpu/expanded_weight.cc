// The values of a weight in tiles as float32, as an XLA custom call and as a C function. XLA's matmul multiplies them with
// many rows of activations.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"
#include "product.h"
#include "tiles.h"

namespace llm_jax {

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
#include "quads_avx2.h"
#include "expanded_avx2.h"
LLM_JAX_END_TARGET
#endif

// The columns [begin, end) of the result, code by code.
static void ExpandCodes(const Product& p, int64_t begin, int64_t end) {
  const int64_t bytes = GroupBytes(p), rows = NumGroups(p) * bytes;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t quad = n / kTileOutputs * (rows / kTileRows) + row / kTileRows;
      const uint8_t byte = p.codes[(quad * kTileOutputs + n % kTileOutputs) * kTileRows + row % kTileRows];
      const float scale = ScaleAt(p.scale, row / bytes, n), offset = ScaleAt(p.offset, row / bytes, n);
      for (int64_t part = 0; part < CodesPerByte(p); ++part) {
        const int code = (byte >> (part * p.bits)) & ((1 << p.bits) - 1);
        const float value = p.kind == kTable ? p.table[code] : p.kind == kInt8 ? static_cast<int8_t>(byte) : byte;
        p.y[(row / bytes * p.group + part * bytes + row % bytes) * p.outputs + n] = value * scale + offset;
      }
    }
  }
}

// `p.y` is (K, N).
template <typename Schedule>
static void Expand(const Product& p, Path path, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kColumns = 64;  // of a part
  if (path == kAuto) path = FastestPath();
#if LLM_JAX_X86
  const bool has_avx2 = path >= kAvx2 && reinterpret_cast<uintptr_t>(p.y) % 32 == 0;
#endif
  InParallel(
      (p.outputs + kColumns - 1) / kColumns, threads, false,
      [&](int64_t i) {
        const int64_t begin = i * kColumns, end = std::min(begin + kColumns, p.outputs);
#if LLM_JAX_X86
        if (has_avx2) return avx2::Expand(p, begin, end);
#endif
        ExpandCodes(p, begin, end);
      },
      schedule);
}

static const char* CheckTiled(const Product& p) { return p.tiled ? Check(p) : "the layout of the codes"; }

}  // namespace llm_jax

extern "C" {

// For tests: writes the values of `p->codes` to `p->y` (inputs, outputs). Returns what is wrong with the sizes, or null.
const char* llm_jax_expanded_weight(const llm_jax::Product* p, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::CheckTiled(*p)) return reason;
  llm_jax::OnNewThreads([&](const auto& schedule) { llm_jax::Expand(*p, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "operands.h"

namespace llm_jax {

static ffi::Error ExpandedWeight(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scale, ffi::AnyBuffer inner,
                                 ffi::AnyBuffer mean, ffi::AnyBuffer offset, ffi::Result<ffi::Buffer<ffi::F32>> y,
                                 int64_t bits, int64_t group, int64_t by_output, int64_t path,
                                 ffi::Span<const float> values, ffi::Span<const float> scale_values) {
  Product p{};
  const Weight weight{codes, scale, inner, mean, offset, bits, group, by_output, values, scale_values};
  if (const char* reason = ToProduct(weight, &p)) return Refused(reason);
  const auto shape = y->dimensions();
  if (shape.size() != 2 || shape[0] != p.inputs || shape[1] != p.outputs) return Refused("the shape of the result");
  if (const char* reason = CheckTiled(p)) return Refused(reason);
  p.y = y->typed_data();
  Expand(p, static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()), [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxExpandedWeight, llm_jax::ExpandedWeight,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()  // codes, scale, inner scale, mean of the scales, offset
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group")
                                  .Attr<int64_t>("by_output")
                                  .Attr<int64_t>("path")
                                  .Attr<xla::ffi::Span<const float>>("values")
                                  .Attr<xla::ffi::Span<const float>>("scale_values"));
#endif  // LLM_JAX_WITHOUT_XLA
