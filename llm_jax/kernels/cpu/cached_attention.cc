// Attention of few queries over a cache of keys and values, as an XLA custom call and as a C function.
//
// The cache is read once and as it lies, (rows, keys, kv_heads, width), in float32, in bfloat16, or as int8 codes with
// float16 scales; keys that no query attends to are not read. A head of a row is computed by one thread, always in the same order.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "machine.h"
#include "product.h"

namespace llm_jax {

enum CacheType : int64_t { kFloat32Cache = 0, kBFloat16Cache = 1, kInt8Cache = 2 };

struct BFloat16 {
  uint16_t value;
  explicit operator float() const {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float wide;
    std::memcpy(&wide, &bits, 4);
    return wide;
  }
};

// softmax(q k / sqrt(width) + bias) v.
struct Attention {
  const float* q;                   // (rows, queries, heads, width)
  const void *k, *v;                // (rows, keys, kv_heads, width)
  const uint16_t *k_scale, *v_scale;  // of int8 codes: (rows, keys, kv_heads, 1); else null
  const uint8_t* mask;              // (rows, queries, keys): 1 where a query attends to a key
  const float* bias;                // (bias_rows, heads, queries, keys), or null
  float* y;                         // (rows, queries, heads, width)
  int64_t rows, queries, keys, heads, kv_heads, width, bias_rows, type;
  float softcap;  // 0: none
};

#define LLM_JAX_PATH_HEADER "attention_path.h"
#include "every_path.h"

static void Head(const Attention& a, Path path, int64_t row, int64_t head, const std::vector<int64_t>& keys,
                 std::vector<float>* scores) {
  scores->resize(keys.size());
#if LLM_JAX_X86
  if (path >= kAvx512) return avx512::Head(a, row, head, keys.data(), keys.size(), scores->data());
  if (path == kAvx2) return avx2::Head(a, row, head, keys.data(), keys.size(), scores->data());
#endif
  portable::Head(a, row, head, keys.data(), keys.size(), scores->data());
}

// The keys that any query of a row attends to; all of them if a query attends to none: it gets the mean of all values.
static void Visible(const Attention& a, int64_t row, std::vector<int64_t>* keys) {
  const uint8_t* mask = a.mask + row * a.queries * a.keys;
  keys->clear();
  bool all = false;
  for (int64_t t = 0; t < a.queries; ++t) all |= std::memchr(mask + t * a.keys, 1, a.keys) == nullptr;
  for (int64_t s = 0; s < a.keys; ++s) {
    bool visible = all;
    for (int64_t t = 0; t < a.queries && !visible; ++t) visible = mask[t * a.keys + s];
    if (visible) keys->push_back(s);
  }
}

template <typename Schedule>
static void Run(const Attention& a, Path path, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 15;  // multiplications that are worth the waking of a thread
  if (path == kAuto) path = FastestPath();
  const int64_t work = a.rows * a.queries * a.keys * a.heads * a.width;
  InParallel(
      a.rows * a.kv_heads, std::max<int64_t>(1, std::min(threads, work / kWorth)), false,  // XLA may want the threads next
      [&](int64_t i) {
        thread_local std::vector<int64_t> keys;  // keep their memory from call to call
        thread_local std::vector<float> scores;
        Visible(a, i / a.kv_heads, &keys);
        Head(a, path, i / a.kv_heads, i % a.kv_heads, keys, &scores);
      },
      schedule);
}

// What is wrong with the sizes, or null.
static const char* Check(const Attention& a) {
  constexpr int64_t kMost = int64_t{1} << 31;
  for (int64_t size : {a.rows, a.queries, a.keys, a.heads, a.kv_heads, a.width}) {
    if (size < 1 || size > kMost) return "the size of an operand";
  }
  if (a.heads % a.kv_heads) return "the number of heads";
  if (a.bias && a.bias_rows != 1 && a.bias_rows != a.rows) return "the shape of the bias";
  if (a.type < kFloat32Cache || a.type > kInt8Cache) return "the type of the cache";
  const bool scaled = a.type == kInt8Cache;
  if (scaled != (a.k_scale != nullptr) || scaled != (a.v_scale != nullptr)) return "the scales";
  return nullptr;
}

}  // namespace llm_jax

extern "C" {

// For tests and measurements: attention with `threads` new threads. Returns what is wrong with its sizes, or null.
const char* llm_jax_cached_attention(const llm_jax::Attention* a, int64_t path, int64_t threads) {
  if (const char* reason = llm_jax::Check(*a)) return reason;
  llm_jax::OnNewThreads(
      [&](const auto& schedule) { llm_jax::Run(*a, static_cast<llm_jax::Path>(path), threads, schedule); });
  return nullptr;
}
}

#ifndef LLM_JAX_WITHOUT_XLA
#include "xla/ffi/api/ffi.h"

namespace llm_jax {

namespace ffi = xla::ffi;

template <typename Buffer>
static bool Fits(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto sizes = buffer.dimensions();
  return sizes.size() == shape.size() && std::equal(sizes.begin(), sizes.end(), shape.begin());
}

static ffi::Error CachedAttention(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                                  ffi::Buffer<ffi::F16> k_scale, ffi::Buffer<ffi::F16> v_scale,
                                  ffi::Buffer<ffi::PRED> mask, ffi::Buffer<ffi::F32> bias,
                                  ffi::ResultBuffer<ffi::F32> y, float softcap, int64_t path) {
  const auto refused = [](const char* what) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("cached attention: ") + what + " is wrong");
  };
  const auto queries = q.dimensions(), keys = k.dimensions();
  if (queries.size() != 4 || keys.size() != 4) return refused("the rank of an operand");
  Attention a{};
  a.q = q.typed_data();
  a.k = k.untyped_data();
  a.v = v.untyped_data();
  a.mask = static_cast<const uint8_t*>(mask.untyped_data());
  a.y = y->typed_data();
  a.rows = queries[0];
  a.queries = queries[1];
  a.heads = queries[2];
  a.width = queries[3];
  a.keys = keys[1];
  a.kv_heads = keys[2];
  a.softcap = softcap;
  a.type = k.element_type() == ffi::DataType::S8     ? kInt8Cache
           : k.element_type() == ffi::DataType::BF16 ? kBFloat16Cache
                                                     : kFloat32Cache;
  if (a.type == kFloat32Cache && k.element_type() != ffi::DataType::F32) return refused("the type of the keys");
  if (v.element_type() != k.element_type()) return refused("the type of the values");
  if (!Fits(k, {a.rows, a.keys, a.kv_heads, a.width}) || !Fits(v, {a.rows, a.keys, a.kv_heads, a.width}) ||
      !Fits(mask, {a.rows, a.queries, a.keys}) || !Fits(*y, {a.rows, a.queries, a.heads, a.width})) {
    return refused("the shape of an operand");
  }
  if (a.type == kInt8Cache) {
    if (!Fits(k_scale, {a.rows, a.keys, a.kv_heads, 1}) || !Fits(v_scale, {a.rows, a.keys, a.kv_heads, 1})) {
      return refused("the shape of the scales");
    }
    a.k_scale = static_cast<const uint16_t*>(k_scale.untyped_data());
    a.v_scale = static_cast<const uint16_t*>(v_scale.untyped_data());
  }
  if (bias.element_count()) {
    const int64_t rows = bias.dimensions()[0];
    if (!Fits(bias, {rows, a.heads, a.queries, a.keys})) return refused("the shape of the bias");
    a.bias = bias.typed_data();
    a.bias_rows = rows;
  }
  if (const char* reason = Check(a)) return refused(reason);
  Run(a, static_cast<Path>(path), std::max<int64_t>(1, pool.num_threads()),
      [&](auto task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

}  // namespace llm_jax

XLA_FFI_DEFINE_HANDLER_SYMBOL(LlmJaxCachedAttention, llm_jax::CachedAttention,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // q
                                  .Arg<xla::ffi::AnyBuffer>()               // k
                                  .Arg<xla::ffi::AnyBuffer>()               // v
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()   // scales of k, or of size 0
                                  .Arg<xla::ffi::Buffer<xla::ffi::F16>>()   // scales of v, or of size 0
                                  .Arg<xla::ffi::Buffer<xla::ffi::PRED>>()  // mask
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()   // bias, or of size 0
                                  .Ret<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("path"));
#endif  // LLM_JAX_WITHOUT_XLA
