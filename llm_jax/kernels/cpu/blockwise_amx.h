// Products of many rows of rounded activations by AMX, with the tiles that `Expand` of blockwise_vnni.h makes. Sums within a
// block are exact and blocks are added as by AVX-512 VNNI, so that the results are the same. Included with the compiler's
// target set.

namespace amx {

constexpr int64_t kFewestRows = 16;  // with fewer, AVX-512 VNNI
constexpr int64_t kBlocks = 8;       // whose sums are in memory together: 32 KB, in the first-level cache

// Rows of x times half a tile: adds the blocks of `e` to y, or sets it where they are the first.
template <bool OFFSET>
static void RowsOfHalf(const Product& p, const Blocks& blocks, const Rounded& r, const vnni::Expanded& e, int64_t first_row,
                       int64_t last_row, int64_t column, int64_t half) {
  const int64_t all = blocks.list.size(), count = e.last - e.first, quads = blocks.stride / 4, stride = all * blocks.stride;
  const __mmask16 inside[2] = {First16(p.outputs - column), First16(p.outputs - column - 16)};
  alignas(64) static thread_local int32_t sums[kBlocks][2 * kTileRows][32];
  const Tiles tiles;
  ClobberMemory(e.bytes);
  for (int64_t row = first_row; row < last_row; row += 2 * kTileRows) {
    const int64_t rows0 = std::min(kTileRows, last_row - row),
                  rows1 = std::max<int64_t>(0, std::min(kTileRows, last_row - row - kTileRows));
    LoadShapes(ShapesOf(rows0, rows1, blocks.stride));
    for (int64_t j0 = e.first; j0 < e.last; j0 += kBlocks) {
      const int64_t some = std::min(kBlocks, e.last - j0);
      for (int64_t j = 0; j < some; ++j) {
        const int8_t* x = r.codes.data() + (row * all + j0 + j) * blocks.stride;
        const __m512i* w = e.bytes + ((half * count + j0 - e.first + j) * quads) * 2;
        _tile_loadd(4, x, stride);
        _tile_loadd(6, w, 128);
        _tile_loadd(7, w + 1, 128);
        _tile_zero(0);
        _tile_zero(1);
        _tile_dpbsud(0, 4, 6);
        _tile_dpbsud(1, 4, 7);
        _tile_stored(0, &sums[j][0][0], 128);
        _tile_stored(1, &sums[j][0][16], 128);
        if (!rows1) continue;
        _tile_loadd(5, x + kTileRows * stride, stride);
        _tile_zero(2);
        _tile_zero(3);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
        _tile_stored(2, &sums[j][kTileRows][0], 128);
        _tile_stored(3, &sums[j][kTileRows][16], 128);
      }
      ClobberMemory(sums);
      for (int64_t m = 0; m < rows0 + rows1; ++m) {
        float* y = p.y + (row + m) * p.outputs + column;
        __m512 total[2];
        for (int k = 0; k < 2; ++k) total[k] = j0 ? _mm512_maskz_loadu_ps(inside[k], y + 16 * k) : _mm512_setzero_ps();
        for (int64_t j = 0; j < some; ++j) {
          const int64_t index = (row + m) * all + j0 + j,
                        at = (blocks.list[j0 + j].group - e.first_group) * vnni::kColumns + half * 32;
          const __m512i start = _mm512_set1_epi32(r.start[index]);
          const __m512 scale = _mm512_set1_ps(r.scale[index]), sum_of_x = _mm512_set1_ps(r.total[index]);
          for (int k = 0; k < 2; ++k) {
            const __m512i acc = _mm512_add_epi32(_mm512_load_si512(&sums[j][m][16 * k]), start);
            total[k] = vnni::AddScaled(acc, scale, _mm512_loadu_ps(e.scales.data() + at + 16 * k), total[k]);
            if (OFFSET) total[k] = _mm512_fmadd_ps(sum_of_x, _mm512_loadu_ps(e.offsets.data() + at + 16 * k), total[k]);
          }
        }
        for (int k = 0; k < 2; ++k) _mm512_mask_storeu_ps(y + 16 * k, inside[k], total[k]);
      }
    }
  }
}

static void ManyRows(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, int64_t first_row,
                     int64_t last_row, int64_t begin, int64_t end) {
  vnni::EachHalf(p, blocks, v, begin, end, [&](const vnni::Expanded& e, int64_t column, int64_t half) {
    if (p.offset.kind == kNone) {
      amx::RowsOfHalf<false>(p, blocks, r, e, first_row, last_row, column, half);
    } else {
      amx::RowsOfHalf<true>(p, blocks, r, e, first_row, last_row, column, half);
    }
  });
}

}  // namespace amx
