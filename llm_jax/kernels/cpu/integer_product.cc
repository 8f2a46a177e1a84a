// Products of int8 activations and int8 weights with exact int32 sums, by the 8-bit dot products of AVX-512 VNNI, as an
// XLA custom call and as a C function.

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
namespace integers {

constexpr int64_t kTile = 64;  // outputs of a tile

static inline __mmask64 First64(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }

static inline __mmask16 First16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// Four inputs of 64 outputs as vectors of 16 outputs with their four codes, plus 128: unsigned, as the instruction needs.
static inline void PackFour(const __m512i* bytes, __m512i* out) {
  const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]),
                low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
  const __m512i f0 = _mm512_unpacklo_epi16(low01, low23), f1 = _mm512_unpackhi_epi16(low01, low23),
                f2 = _mm512_unpacklo_epi16(high01, high23), f3 = _mm512_unpackhi_epi16(high01, high23);
  const __m512i a0 = _mm512_shuffle_i32x4(f0, f1, 0x44), a1 = _mm512_shuffle_i32x4(f2, f3, 0x44),
                a2 = _mm512_shuffle_i32x4(f0, f1, 0xee), a3 = _mm512_shuffle_i32x4(f2, f3, 0xee);
  const __m512i sign = _mm512_set1_epi8(-128);
  _mm512_storeu_si512(out, _mm512_xor_si512(_mm512_shuffle_i32x4(a0, a1, 0x88), sign));
  _mm512_storeu_si512(out + 1, _mm512_xor_si512(_mm512_shuffle_i32x4(a0, a1, 0xdd), sign));
  _mm512_storeu_si512(out + 2, _mm512_xor_si512(_mm512_shuffle_i32x4(a2, a3, 0x88), sign));
  _mm512_storeu_si512(out + 3, _mm512_xor_si512(_mm512_shuffle_i32x4(a2, a3, 0xdd), sign));
}

// The weights of a tile: (K / 4, 4 vectors). Inputs beyond K meet activations that are 0.
static void Pack(const IntegerProduct& p, int64_t first, __m512i* packed) {
  const int64_t quads = (p.inputs + 3) / 4, width = std::min(kTile, p.outputs - first);
  if (!p.by_output) {
    const __mmask64 mask = First64(width);
    for (int64_t q = 0; q < quads; ++q) {
      __m512i bytes[4];
      for (int64_t i = 0; i < 4; ++i) {
        const bool inside = 4 * q + i < p.inputs;
        bytes[i] = inside ? _mm512_maskz_loadu_epi8(mask, p.codes + (4 * q + i) * p.outputs + first) : _mm512_setzero_si512();
      }
      PackFour(bytes, packed + 4 * q);
    }
    return;
  }
  auto* fours = reinterpret_cast<uint8_t*>(packed);
  for (int64_t n = 0; n < kTile; ++n) {
    const int8_t* w = p.codes + (first + std::min(n, width - 1)) * p.inputs;
    for (int64_t q = 0; q < quads; ++q) {
      uint32_t four = 0;
      std::memcpy(&four, w + 4 * q, std::min<int64_t>(4, p.inputs - 4 * q));
      four ^= 0x80808080u;
      std::memcpy(fours + (q * kTile + n) * 4, &four, 4);
    }
  }
}

// ROWS rows of x times a tile.
template <int ROWS>
static void Block(const IntegerProduct& p, const int8_t* x, int64_t stride, const int32_t* start, int64_t row,
                  int64_t first, const __m512i* packed) {
  __m512i acc[ROWS][4];
#pragma GCC unroll 6
  for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) acc[r][j] = _mm512_set1_epi32(start[row + r]);
  }
  for (int64_t q = 0; q < stride / 4; ++q) {
    const __m512i w0 = _mm512_loadu_si512(packed + 4 * q), w1 = _mm512_loadu_si512(packed + 4 * q + 1),
                  w2 = _mm512_loadu_si512(packed + 4 * q + 2), w3 = _mm512_loadu_si512(packed + 4 * q + 3);
#pragma GCC unroll 6
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, x + (row + r) * stride + 4 * q, 4);
      const __m512i xs = _mm512_set1_epi32(four);
      acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, xs);
      acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, xs);
      acc[r][2] = _mm512_dpbusd_epi32(acc[r][2], w2, xs);
      acc[r][3] = _mm512_dpbusd_epi32(acc[r][3], w3, xs);
    }
  }
  for (int j = 0; j < 4; ++j) {
    const __mmask16 mask = First16(p.outputs - first - 16 * j);
    if (!mask) break;
    const __m512 scale =
        p.scales == 1 ? _mm512_set1_ps(p.scale[0]) : _mm512_maskz_loadu_ps(mask, p.scale + first + 16 * j);
    for (int r = 0; r < ROWS; ++r) {
      const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[r][j]), _mm512_set1_ps(p.x_scale[row + r]));
      _mm512_mask_storeu_ps(p.y + (row + r) * p.outputs + first + 16 * j, mask, _mm512_mul_ps(sum, scale));
    }
  }
}

static void Tile(const IntegerProduct& p, const int8_t* x, int64_t stride, const int32_t* start, int64_t first,
                 __m512i* packed) {
  Pack(p, first, packed);
  int64_t row = 0;
  for (; row + 6 <= p.rows; row += 6) Block<6>(p, x, stride, start, row, first, packed);
  switch (p.rows - row) {
    case 5: return Block<5>(p, x, stride, start, row, first, packed);
    case 4: return Block<4>(p, x, stride, start, row, first, packed);
    case 3: return Block<3>(p, x, stride, start, row, first, packed);
    case 2: return Block<2>(p, x, stride, start, row, first, packed);
    case 1: return Block<1>(p, x, stride, start, row, first, packed);
    default: return;
  }
}

}  // namespace integers
LLM_JAX_END_TARGET

template <typename Schedule>
static void Run(const IntegerProduct& p, int64_t threads, const Schedule& schedule) {
  constexpr int64_t kWorth = 1 << 18;  // multiplications that are worth the waking of a thread
  const int64_t stride = (p.inputs + 3) / 4 * 4;
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
        integers::Tile(p, x, stride, start.data(), i * integers::kTile, reinterpret_cast<__m512i*>(address));
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
