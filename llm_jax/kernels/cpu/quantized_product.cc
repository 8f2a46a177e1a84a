// Products with quantized weights for few rows of activations, as an XLA custom call and as a C function.
//
// The instruction set is chosen when a product runs. An output is computed by one thread, always in the same order, so
// results depend neither on the number of threads nor on the other rows of activations.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "product.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define LLM_JAX_X86 1
#endif

#define LLM_JAX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LLM_JAX_TARGET(names) \
  LLM_JAX_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define LLM_JAX_END_TARGET LLM_JAX_PRAGMA(clang attribute pop)
#else
#define LLM_JAX_TARGET(names) LLM_JAX_PRAGMA(GCC push_options) LLM_JAX_PRAGMA(GCC target(names))
#define LLM_JAX_END_TARGET LLM_JAX_PRAGMA(GCC pop_options)
#endif

namespace llm_jax {

namespace portable {
#include "float_path.h"
}  // namespace portable

#if LLM_JAX_X86
LLM_JAX_TARGET("avx2,fma,f16c")
namespace avx2 {
#include "float_path.h"
}  // namespace avx2
LLM_JAX_END_TARGET
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512")
namespace avx512 {
#include "float_path.h"
}  // namespace avx512
LLM_JAX_END_TARGET
LLM_JAX_TARGET("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")
#include "vnni_operands.h"
#include "vnni_path.h"
LLM_JAX_END_TARGET
#endif

static Path FastestPath() {
#if LLM_JAX_X86
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (avx512 && __builtin_cpu_supports("avx512vnni")) return kVnni;
  if (avx512) return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

static void FloatOutputs(const Product& p, Path path, int64_t row, int64_t begin, int64_t end) {
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Outputs(p, row, begin, end);
  if (path == kAvx2) return avx2::Outputs(p, row, begin, end);
#endif
  portable::Outputs(p, row, begin, end);
}

// Numbers of parts of a product that threads take one after the other.
struct Parts {
  int64_t size, count;  // outputs of a part
};

static Parts PartsOf(const Product& p, int64_t threads) {
  constexpr int64_t kSmallest = 1 << 17;  // codes times rows that are worth the waking of a thread
  const int64_t work = p.inputs * p.outputs * std::min<int64_t>(p.rows, 4);
  const int64_t count = std::max<int64_t>(1, std::min(threads, work / kSmallest));
  const int64_t unit = 64;
  const int64_t units = (p.outputs + unit - 1) / unit;
  const int64_t size = (units + count - 1) / count * unit;
  return {size, (p.outputs + size - 1) / size};
}

// Calls work(0) ... work(count - 1) by this thread and those of `schedule`. A task that starts late finds nothing left,
// so that the caller never waits for a thread that is busy with other work.
template <typename Work, typename Schedule>
static void InParallel(int64_t count, const Work& work, const Schedule& schedule) {
  if (count <= 1) {
    if (count == 1) work(0);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const Work* borrowed = &work;  // used only for a part that the caller waits for
  auto take = [state, borrowed, count] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*borrowed)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t i = 1; i < count; ++i) schedule(take);
  take();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 4096) std::this_thread::yield();
  }
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
        parts.count,
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
      parts.count,
      [&](int64_t i) {
        const int64_t begin = i * parts.size, end = std::min(begin + parts.size, p.outputs);
        for (int64_t row = 0; row < p.rows; ++row) FloatOutputs(p, path, row, begin, end);
      },
      schedule);
}

static bool Divides(int64_t part, int64_t whole) { return part > 0 && whole % part == 0; }

static const char* CheckScales(const Product& p, const Scales& s) {
  const int64_t groups = NumGroups(p), rows = p.by_output ? p.outputs : groups,
                columns = p.by_output ? groups : p.outputs;
  if ((s.rows != rows && s.rows != 1) || (s.columns != columns && s.columns != 1)) return "the shape of the scales";
  if (s.kind == kNested && !(Divides(s.inner_rows, s.rows) && Divides(s.inner_columns, s.columns))) {
    return "the shape of the scales of the scales";
  }
  return nullptr;
}

// What is wrong with the sizes of a product, or null.
static const char* Check(const Product& p) {
  constexpr int64_t kMost = int64_t{1} << 31;
  if (p.rows < 0 || p.inputs < 1 || p.outputs < 0) return "the shape of the operands";
  if (p.rows > kMost || p.inputs > (1 << 20) || p.outputs > kMost) return "the size of the operands";
  if (p.bits != 8 && p.bits != 4 && p.bits != 2) return "the bits of a code";
  if (p.kind != (p.bits < 8 ? kTable : p.kind) || p.kind < kInt8 || p.kind > kUint8 + (p.bits < 8)) return "the codes";
  if (!Divides(p.group, p.inputs) || !Divides(CodesPerByte(p), p.group)) return "the size of a group";
  if (const char* reason = CheckScales(p, p.scale)) return reason;
  return p.offset.kind == kNone ? nullptr : CheckScales(p, p.offset);
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: the product with `threads` new threads. Returns what is wrong with its sizes, or null.
const char* llm_jax_quantized_product(const llm_jax::Product* p, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(*p)) return reason;
  std::vector<std::thread> started;
  llm_jax::Run(*p, static_cast<llm_jax::Path>(path), threads,
               [&](const auto& task) { started.emplace_back([task] { task(); }); });
  for (std::thread& thread : started) thread.join();
  return nullptr;
}

int64_t llm_jax_fastest_path() { return llm_jax::FastestPath(); }
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "xla/ffi/api/ffi.h"

namespace llm_jax {

namespace ffi = xla::ffi;

static ffi::Error Refused(const char* what) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("quantized product: ") + what + " is wrong");
}

static bool ToScales(ffi::AnyBuffer buffer, ffi::AnyBuffer inner, ffi::AnyBuffer mean, ffi::Span<const float> table,
                     Scales* s) {
  const auto shape = buffer.dimensions();
  if (shape.size() != 2) return false;
  *s = Scales{buffer.untyped_data(), kNone, shape[0], shape[1], nullptr, nullptr, 0, 0, 0.0f};
  if (buffer.element_type() == ffi::DataType::F32) s->kind = kFloat32;
  if (buffer.element_type() == ffi::DataType::F16) s->kind = kFloat16;
  if (buffer.element_type() == ffi::DataType::U8) s->kind = kExponent;
  const auto inner_shape = inner.dimensions();
  if (inner_shape.size() != 2 || inner.element_type() != ffi::DataType::F32) return false;
  if (inner.element_count() && s->kind == kExponent) {
    if (table.size() != 256 || mean.element_count() != 1 || mean.element_type() != ffi::DataType::F32) return false;
    s->kind = kNested;
    s->table = table.begin();
    s->inner = inner.typed_data<float>();
    s->inner_rows = inner_shape[0];
    s->inner_columns = inner_shape[1];
    s->mean = *mean.typed_data<float>();
  }
  return s->kind != kNone;
}

static ffi::Error QuantizedProduct(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::AnyBuffer codes,
                                   ffi::AnyBuffer scale, ffi::AnyBuffer inner, ffi::AnyBuffer mean,
                                   ffi::AnyBuffer offset, ffi::ResultBuffer<ffi::F32> y, int64_t bits, int64_t group,
                                   int64_t by_output, int64_t path, ffi::Span<const float> values,
                                   ffi::Span<const float> scale_values) {
  const auto shape = x.dimensions(), code_shape = codes.dimensions(), result = y->dimensions();
  if (shape.size() != 2 || code_shape.size() != 2 || result.size() != 2) return Refused("the rank of an operand");
  Product p{};
  p.x = x.typed_data();
  p.codes = static_cast<const uint8_t*>(codes.untyped_data());
  p.y = y->typed_data();
  p.rows = shape[0];
  p.inputs = shape[1];
  p.outputs = code_shape[by_output ? 0 : 1];
  p.bits = bits;
  p.group = group;
  p.by_output = by_output;
  p.table = values.begin();
  const bool is_signed = codes.element_type() == ffi::DataType::S8;
  if (!is_signed && codes.element_type() != ffi::DataType::U8) return Refused("the type of the codes");
  p.kind = bits < 8 ? kTable : is_signed ? kInt8 : kUint8;
  if (bits != 8 && (bits < 1 || bits > 4 || values.size() != size_t{1} << bits)) return Refused("the table of values");
  if (!ToScales(scale, inner, mean, scale_values, &p.scale)) return Refused("the type of the scales");
  if (offset.element_count()) {
    const auto offset_shape = offset.dimensions();
    if (offset_shape.size() != 2) return Refused("the rank of the offsets");
    p.offset = Scales{offset.untyped_data(), kNone, offset_shape[0], offset_shape[1], nullptr, nullptr, 0, 0, 0.0f};
    if (offset.element_type() == ffi::DataType::F32) p.offset.kind = kFloat32;
    if (offset.element_type() == ffi::DataType::F16) p.offset.kind = kFloat16;
    if (p.offset.kind == kNone) return Refused("the type of the offsets");
  }
  if (code_shape[by_output ? 1 : 0] * (8 / bits) != p.inputs || result[0] != p.rows || result[1] != p.outputs) {
    return Refused("the shape of the operands");
  }
  if (const char* reason = Check(p)) return Refused(reason);
  Run(p, static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()), [&](auto task) { pool.Schedule(std::move(task)); });
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
