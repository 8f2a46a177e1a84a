// Products of many rows of int8 activations and int8 weights by AMX. The sums are exact, so that the results are those of
// AVX-512 VNNI. Included with the compiler's target set, after integer_vnni.h.

namespace amx {

constexpr int64_t kFewestRows = 16;  // with fewer, AVX-512 VNNI

// All rows of x times a tile of 64 outputs. x has rows of `stride` bytes, a multiple of 64, that are 0 from K on.
static void Tile(const IntegerProduct& p, const int8_t* x, int64_t stride, const int32_t* start, int64_t first,
                 __m512i* packed) {
  integers::Pack(p, first, packed);
  const Tiles tiles;
  alignas(64) int32_t sums[2 * kTileRows][32];
  int64_t shaped0 = -1, shaped1 = -1;
  for (int64_t row = 0; row < p.rows; row += 2 * kTileRows) {
    const int64_t rows0 = std::min(kTileRows, p.rows - row),
                  rows1 = std::max<int64_t>(0, std::min(kTileRows, p.rows - row - kTileRows));
    if (rows0 != shaped0 || rows1 != shaped1) LoadShapes(ShapesOf(rows0, rows1, kTileBytes));
    shaped0 = rows0;
    shaped1 = rows1;
    const int8_t *x0 = x + row * stride, *x1 = x0 + kTileRows * stride;
    for (int64_t half = 0; half < 2 && first + 32 * half < p.outputs; ++half) {
      const __m512i* w = packed + 2 * half;
      ClobberMemory(w);
      _tile_zero(0);
      _tile_zero(1);
      if (rows1) {
        _tile_zero(2);
        _tile_zero(3);
      }
      for (int64_t k = 0; k < stride; k += kTileBytes, w += kTileRows * 4) {
        _tile_loadd(4, x0 + k, stride);
        _tile_loadd(6, w, 256);
        _tile_loadd(7, w + 1, 256);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        if (rows1) {
          _tile_loadd(5, x1 + k, stride);
          _tile_dpbsud(2, 5, 6);
          _tile_dpbsud(3, 5, 7);
        }
      }
      _tile_stored(0, &sums[0][0], 128);
      _tile_stored(1, &sums[0][16], 128);
      if (rows1) {
        _tile_stored(2, &sums[kTileRows][0], 128);
        _tile_stored(3, &sums[kTileRows][16], 128);
      }
      ClobberMemory(sums);
      for (int64_t j = 0; j < 2; ++j) {
        const int64_t column = first + 32 * half + 16 * j;
        const __mmask16 mask = First16(p.outputs - column);
        if (!mask) break;
        const __m512 scale = p.scales == 1 ? _mm512_set1_ps(p.scale[0]) : _mm512_maskz_loadu_ps(mask, p.scale + column);
        for (int64_t r = 0; r < rows0 + rows1; ++r) {
          const __m512i total = _mm512_add_epi32(_mm512_load_si512(&sums[r][16 * j]), _mm512_set1_epi32(start[row + r]));
          const __m512 sum = _mm512_mul_ps(_mm512_cvtepi32_ps(total), _mm512_set1_ps(p.x_scale[row + r]));
          _mm512_mask_storeu_ps(p.y + (row + r) * p.outputs + column, mask, _mm512_mul_ps(sum, scale));
        }
      }
    }
  }
}

}  // namespace amx
