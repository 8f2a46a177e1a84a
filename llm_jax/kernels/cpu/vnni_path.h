// The product by the 8-bit dot products of AVX-512 VNNI; `vnni_operands.h` describes its operands.

namespace vnni {

static inline __m512 Joined(__m512i high, __m512i middle, __m512i low) {
  const __m512 base = _mm512_set1_ps(256.0f);
  return _mm512_fmadd_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(high), base, _mm512_cvtepi32_ps(middle)), base,
                         _mm512_cvtepi32_ps(low));
}

// acc[2], acc[1], acc[0] += the products of the digits of x with the bytes of P, by their weights.
template <int PLANES>
static inline __attribute__((always_inline)) void AddDigits(const __m512i* w, __m512i x2, __m512i x1, __m512i x0,
                                                            __m512i* acc) {
  acc[2] = _mm512_dpbusd_epi32(acc[2], w[0], x2);
  acc[1] = _mm512_dpbusd_epi32(acc[1], w[0], x1);
  acc[0] = _mm512_dpbusd_epi32(acc[0], w[0], x0);
  if (PLANES < 3) return;
  acc[1] = _mm512_dpbusd_epi32(acc[1], w[1], x2);
  acc[0] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(acc[0], w[1], x1), w[2], x2);
}

template <int PLANES>
static inline __attribute__((always_inline)) void Multiply(__m512i codes, const __m512i* tables, __m512i x2, __m512i x1,
                                                           __m512i x0, __m512i* acc) {
  __m512i w[3] = {codes, codes, codes};
  for (int i = 0; i < PLANES; ++i) w[i] = _mm512_shuffle_epi8(tables[i], codes);
  AddDigits<PLANES>(w, x2, x1, x0, acc);
}

// Codes that lie by inputs: 64 outputs times a panel, for ROWS rows of x. Sums are 16 outputs to a vector.
template <int BITS, int PLANES, bool SIGNED, int ROWS>
static void ColumnTile(const Product& p, const Activations& a, int64_t panel_index, const int64_t* rows, int64_t column,
                       const __m512i* tables, Ahead* ahead, __m512 (*sums)[4]) {
  constexpr int PARTS = 8 / BITS;
  const Panel& panel = a.panels[panel_index];
  const int64_t num_panels = a.panels.size(), width = a.width;
  const __mmask64 mask = First64(p.outputs - column);
  const int8_t* digits[ROWS];
  __m512i acc[ROWS][4][kDigits];
  for (int m = 0; m < ROWS; ++m) {
    const int64_t index = rows[m] * num_panels + panel_index;
    digits[m] = a.digits.data() + index * PARTS * kDigits * width;
    for (int k = 0; k < 4; ++k) {
      for (int d = 0; d < kDigits; ++d) acc[m][k][d] = _mm512_set1_epi32(a.start[index * kDigits * 16 + d]);
    }
  }
  const uint8_t* w = p.codes + panel.begin * p.outputs + column;
  for (int64_t b = 0; b < panel.size; b += 4, w += 4 * p.outputs) {
    __m512i fours[4];
    LoadFours<SIGNED>(w, p.outputs, panel.size - b, mask, ahead, fours);
    for (int k = 0; k < 4; ++k) {
      for (int s = 0; s < PARTS; ++s) {
        const __m512i codes = Part<BITS>(fours[k], s);
        for (int m = 0; m < ROWS; ++m) {
          const int8_t* x = digits[m] + s * kDigits * width + b;
          Multiply<PLANES>(codes, tables, FourBytes(x + 2 * width), FourBytes(x + width), FourBytes(x), acc[m][k]);
        }
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    __m512 f[4];
    for (int k = 0; k < 4; ++k) f[k] = Joined(acc[m][k][2], acc[m][k][1], acc[m][k][0]);
    InOrder(f, sums[m]);
  }
}

// The bytes of P of a panel times 64 outputs, expanded for several rows of x: (quads of rows of codes, parts, 4, planes).
template <int BITS, int PLANES, bool SIGNED>
static void ExpandTile(const Product& p, const Panel& panel, int64_t column, const __m512i* tables, Ahead* ahead,
                       __m512i* expanded) {
  const __mmask64 mask = First64(p.outputs - column);
  const uint8_t* w = p.codes + panel.begin * p.outputs + column;
  for (int64_t b = 0; b < panel.size; b += 4, w += 4 * p.outputs) {
    __m512i fours[4];
    LoadFours<SIGNED>(w, p.outputs, panel.size - b, mask, ahead, fours);
    for (int s = 0; s < 8 / BITS; ++s) {
      for (int k = 0; k < 4; ++k) {
        const __m512i codes = Part<BITS>(fours[k], s);
        *expanded++ = PLANES ? _mm512_shuffle_epi8(tables[0], codes) : codes;
        for (int i = 1; i < PLANES; ++i) *expanded++ = _mm512_shuffle_epi8(tables[i], codes);
      }
    }
  }
}

// As `ColumnTile`, with the weights of `ExpandTile`.
template <int PARTS, int PLANES, int ROWS>
static void ExpandedTile(const Activations& a, int64_t panel_index, const int64_t* rows, const __m512i* expanded,
                         __m512 (*sums)[4]) {
  constexpr int K = PLANES == 3 ? 1 : 2;  // vectors of outputs at a time, as many as have registers
  constexpr int BYTES = PLANES ? PLANES : 1;
  const int64_t num_panels = a.panels.size(), width = a.width, size = a.panels[panel_index].size;
  __m512 f[ROWS][4];
  for (int k0 = 0; k0 < 4; k0 += K) {
    const int8_t* digits[ROWS];
    __m512i acc[ROWS][K][kDigits];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const int64_t index = rows[m] * num_panels + panel_index;
      digits[m] = a.digits.data() + index * PARTS * kDigits * width;
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) {
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) acc[m][k][d] = _mm512_set1_epi32(a.start[index * kDigits * 16 + d]);
      }
    }
    const __m512i* w = expanded + k0 * BYTES;
    for (int64_t b = 0; b < size; b += 4) {
#pragma GCC unroll 4
      for (int s = 0; s < PARTS; ++s, w += 4 * BYTES) {
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
          const int8_t* x = digits[m] + s * kDigits * width + b;
          const __m512i x2 = FourBytes(x + 2 * width), x1 = FourBytes(x + width), x0 = FourBytes(x);
#pragma GCC unroll 4
          for (int k = 0; k < K; ++k) AddDigits<PLANES>(w + k * BYTES, x2, x1, x0, acc[m][k]);
        }
      }
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
      for (int k = 0; k < K; ++k) f[m][k0 + k] = Joined(acc[m][k][2], acc[m][k][1], acc[m][k][0]);
    }
  }
  for (int m = 0; m < ROWS; ++m) InOrder(f[m], sums[m]);
}

template <int BITS, int PLANES, bool SIGNED>
static void Columns(const Product& p, const Planes& planes, const Activations& a, int64_t begin, int64_t end) {
  constexpr int MOST = PLANES == 3 ? 1 : 2;  // as many rows as have registers
  __m512i tables[3];
  for (int k = 0; k < 3; ++k) {
    tables[k] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(planes.bytes[k])));
  }
  const float unit = planes.unit * (planes.count == 3 ? 65536.0f : 1.0f);
  const int64_t num_panels = a.panels.size(), num_rows = a.finite.size();
  __m512i expanded[kPanelBytes / 4 * (8 / BITS) * 4 * (PLANES ? PLANES : 1)];
  for (int64_t j = 0; j < num_panels; ++j) {
    Ahead ahead{p.codes + (a.panels[j].begin + a.panels[j].size) * p.outputs + begin, 0, end - begin, p.outputs};
    for (int64_t column = begin; column < end; column += 64) {
      __m512 scales[4], offsets[4];
      __mmask16 masks[4];
      for (int64_t i = 0; i < 4; ++i) {
        masks[i] = First16(end - column - 16 * i);
        if (!masks[i]) continue;
        scales[i] = Load16(p.scale, a.panels[j].group, column + 16 * i, masks[i]);
        if (p.offset.kind != kNone) offsets[i] = Load16(p.offset, a.panels[j].group, column + 16 * i, masks[i]);
      }
      const bool expand = num_rows > 2;
      if (expand) ExpandTile<BITS, PLANES, SIGNED>(p, a.panels[j], column, tables, &ahead, expanded);
      for (int64_t m = 0; m < num_rows;) {
        const int64_t count = std::min<int64_t>(expand ? 4 : MOST, num_rows - m);
        const int64_t* rows = &a.finite[m];
        __m512 sums[4][4];
        if (!expand && count == 1) ColumnTile<BITS, PLANES, SIGNED, 1>(p, a, j, rows, column, tables, &ahead, sums);
        if (!expand && count == 2) ColumnTile<BITS, PLANES, SIGNED, MOST>(p, a, j, rows, column, tables, &ahead, sums);
        if (expand && count == 1) ExpandedTile<8 / BITS, PLANES, 1>(a, j, rows, expanded, sums);
        if (expand && count == 2) ExpandedTile<8 / BITS, PLANES, 2>(a, j, rows, expanded, sums);
        if (expand && count == 3) ExpandedTile<8 / BITS, PLANES, 3>(a, j, rows, expanded, sums);
        if (expand && count == 4) ExpandedTile<8 / BITS, PLANES, 4>(a, j, rows, expanded, sums);
        for (int64_t r = 0; r < count; ++r) {
          const int64_t row = a.finite[m + r];
          const __m512 factor = _mm512_set1_ps(unit * a.unit[row * num_panels + j]);
          for (int64_t i = 0; i < 4 && masks[i]; ++i) {
            float* y = p.y + row * p.outputs + column + 16 * i;
            __m512 sum = j ? _mm512_maskz_loadu_ps(masks[i], y) : _mm512_setzero_ps();
            sum = _mm512_fmadd_ps(_mm512_mul_ps(sums[r][i], factor), scales[i], sum);
            if (p.offset.kind != kNone) {
              sum = _mm512_fmadd_ps(_mm512_set1_ps(a.total[row * num_panels + j]), offsets[i], sum);
            }
            _mm512_mask_storeu_ps(y, masks[i], sum);
          }
        }
        m += count;
      }
    }
  }
}

// Codes that lie by outputs: OUTPUTS rows of codes times a row of x; 64 bytes of each.
template <int BITS, int PLANES, bool SIGNED, int OUTPUTS>
static inline __attribute__((always_inline)) void RowPanel(const uint8_t* w, int64_t stride, __mmask64 mask, const uint8_t* ahead,
                                                           const int8_t* digits, int64_t width, __mmask64 inside,
                                                           const __m512i* tables, __m512i (*acc)[kDigits]) {
  __m512i bytes[OUTPUTS];
#pragma GCC unroll 4
  for (int n = 0; n < OUTPUTS; ++n) {
    bytes[n] = _mm512_maskz_loadu_epi8(mask, w + n * stride);
    _mm_prefetch(reinterpret_cast<const char*>(ahead + n * 64), _MM_HINT_T1);
    if (SIGNED) bytes[n] = _mm512_xor_si512(bytes[n], _mm512_set1_epi8(-128));
  }
#pragma GCC unroll 4
  for (int s = 0; s < 8 / BITS; ++s) {
    const int8_t* x = digits + s * kDigits * width;
    const __m512i x0 = _mm512_maskz_loadu_epi8(inside, x), x1 = _mm512_maskz_loadu_epi8(inside, x + width),
                  x2 = _mm512_maskz_loadu_epi8(inside, x + 2 * width);
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) Multiply<PLANES>(Part<BITS>(bytes[n], s), tables, x2, x1, x0, acc[n]);
  }
}

template <int OUTPUTS>
static inline __attribute__((always_inline)) void Start(const int32_t* start, __m512i (*acc)[kDigits]) {
#pragma GCC unroll 4
  for (int d = 0; d < kDigits; ++d) {
    const __m512i value = _mm512_loadu_si512(start + d * 16);
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) acc[n][d] = value;
  }
}

template <int BITS, int PLANES, bool SIGNED, bool GROUPS, int OUTPUTS>
static void RowTile(const Product& p, const Planes& planes, const Activations& a, int64_t row, int64_t first,
                    const __m512i* tables, const float* scales, int64_t scale_stride, const int32_t* lanes) {
  constexpr int64_t PARTS = 8 / BITS;
  const int64_t num_panels = a.panels.size(), width = a.width, row_bytes = NumGroups(p) * GroupBytes(p);
  const __mmask64 inside = First64(width);
  const Panel* panels = a.panels.data();
  const uint8_t* w = p.codes + first * row_bytes;
  const int8_t* digits = a.digits.data() + row * num_panels * PARTS * kDigits * width;
  const int32_t* start = a.start.data() + row * num_panels * kDigits * 16;
  __m512i acc[OUTPUTS][kDigits];
  __m512 sums[OUTPUTS];
  for (int n = 0; n < OUTPUTS; ++n) sums[n] = _mm512_setzero_ps();
  Start<OUTPUTS>(start, acc);
  for (int64_t j = 0; j < num_panels; ++j) {
    if (GROUPS) Start<OUTPUTS>(start + j * kDigits * 16, acc);
    RowPanel<BITS, PLANES, SIGNED, OUTPUTS>(w + j * 64, row_bytes, First64(row_bytes - j * 64), w + (j * OUTPUTS * 64 + kAhead),
                                            digits + j * PARTS * kDigits * width, width, inside, tables, acc);
    if (GROUPS) {
      const __m512i lane = _mm512_loadu_si512(lanes + j * 16);
#pragma GCC unroll 4
      for (int n = 0; n < OUTPUTS; ++n) {
        const __m512 scale =
            _mm512_permutexvar_ps(lane, _mm512_loadu_ps(scales + n * scale_stride + panels[j].group));
        sums[n] = _mm512_fmadd_ps(Joined(acc[n][2], acc[n][1], acc[n][0]), scale, sums[n]);
      }
    }
  }
  const float factor = planes.unit * (planes.count == 3 ? 65536.0f : 1.0f) * a.unit[row * num_panels];
#pragma GCC unroll 4
  for (int n = 0; n < OUTPUTS; ++n) {
    if (!GROUPS) sums[n] = Joined(acc[n][2], acc[n][1], acc[n][0]);
    const float sum = _mm512_reduce_add_ps(sums[n]) * factor;
    p.y[row * p.outputs + first + n] = GROUPS ? sum : sum * scales[n * scale_stride];
  }
}

// The sums of the activations of every group, for offsets: (M, groups).
static std::vector<float> GroupTotals(const Product& p) {
  std::vector<float> totals(p.rows * NumGroups(p));
  for (int64_t i = 0; i < static_cast<int64_t>(totals.size()); ++i) {
    float total = 0;
    for (int64_t k = 0; k < p.group; ++k) total += p.x[i * p.group + k];
    totals[i] = total;
  }
  return totals;
}

template <int BITS, int PLANES, bool SIGNED, bool GROUPS>
static void Rows(const Product& p, const Planes& planes, const Activations& a, int64_t begin, int64_t end) {
  __m512i tables[3];
  for (int k = 0; k < 3; ++k) {
    tables[k] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(planes.bytes[k])));
  }
  const int64_t groups = NumGroups(p), bytes = GroupBytes(p), num_rows = a.finite.size();
  std::vector<int32_t> lanes(a.panels.size() * 16);
  for (size_t i = 0; i < lanes.size(); ++i) {
    const Panel& panel = a.panels[i / 16];
    lanes[i] = static_cast<int32_t>(std::min((panel.begin + static_cast<int64_t>(i % 16) * 4) / bytes, groups - 1) -
                                    panel.group);
  }
  std::vector<float> totals;
  if (p.offset.kind != kNone) totals = GroupTotals(p);
  std::vector<float> scales(4 * (groups + 16));
  for (int64_t n = begin; n < end;) {
    const int64_t count = end - n >= 4 ? 4 : 1;
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t g = 0; g < groups; g += 16) {
        const __mmask16 mask = First16(groups - g);
        _mm512_mask_storeu_ps(scales.data() + i * (groups + 16) + g, mask, Load16(p.scale, n + i, g, mask));
      }
    }
    for (int64_t m = 0; m < num_rows; ++m) {
      if (count == 4) {
        RowTile<BITS, PLANES, SIGNED, GROUPS, 4>(p, planes, a, a.finite[m], n, tables, scales.data(), groups + 16,
                                                 lanes.data());
      } else {
        RowTile<BITS, PLANES, SIGNED, GROUPS, 1>(p, planes, a, a.finite[m], n, tables, scales.data(), groups + 16,
                                                 lanes.data());
      }
      if (p.offset.kind == kNone) continue;
      const int64_t row = a.finite[m];
      for (int64_t i = 0; i < count; ++i) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += totals[row * groups + g] * ScaleAt(p.offset, n + i, g);
        p.y[row * p.outputs + n + i] += sum;
      }
    }
    n += count;
  }
}

template <int BITS, int PLANES, bool SIGNED>
static void OutputsOf(const Product& p, const Planes& planes, const Activations& a, int64_t begin, int64_t end) {
  if (!p.by_output) return Columns<BITS, PLANES, SIGNED>(p, planes, a, begin, end);
  if (p.group != p.inputs) return Rows<BITS, PLANES, SIGNED, true>(p, planes, a, begin, end);
  Rows<BITS, PLANES, SIGNED, false>(p, planes, a, begin, end);
}

// The outputs [begin, end) of the rows `a.finite` of x.
static void Outputs(const Product& p, const Planes& planes, const Activations& a, int64_t begin, int64_t end) {
  if (p.bits == 8) {
    if (p.kind == kInt8) return OutputsOf<8, 0, true>(p, planes, a, begin, end);
    return OutputsOf<8, 0, false>(p, planes, a, begin, end);
  }
  if (p.bits == 2) return OutputsOf<2, 0, false>(p, planes, a, begin, end);
  if (planes.count == 3) return OutputsOf<4, 3, false>(p, planes, a, begin, end);
  if (planes.count == 1) return OutputsOf<4, 1, false>(p, planes, a, begin, end);
  OutputsOf<4, 0, false>(p, planes, a, begin, end);
}

}  // namespace vnni
