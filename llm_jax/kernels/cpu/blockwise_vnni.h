// Products of rounded activations by the 8-bit dot products of AVX-512 VNNI; blockwise.h describes the operands. A row has
// the same result in whatever number of rows. Included with the compiler's target set.

namespace vnni {

constexpr int64_t kColumns = 64;   // outputs of a tile
constexpr int64_t kChunk = 128;    // blocks of a tile that are expanded together: they stay in the second-level cache
constexpr int64_t kRows = 6;       // rows of a tile, as many as have registers
constexpr int64_t kAheadBytes = 4096;  // that are fetched in advance where codes lie by outputs

static inline __m512i Table(const ByteValues& v) {
  return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(v.bytes)));
}

// acc * scale * the scale of the weight + sum: the one order of these operations.
static inline __attribute__((always_inline)) __m512 AddScaled(__m512i acc, __m512 scale, __m512 of_weight, __m512 sum) {
  return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(acc), scale), of_weight, sum);
}

static inline __m512i ToOrder(const __m512i* f, __m512i* out) {
  const __m512i a0 = _mm512_shuffle_i32x4(f[0], f[1], 0x44), a1 = _mm512_shuffle_i32x4(f[2], f[3], 0x44),
                a2 = _mm512_shuffle_i32x4(f[0], f[1], 0xee), a3 = _mm512_shuffle_i32x4(f[2], f[3], 0xee);
  out[0] = _mm512_shuffle_i32x4(a0, a1, 0x88);
  out[1] = _mm512_shuffle_i32x4(a0, a1, 0xdd);
  out[2] = _mm512_shuffle_i32x4(a2, a3, 0x88);
  out[3] = _mm512_shuffle_i32x4(a2, a3, 0xdd);
  return out[0];
}

// One row of x, the outputs [begin, end), where codes lie by inputs and blocks follow their bytes.
template <int BITS, bool TABLE, bool SIGNED, bool JOINT>
static void OneRow(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, int64_t row,
                   int64_t begin, int64_t end) {
  constexpr int PARTS = 8 / BITS, SUMS = JOINT ? 1 : PARTS;
  const __m512i table = Table(v);
  const int64_t count = blocks.list.size();
  for (const Panel& panel : blocks.panels) {
    const int8_t* x = r.codes.data() + (row * count + panel.block) * blocks.stride;
    const int64_t part_stride = JOINT ? panel.size : blocks.stride, first = row * count + panel.block;
    Ahead ahead{p.codes + (panel.begin + panel.size) * p.outputs + begin, 0, end - begin, p.outputs};
    for (int64_t column = begin; column < end; column += kColumns) {
      const __mmask64 mask = First64(end - column);
      __m512i acc[SUMS][4];
      for (int s = 0; s < SUMS; ++s) {
        for (int k = 0; k < 4; ++k) acc[s][k] = _mm512_set1_epi32(r.start[first + s]);
      }
      const uint8_t* w = p.codes + panel.begin * p.outputs + column;
      for (int64_t b = 0; b < panel.size; b += 4, w += 4 * p.outputs) {
        __m512i fours[4];
        LoadFours<SIGNED>(w, p.outputs, panel.size - b, mask, &ahead, fours);
#pragma GCC unroll 4
        for (int s = 0; s < PARTS; ++s) {
          const __m512i four = FourBytes(x + s * part_stride + b);
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) {
            __m512i codes = Part<BITS>(fours[k], s);
            if (TABLE) codes = _mm512_shuffle_epi8(table, codes);
            acc[JOINT ? 0 : s][k] = _mm512_dpbusd_epi32(acc[JOINT ? 0 : s][k], codes, four);
          }
        }
      }
      __m512i ordered[SUMS][4];
      for (int s = 0; s < SUMS; ++s) ToOrder(acc[s], ordered[s]);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __mmask16 inside = First16(end - column - 16 * i);
        if (!inside) break;
        float* y = p.y + row * p.outputs + column + 16 * i;
        const __m512 scale = Load16(p.scale, panel.group, column + 16 * i, inside);
        __m512 offset = _mm512_setzero_ps();
        if (p.offset.kind != kNone) offset = Load16(p.offset, panel.group, column + 16 * i, inside);
        __m512 sum = panel.block ? _mm512_maskz_loadu_ps(inside, y) : _mm512_setzero_ps();
        for (int s = 0; s < SUMS; ++s) {
          sum = AddScaled(ordered[s][i], _mm512_set1_ps(r.scale[first + s]), scale, sum);
          if (p.offset.kind != kNone) sum = _mm512_fmadd_ps(_mm512_set1_ps(r.total[first + s]), offset, sum);
        }
        _mm512_mask_storeu_ps(y, inside, sum);
      }
    }
  }
}

// A tile of 64 outputs and the blocks [first, last): the bytes P as (2 halves, blocks, S / 4, 2 vectors of 16 outputs with
// four inputs each), and the scales and offsets of their groups, (groups, 64).
struct Expanded {
  std::vector<uint8_t> memory;
  std::vector<float> scales, offsets;
  int64_t first, last, first_group;
  __m512i* bytes;
};

template <int BITS, bool TABLE, bool SIGNED>
static void ExpandPanel(const Product& p, const Blocks& blocks, const Panel& panel, int64_t column, __m512i table,
                        Expanded* e) {
  const int64_t count = e->last - e->first, quads = blocks.stride / 4;
  const uint8_t* w = p.codes + panel.begin * p.outputs + column;
  Ahead ahead{w + panel.size * p.outputs, 0, 1, p.outputs};
  for (int64_t b = 0; b < panel.size; b += 4, w += 4 * p.outputs) {
    __m512i fours[4], ordered[4];
    LoadFours<SIGNED>(w, p.outputs, panel.size - b, First64(p.outputs - column), &ahead, fours);
    ToOrder(fours, ordered);
    for (int s = 0; s < 8 / BITS; ++s) {
      const int64_t block = panel.block - e->first + (blocks.joint ? 0 : s),
                    quad = blocks.joint ? (s * panel.size + b) / 4 : b / 4;
      for (int k = 0; k < 4; ++k) {
        __m512i codes = Part<BITS>(ordered[k], s);
        if (TABLE) codes = _mm512_shuffle_epi8(table, codes);
        e->bytes[(((k / 2) * count + block) * quads + quad) * 2 + k % 2] = codes;
      }
    }
  }
}

static void ExpandAnyPanel(const Product& p, const Blocks& blocks, const ByteValues& v, const Panel& panel, int64_t column,
                           Expanded* e) {
  const __m512i table = Table(v);
  if (p.bits == 8 && p.kind == kInt8) return ExpandPanel<8, false, true>(p, blocks, panel, column, table, e);
  if (p.bits == 8) return ExpandPanel<8, false, false>(p, blocks, panel, column, table, e);
  if (p.bits == 4 && v.table) return ExpandPanel<4, true, false>(p, blocks, panel, column, table, e);
  if (p.bits == 4) return ExpandPanel<4, false, false>(p, blocks, panel, column, table, e);
  if (v.table) return ExpandPanel<2, true, false>(p, blocks, panel, column, table, e);
  ExpandPanel<2, false, false>(p, blocks, panel, column, table, e);
}

static void ExpandScales(const Product& p, const Scales& s, int64_t first, int64_t last, int64_t column,
                         std::vector<float>* values) {
  values->resize((last - first + 1) * kColumns);
  for (int64_t g = first; g <= last; ++g) {
    for (int64_t i = 0; i < kColumns; i += 16) {
      const __mmask16 inside = First16(p.outputs - column - i);
      __m512 sixteen = _mm512_setzero_ps();
      if (p.by_output) {
        alignas(64) float gathered[16] = {};
        for (int64_t n = 0; n < 16 && column + i + n < p.outputs; ++n) gathered[n] = ScaleAt(s, column + i + n, g);
        sixteen = _mm512_load_ps(gathered);
      } else if (inside) {
        sixteen = Load16(s, g, column + i, inside);
      }
      _mm512_storeu_ps(values->data() + (g - first) * kColumns + i, sixteen);
    }
  }
}

// Expands the tile of `column` from block `first` on. `panel` is the first panel that is not expanded yet.
static void Expand(const Product& p, const Blocks& blocks, const ByteValues& v, int64_t column, int64_t first,
                   int64_t* panel, Expanded* e) {
  const int64_t all = blocks.list.size(), quads = blocks.stride / 4;
  const int64_t num_panels = p.by_output ? 0 : blocks.panels.size();
  e->first = first;
  e->last = std::min(first + kChunk, all);
  int64_t last_panel = *panel;
  if (num_panels) {  // complete panels
    while (last_panel < num_panels && blocks.panels[last_panel].block < first + kChunk) ++last_panel;
    e->last = last_panel < num_panels ? blocks.panels[last_panel].block : all;
  }
  const int64_t count = e->last - first, vectors = count * quads * 4;
  e->memory.resize((vectors + 1) * 64);
  e->bytes = reinterpret_cast<__m512i*>((reinterpret_cast<uintptr_t>(e->memory.data()) + 63) / 64 * 64);
  for (; *panel < last_panel; ++*panel) ExpandAnyPanel(p, blocks, v, blocks.panels[*panel], column, e);
  if (!num_panels) {
    auto* bytes = reinterpret_cast<uint8_t*>(e->bytes);
    std::memset(bytes, 0, vectors * 64);
    const int64_t width = std::min(kColumns, p.outputs - column);
    for (int64_t j = 0; j < count; ++j) {
      const Block& block = blocks.list[first + j];
      for (int64_t i = 0; i < block.size; ++i) {
        for (int64_t n = 0; n < width; ++n) {
          const int64_t vector = ((n / 32 * count + j) * quads + i / 4) * 2 + n % 32 / 16;
          bytes[vector * 64 + n % 16 * 4 + i % 4] = static_cast<uint8_t>(ByteAt(p, v, block.first + i, column + n));
        }
      }
    }
  }
  e->first_group = blocks.list[first].group;
  const int64_t last_group = blocks.list[e->last - 1].group;
  ExpandScales(p, p.scale, e->first_group, last_group, column, &e->scales);
  if (p.offset.kind != kNone) ExpandScales(p, p.offset, e->first_group, last_group, column, &e->offsets);
}

// ROWS rows of x times half a tile: adds the blocks of `e` to y, or sets it where they are the first.
template <int ROWS, bool OFFSET>
static void HalfTile(const Product& p, const Blocks& blocks, const Rounded& r, const Expanded& e, int64_t row,
                     int64_t column, int64_t half) {
  const int64_t all = blocks.list.size(), count = e.last - e.first, quads = blocks.stride / 4;
  const __m512i* w = e.bytes + half * count * quads * 2;
  const __mmask16 inside[2] = {First16(p.outputs - column), First16(p.outputs - column - 16)};
  __m512 sums[ROWS][2];
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m) {
    const float* y = p.y + (row + m) * p.outputs + column;
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) sums[m][k] = e.first ? _mm512_maskz_loadu_ps(inside[k], y + 16 * k) : _mm512_setzero_ps();
  }
  for (int64_t j = e.first; j < e.last; ++j) {
    const int64_t index = row * all + j;
    const int8_t* x = r.codes.data() + index * blocks.stride;
    const int64_t next = all * blocks.stride;
    __m512i acc[ROWS][2];
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) acc[m][0] = acc[m][1] = _mm512_set1_epi32(r.start[index + m * all]);
    for (int64_t q = 0; q < quads; ++q, w += 2, x += 4) {
      const __m512i w0 = _mm512_load_si512(w), w1 = _mm512_load_si512(w + 1);
#pragma GCC unroll 6
      for (int m = 0; m < ROWS; ++m) {
        const __m512i four = FourBytes(x + m * next);
        acc[m][0] = _mm512_dpbusd_epi32(acc[m][0], w0, four);
        acc[m][1] = _mm512_dpbusd_epi32(acc[m][1], w1, four);
      }
    }
    const int64_t at = (blocks.list[j].group - e.first_group) * kColumns + half * 32;
    const __m512 scale0 = _mm512_loadu_ps(e.scales.data() + at), scale1 = _mm512_loadu_ps(e.scales.data() + at + 16);
#pragma GCC unroll 6
    for (int m = 0; m < ROWS; ++m) {
      const __m512 scale = _mm512_set1_ps(r.scale[index + m * all]);
      sums[m][0] = AddScaled(acc[m][0], scale, scale0, sums[m][0]);
      sums[m][1] = AddScaled(acc[m][1], scale, scale1, sums[m][1]);
      if (!OFFSET) continue;
      const __m512 total = _mm512_set1_ps(r.total[index + m * all]);
      sums[m][0] = _mm512_fmadd_ps(total, _mm512_loadu_ps(e.offsets.data() + at), sums[m][0]);
      sums[m][1] = _mm512_fmadd_ps(total, _mm512_loadu_ps(e.offsets.data() + at + 16), sums[m][1]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < ROWS; ++m) {
    float* y = p.y + (row + m) * p.outputs + column;
#pragma GCC unroll 2
    for (int k = 0; k < 2; ++k) _mm512_mask_storeu_ps(y + 16 * k, inside[k], sums[m][k]);
  }
}

template <bool OFFSET>
static void RowsOfHalf(const Product& p, const Blocks& blocks, const Rounded& r, const Expanded& e, int64_t first_row,
                       int64_t last_row, int64_t column, int64_t half) {
  int64_t row = first_row;
  for (; row + kRows <= last_row; row += kRows) HalfTile<kRows, OFFSET>(p, blocks, r, e, row, column, half);
  switch (last_row - row) {
    case 5: return HalfTile<5, OFFSET>(p, blocks, r, e, row, column, half);
    case 4: return HalfTile<4, OFFSET>(p, blocks, r, e, row, column, half);
    case 3: return HalfTile<3, OFFSET>(p, blocks, r, e, row, column, half);
    case 2: return HalfTile<2, OFFSET>(p, blocks, r, e, row, column, half);
    case 1: return HalfTile<1, OFFSET>(p, blocks, r, e, row, column, half);
    default: return;
  }
}

// Calls run(the expanded blocks, column, half) for each half of each tile, block after block.
template <typename Run>
static void EachHalf(const Product& p, const Blocks& blocks, const ByteValues& v, int64_t begin, int64_t end, const Run& run) {
  thread_local Expanded e;  // keeps its memory from call to call
  const int64_t all = blocks.list.size();
  for (int64_t column = begin; column < end; column += kColumns) {
    int64_t panel = 0;
    for (int64_t first = 0; first < all; first = e.last) {
      Expand(p, blocks, v, column, first, &panel, &e);
      for (int64_t half = 0; half < 2 && column + 32 * half < end; ++half) run(e, column + 32 * half, half);
    }
  }
}

static void ManyRows(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, int64_t first_row,
                     int64_t last_row, int64_t begin, int64_t end) {
  EachHalf(p, blocks, v, begin, end, [&](const Expanded& e, int64_t column, int64_t half) {
    if (p.offset.kind == kNone) {
      RowsOfHalf<false>(p, blocks, r, e, first_row, last_row, column, half);
    } else {
      RowsOfHalf<true>(p, blocks, r, e, first_row, last_row, column, half);
    }
  });
}

}  // namespace vnni
