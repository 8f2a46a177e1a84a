// Loads of codes and scales for the 8-bit dot products of AVX-512 VNNI. Included with the compiler's target set.

namespace vnni {

static inline __m512 Load16(const Scales& s, int64_t row, int64_t column, __mmask16 mask) {
  row = s.rows == 1 ? 0 : row;
  if (s.columns == 1) return _mm512_set1_ps(ScaleAt(s, row, 0));
  const int64_t index = row * s.columns + column;
  switch (s.kind) {
    case kFloat32:
      return _mm512_maskz_loadu_ps(mask, static_cast<const float*>(s.data) + index);
    case kFloat16:
      return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(s.data) + index));
    default:
      break;
  }
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, static_cast<const uint8_t*>(s.data) + index));
  if (s.kind == kExponent) return _mm512_castsi512_ps(_mm512_slli_epi32(bytes, 23));
  const __m512 values = _mm512_i32gather_ps(bytes, s.table, 4);
  const int64_t last = std::min<int64_t>(column + 15, s.columns - 1);
  const float* inner = s.inner + row * s.inner_rows / s.rows * s.inner_columns;
  const int64_t first_part = column * s.inner_columns / s.columns, last_part = last * s.inner_columns / s.columns;
  __m512 factor = _mm512_set1_ps(inner[first_part]);
  if (first_part != last_part) {
    alignas(64) float factors[16] = {};
    for (int64_t i = 0; column + i <= last; ++i) factors[i] = inner[(column + i) * s.inner_columns / s.columns];
    factor = _mm512_load_ps(factors);
  }
  return _mm512_fmadd_ps(values, factor, _mm512_set1_ps(s.mean));
}

template <int BITS>
static inline __attribute__((always_inline)) __m512i Part(__m512i bytes, int part) {
  if (BITS == 8) return bytes;
  return _mm512_and_si512(_mm512_srli_epi16(bytes, part * BITS), _mm512_set1_epi8((1 << BITS) - 1));
}

// Fetches the next panel row by row while a panel is computed tile by tile: memory is read in the order of addresses. Into
// the second-level cache: the first one has too few outstanding misses for the bandwidth of memory (on Zen 4, to fetch into
// it reads 10 to 14 GB/s on one core, into the second 13 to 20).
struct Ahead {
  const uint8_t* row;
  int64_t column, width, stride;

  inline void Fetch() {
    _mm_prefetch(reinterpret_cast<const char*>(row + column), _MM_HINT_T1);
    column += 64;
    if (column >= width) {
      column = 0;
      row += stride;
    }
  }
};

static inline __m512i FourBytes(const int8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}

// Four rows of codes as vectors of the four codes of an output: vector k has the outputs 16 L + 4 k ... of every
// 128-bit lane L.
template <bool SIGNED>
static inline __attribute__((always_inline)) void LoadFours(const uint8_t* w, int64_t stride, int64_t count,
                                                            __mmask64 mask, Ahead* ahead, __m512i* fours) {
  __m512i bytes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    bytes[i] = i < count ? _mm512_maskz_loadu_epi8(mask, w + i * stride) : _mm512_setzero_si512();
    ahead->Fetch();
  }
  const __m512i low01 = _mm512_unpacklo_epi8(bytes[0], bytes[1]), high01 = _mm512_unpackhi_epi8(bytes[0], bytes[1]),
                low23 = _mm512_unpacklo_epi8(bytes[2], bytes[3]), high23 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
  fours[0] = _mm512_unpacklo_epi16(low01, low23);
  fours[1] = _mm512_unpackhi_epi16(low01, low23);
  fours[2] = _mm512_unpacklo_epi16(high01, high23);
  fours[3] = _mm512_unpackhi_epi16(high01, high23);
  if (!SIGNED) return;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) fours[k] = _mm512_xor_si512(fours[k], _mm512_set1_epi8(-128));
}

// From the order of `LoadFours` to that of the outputs.
static inline __attribute__((always_inline)) void InOrder(const __m512* f, __m512* sums) {
  const __m512 a0 = _mm512_shuffle_f32x4(f[0], f[1], 0x44), a1 = _mm512_shuffle_f32x4(f[2], f[3], 0x44),
               a2 = _mm512_shuffle_f32x4(f[0], f[1], 0xee), a3 = _mm512_shuffle_f32x4(f[2], f[3], 0xee);
  sums[0] = _mm512_shuffle_f32x4(a0, a1, 0x88);
  sums[1] = _mm512_shuffle_f32x4(a0, a1, 0xdd);
  sums[2] = _mm512_shuffle_f32x4(a2, a3, 0x88);
  sums[3] = _mm512_shuffle_f32x4(a2, a3, 0xdd);
}

}  // namespace vnni
