// Products of int8 activations and int8 weights by the 8-bit dot products of AVX-512 VNNI. Included with the compiler's target
// set.

namespace integers {

constexpr int64_t kTile = 64;  // outputs of a tile

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
