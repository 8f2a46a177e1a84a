// Products of rounded activations where the codes of an output lie in a row, as those of embedding tables, by AVX-512 VNNI.
// Included with the compiler's target set.

namespace vnni {

// Activations in the order of 64 bytes of codes. V vectors of a row, S parts of a byte, T parts with blocks of their own.
struct Lanes {
  int64_t vectors;
  std::vector<int8_t> codes;   // (M, V, S, 64)
  std::vector<int32_t> start;  // (M, V, T, 16)
  std::vector<float> scale;    // (M, V, T, 16)
  std::vector<float> total;    // (M, groups)
  std::vector<int32_t> group;  // (V, 16): the group of a lane after that of the first lane
  std::vector<int64_t> first_group;  // (V)
};

// Whether four bytes of a row of codes lie in one block.
static bool HasLanes(const Product& p, const Blocks& blocks) {
  if (blocks.panels.empty()) return false;
  return GroupBytes(p) % 4 == 0 || (NumGroups(p) == 1 && p.bits == 8);
}

static void LanesOf(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, Lanes* lanes) {
  const int64_t parts = CodesPerByte(p), sums = blocks.joint ? 1 : parts, bytes = GroupBytes(p), groups = NumGroups(p);
  const int64_t all = groups * bytes, count = blocks.list.size(), vectors = (all + 63) / 64;
  lanes->vectors = vectors;
  lanes->codes.assign(p.rows * vectors * parts * 64, 0);
  lanes->start.assign(p.rows * vectors * sums * 16, 0);
  lanes->scale.assign(p.rows * vectors * sums * 16, 0);
  lanes->total.assign(p.rows * groups, 0);
  lanes->group.assign(vectors * 16, 0);
  lanes->first_group.resize(vectors);
  for (int64_t i = 0; i < vectors * 16; ++i) {
    lanes->first_group[i / 16] = i / 16 * 64 / bytes;
    lanes->group[i] = static_cast<int32_t>(std::min(i * 4 / bytes, groups - 1) - lanes->first_group[i / 16]);
  }
  for (int64_t m = 0; m < p.rows; ++m) {
    for (const Panel& panel : blocks.panels) {
      for (int64_t b = 0; b < panel.size; b += 4) {
        const int64_t byte = panel.begin + b, vector = m * vectors + byte / 64, lane = byte % 64 / 4;
        for (int64_t s = 0; s < parts; ++s) {
          const int64_t block = m * count + panel.block + (blocks.joint ? 0 : s);
          const int8_t* x = r.codes.data() + block * blocks.stride + (blocks.joint ? s * panel.size : 0) + b;
          std::memcpy(lanes->codes.data() + (vector * parts + s) * 64 + lane * 4, x, 4);
          const int64_t at = (vector * sums + (blocks.joint ? 0 : s)) * 16 + lane;
          lanes->start[at] -= v.zero * (x[0] + x[1] + x[2] + x[3]);
          lanes->scale[at] = r.scale[block];
        }
      }
    }
    for (int64_t j = 0; j < count; ++j) lanes->total[m * groups + blocks.list[j].group] += r.total[m * count + j];
  }
}

// The sums of four vectors.
static inline __m128 SumsOfFour(const __m512* v) {
  const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(v[0], v[1], 0x44), _mm512_shuffle_f32x4(v[0], v[1], 0xee)),
               b = _mm512_add_ps(_mm512_shuffle_f32x4(v[2], v[3], 0x44), _mm512_shuffle_f32x4(v[2], v[3], 0xee));
  const __m512 lanes = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));  // one of each
  const __m512 pairs = _mm512_add_ps(lanes, _mm512_permute_ps(lanes, 0x4e));
  return _mm512_castps512_ps128(_mm512_maskz_compress_ps(0x1111, _mm512_add_ps(pairs, _mm512_permute_ps(pairs, 0xb1))));
}

// ROWS rows of x times OUTPUTS outputs.
template <int BITS, bool TABLE, bool SIGNED, bool JOINT, bool GROUPS, int ROWS, int OUTPUTS>
static void SomeOutputs(const Product& p, const Lanes& lanes, __m512i table, int64_t row, int64_t first,
                        const float* scales, int64_t scale_stride) {
  constexpr int PARTS = 8 / BITS, SUMS = JOINT ? 1 : PARTS;
  const int64_t row_bytes = NumGroups(p) * GroupBytes(p);
  const uint8_t* w = p.codes + first * row_bytes;
  __m512 sums[ROWS][4];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < 4; ++n) sums[m][n] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < lanes.vectors; ++j) {
    const __mmask64 mask = First64(row_bytes - j * 64);
    __m512i bytes[OUTPUTS], acc[ROWS][OUTPUTS];
    __m512 of_weight[OUTPUTS];
    const __m512i group = _mm512_loadu_si512(lanes.group.data() + j * 16);
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) {
      bytes[n] = _mm512_maskz_loadu_epi8(mask, w + n * row_bytes + j * 64);
      _mm_prefetch(reinterpret_cast<const char*>(w + (j * OUTPUTS + n) * 64 + kAheadBytes), _MM_HINT_T1);
      if (SIGNED) bytes[n] = _mm512_xor_si512(bytes[n], _mm512_set1_epi8(-128));
      if (GROUPS) {
        of_weight[n] = _mm512_permutexvar_ps(group, _mm512_loadu_ps(scales + n * scale_stride + lanes.first_group[j]));
      }
    }
#pragma GCC unroll 4
    for (int s = 0; s < PARTS; ++s) {
      __m512i codes[OUTPUTS];
#pragma GCC unroll 4
      for (int n = 0; n < OUTPUTS; ++n) {
        codes[n] = Part<BITS>(bytes[n], s);
        if (TABLE) codes[n] = _mm512_shuffle_epi8(table, codes[n]);
      }
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const int64_t vector = (row + m) * lanes.vectors + j, at = (vector * SUMS + (JOINT ? 0 : s)) * 16;
        const __m512i x = _mm512_loadu_si512(lanes.codes.data() + (vector * PARTS + s) * 64);
        const __m512i start = _mm512_loadu_si512(lanes.start.data() + at);
        const __m512 scale = _mm512_loadu_ps(lanes.scale.data() + at);
#pragma GCC unroll 4
        for (int n = 0; n < OUTPUTS; ++n) {
          acc[m][n] = _mm512_dpbusd_epi32(JOINT && s ? acc[m][n] : start, codes[n], x);
          if (JOINT && s + 1 < PARTS) continue;
          if (GROUPS) {
            sums[m][n] = AddScaled(acc[m][n], scale, of_weight[n], sums[m][n]);
          } else {
            sums[m][n] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[m][n]), scale, sums[m][n]);
          }
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    alignas(16) float total[4];
    _mm_store_ps(total, SumsOfFour(sums[m]));
    float* y = p.y + (row + m) * p.outputs + first;
#pragma GCC unroll 4
    for (int n = 0; n < OUTPUTS; ++n) y[n] = GROUPS ? total[n] : total[n] * scales[n * scale_stride];
  }
}

template <int BITS, bool TABLE, bool SIGNED, bool JOINT, bool GROUPS>
static void ByOutput(const Product& p, const ByteValues& v, const Lanes& lanes, int64_t begin, int64_t end) {
  constexpr int MOST = JOINT || GROUPS ? 2 : 4;  // rows at a time, as many as have registers
  const __m512i table = Table(v);
  const int64_t groups = NumGroups(p), stride = groups + 16;
  std::vector<float> scales(4 * stride), offsets(p.offset.kind != kNone ? 4 * stride : 0);
  const auto load = [&](const Scales& s, int64_t output, float* values) {
    for (int64_t g = 0; g < groups; g += 16) {
      const __mmask16 inside = First16(groups - g);
      _mm512_mask_storeu_ps(values + g, inside, Load16(s, output, g, inside));
    }
  };
  for (int64_t n = begin; n < end;) {
    const int64_t count = end - n >= 4 ? 4 : 1;
    for (int64_t i = 0; i < count; ++i) {
      load(p.scale, n + i, scales.data() + i * stride);
      if (p.offset.kind != kNone) load(p.offset, n + i, offsets.data() + i * stride);
    }
    for (int64_t m = 0; m < p.rows;) {
      const bool several = count == 4 && p.rows - m >= MOST;
      if (several) SomeOutputs<BITS, TABLE, SIGNED, JOINT, GROUPS, MOST, 4>(p, lanes, table, m, n, scales.data(), stride);
      if (count == 4 && !several) {
        SomeOutputs<BITS, TABLE, SIGNED, JOINT, GROUPS, 1, 4>(p, lanes, table, m, n, scales.data(), stride);
      }
      if (count == 1) SomeOutputs<BITS, TABLE, SIGNED, JOINT, GROUPS, 1, 1>(p, lanes, table, m, n, scales.data(), stride);
      m += several ? MOST : 1;
    }
    for (int64_t m = 0; m < p.rows && p.offset.kind != kNone; ++m) {
      const float* total = lanes.total.data() + m * groups;
      for (int64_t i = 0; i < count; ++i) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += total[g] * offsets[i * stride + g];
        p.y[m * p.outputs + n + i] += sum;
      }
    }
    n += count;
  }
}

// All rows of x, the outputs [begin, end).
template <int BITS, bool TABLE, bool SIGNED>
static void OutputsOfRows(const Product& p, const Blocks& blocks, const ByteValues& v, const Lanes& lanes, int64_t begin,
                          int64_t end) {
  if (blocks.joint) return ByOutput<BITS, TABLE, SIGNED, true, true>(p, v, lanes, begin, end);
  if (NumGroups(p) > 1) return ByOutput<BITS, TABLE, SIGNED, false, true>(p, v, lanes, begin, end);
  ByOutput<BITS, TABLE, SIGNED, false, false>(p, v, lanes, begin, end);
}

}  // namespace vnni
