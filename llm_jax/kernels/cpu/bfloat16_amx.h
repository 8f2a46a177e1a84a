// Products with a bfloat16 weight by AMX. Included with the compiler's target set.

namespace amx {

constexpr int64_t kOutputs = 32, kInputs = 32;  // outputs of a part; inputs of a tile

// The weights of 32 outputs: (K / 32, 2, 16 pairs of inputs, 16 outputs, 2), 0 beyond K and N.
static void Pack(const BFloat16Product& p, int64_t first, uint16_t* packed) {
  const int64_t tile = kTileRows * kTileBytes / 2, width = std::min(kOutputs, p.outputs - first);
  for (int64_t k0 = 0; k0 < p.inputs; k0 += kInputs, packed += 2 * tile) {
    const int64_t count = std::min(kInputs, p.inputs - k0);
    if (p.by_output) {
      std::memset(packed, 0, 4 * tile);
      for (int64_t n = 0; n < width; ++n) {
        const uint16_t* w = p.w + (first + n) * p.inputs + k0;
        uint16_t* out = packed + n / 16 * tile + n % 16 * 2;
        for (int64_t i = 0; i < count; i += 2) std::memcpy(out + i * 16, w + i, i + 1 < count ? 4 : 2);
      }
      continue;
    }
    for (int64_t j = 0; j < 2; ++j) {
      const __mmask16 mask = First16(width - 16 * j);
      for (int64_t i = 0; i < kInputs; i += 2) {
        const uint16_t* w = p.w + (k0 + i) * p.outputs + first + 16 * j;
        __m512i even = _mm512_setzero_si512(), odd = even;
        if (i < count) even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w));
        if (i + 1 < count) odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, w + p.outputs));
        _mm512_storeu_si512(packed + j * tile + i * 16, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
}

// All rows of x times the outputs [begin, end). x has rows of `stride` numbers, a multiple of 32, that are 0 from K on.
static void Outputs(const BFloat16Product& p, const uint16_t* x, int64_t stride, int64_t begin, int64_t end) {
  thread_local std::vector<uint16_t> memory;  // keeps its memory from call to call
  memory.resize(stride * kOutputs);
  const Tiles tiles;
  alignas(64) float sums[2 * kTileRows][kOutputs];
  for (int64_t first = begin; first < end; first += kOutputs) {
    Pack(p, first, memory.data());
    ClobberMemory(memory.data());
    for (int64_t row = 0; row < p.rows; row += 2 * kTileRows) {
      const int64_t rows0 = std::min(kTileRows, p.rows - row),
                    rows1 = std::max<int64_t>(0, std::min(kTileRows, p.rows - row - kTileRows));
      LoadShapes(ShapesOf(rows0, rows1, kTileBytes));
      _tile_zero(0);
      _tile_zero(1);
      if (rows1) {
        _tile_zero(2);
        _tile_zero(3);
      }
      const uint16_t *x0 = x + row * stride, *w = memory.data();
      for (int64_t k = 0; k < stride; k += kInputs, w += kInputs * kOutputs) {
        _tile_loadd(4, x0 + k, 2 * stride);
        _tile_loadd(6, w, kTileBytes);
        _tile_loadd(7, w + kInputs * 16, kTileBytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (!rows1) continue;
        _tile_loadd(5, x0 + kTileRows * stride + k, 2 * stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, &sums[0][0], 128);
      _tile_stored(1, &sums[0][16], 128);
      if (rows1) {
        _tile_stored(2, &sums[kTileRows][0], 128);
        _tile_stored(3, &sums[kTileRows][16], 128);
      }
      ClobberMemory(sums);
      const int64_t width = std::min(kOutputs, end - first);
      for (int64_t r = 0; r < rows0 + rows1; ++r) std::memcpy(p.y + (row + r) * p.outputs + first, sums[r], 4 * width);
    }
  }
}

}  // namespace amx
