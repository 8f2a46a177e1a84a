// Products of rounded activations by AVX2; blockwise.h describes the operands and quads_avx2.h the arithmetic. A row has the
// same result in whatever number of rows. Included with the compiler's target set.

namespace avx2 {

constexpr int kRows = 4;  // rows of x that are multiplied together with expanded codes

// The values of codes for a `Format`: value = unit * (P - zero), with signed bytes P of tables and of int8.
struct SignedValues {
  int32_t zero;
  alignas(16) uint8_t bytes[16];
};

static SignedValues SignedValuesOf(const Product& p, const ByteValues& v) {
  SignedValues s{p.kind == kInt8 || v.table ? 0 : v.zero, {}};
  for (int64_t i = 0; i < 16; ++i) s.bytes[i] = static_cast<uint8_t>(v.bytes[i] ^ 0x80);
  return s;
}

// Rounded activations in the order of a format. V panels: those of the blocks where codes lie by inputs, else vectors of 32
// bytes of an output. T parts of a byte with blocks of their own.
struct Quads {
  int64_t panels, sums, stride;
  int64_t of_row, of_panel;          // the distance of rows and of panels in x, in bytes
  std::vector<uint8_t> x;            // by inputs (V, M, operands, 32), by outputs (M, V, operands, 32)
  std::vector<int32_t> start;        // by outputs: (M, V, T, 8), -zero times the sum of the codes of a quad
  std::vector<float> scale;          // by outputs: (M, V, T, 8)
  std::vector<float> total;          // (M, groups)
  std::vector<int32_t> group;        // by outputs: (V, 8), the group of a quad after that of the first one
  std::vector<int64_t> first_group;  // by outputs: (V)
};

static bool HasQuads(const Product& p, const Blocks& blocks) {
  if (blocks.panels.empty()) return false;
  return !p.by_output || GroupBytes(p) % 4 == 0 || (NumGroups(p) == 1 && p.bits == 8);
}

template <typename Format>
static void Divide(const Product& p, const Blocks& blocks, Quads* a) {
  const int64_t bytes = GroupBytes(p), groups = NumGroups(p), all = groups * bytes;
  a->stride = 32;
  a->sums = blocks.joint ? 1 : Format::kParts;
  a->panels = p.by_output ? (all + 31) / 32 : blocks.panels.size();
  const int64_t together = Format::kOperands * a->stride;
  a->of_panel = p.by_output ? together : p.rows * together;
  a->of_row = p.by_output ? a->panels * together : together;
  a->x.resize(p.rows * a->panels * together);
  a->total.resize(p.rows * groups);
  if (!p.by_output) return;
  a->start.resize(p.rows * a->panels * a->sums * 8);
  a->scale.resize(p.rows * a->panels * a->sums * 8);
  a->group.resize(a->panels * 8);
  a->first_group.resize(a->panels);
  for (int64_t i = 0; i < a->panels * 8; ++i) {
    a->first_group[i / 8] = i / 8 * 32 / bytes;
    a->group[i] = static_cast<int32_t>(std::min(i * 4 / bytes, groups - 1) - a->first_group[i / 8]);
  }
}

// Writes the activations of a row, which other threads do not write.
template <typename Format>
static void ArrangeRow(const Product& p, const Blocks& blocks, const SignedValues& v, const Rounded& r, int64_t row, Quads* a) {
  const int64_t count = blocks.list.size(), groups = NumGroups(p);
  uint8_t* x = a->x.data() + row * a->of_row;
  if (p.by_output) std::memset(x, 0, a->of_row);  // what a last vector has after the last input
  const int64_t lanes = a->panels * a->sums * 8;
  if (p.by_output) std::fill_n(a->scale.data() + row * lanes, lanes, 0.0f);
  for (size_t j = 0; j < blocks.panels.size(); ++j) {
    const Panel& panel = blocks.panels[j];
    for (int s = 0; s < Format::kParts; ++s) {
      const int64_t block = row * count + panel.block + (blocks.joint ? 0 : s);
      const int8_t* codes = r.codes.data() + block * blocks.stride + (blocks.joint ? s * panel.size : 0);
      // A panel may end within a vector, and so is written quad by quad where codes lie by outputs.
      const int64_t most = p.by_output ? 4 : panel.size;
      for (int64_t b = 0; b < panel.size; b += most) {
        const int64_t size = std::min(most, panel.size - b), byte = panel.begin + b;
        const auto integers = [&](int64_t i) {
          alignas(8) int8_t eight[8] = {};
          std::memcpy(eight, codes + b + i, std::min<int64_t>(8, size - i));
          return _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(eight)));
        };
        if (!p.by_output) {
          Arrange<Format, 1>(size, s, a->stride, integers, x + j * a->of_panel);
          continue;
        }
        alignas(32) uint8_t quad[Format::kOperands * 8];
        Arrange<Format, 1>(size, s, 8, integers, quad);
        for (int i = s * Format::kOfPart; i < (s + 1) * Format::kOfPart; ++i) {
          std::memcpy(x + byte / 32 * a->of_panel + i * 32 + byte % 32, quad + i * 8, 4);
        }
        a->scale[row * lanes + (byte / 32 * a->sums + (blocks.joint ? 0 : s)) * 8 + byte % 32 / 4] = r.scale[block];
      }
    }
  }
  const int per_sum = Format::kOperands / static_cast<int>(a->sums);
  for (int64_t i = 0; i < (p.by_output ? a->panels * a->sums : 0); ++i) {
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < per_sum; ++k) sum = _mm256_add_epi32(sum, Format::Sum(Load32(x + (i * per_sum + k) * 32)));
    sum = _mm256_mullo_epi32(sum, _mm256_set1_epi32(-v.zero));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a->start.data() + row * lanes + i * 8), sum);
  }
  float* total = a->total.data() + row * groups;
  std::fill_n(total, groups, 0.0f);
  for (int64_t j = 0; j < count; ++j) total[blocks.list[j].group] += r.total[row * count + j];
}

// acc * scale * the scale of the weight + sum: the one order of these operations.
static inline __m256 AddScaled(__m256 acc, __m256 scale, __m256 of_weight, __m256 sum) {
  return _mm256_fmadd_ps(_mm256_mul_ps(acc, scale), of_weight, sum);
}

// A panel of a tile of 16 outputs, where codes lie by inputs or in tiles.
struct PanelOfTile {
  int64_t panel, quads;
  const float *scales, *offsets;  // of the outputs
};

// sums += ROWS rows of x, from `row` on, times a panel of a tile. `load(q)` makes a quad of codes current, `codes(i, w)`
// expands it.
template <typename Format, int ROWS, typename Load, typename Codes>
static inline __attribute__((always_inline)) void AddPanel(const Product& p, const Blocks& blocks, int32_t zero,
                                                           const Rounded& r, const Quads& a, const PanelOfTile& t,
                                                           int64_t row, SumsOfTile* sums, const Load& load, const Codes& codes) {
  const Panel& panel = blocks.panels[t.panel];
  const int64_t count = blocks.list.size();
  const uint8_t* x[ROWS];
  for (int m = 0; m < ROWS; ++m) x[m] = a.x.data() + (row + m) * a.of_row + t.panel * a.of_panel;
  const auto of_x = [&](int m, int64_t q, int i, int) { return FourBytes(x[m] + i * 32 + 4 * q); };
  const __m256 scales[2] = {_mm256_loadu_ps(t.scales), _mm256_loadu_ps(t.scales + 8)};
  for (int s = 0; s < a.sums; ++s) {
    __m256i acc[ROWS][2][1];
    const int64_t block = row * count + panel.block + s;
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      acc[m][0][0] = acc[m][1][0] = zero ? _mm256_set1_epi32(r.start[block + m * count]) : _mm256_setzero_si256();
    }
    if (a.sums == 1) {
      MultiplyAdd<Format, ROWS, 1>(t.quads, 0, Format::kOperands, load, codes, of_x, acc);
    } else {
      MultiplyAdd<Format, ROWS, 1>(t.quads, s * Format::kOfPart, (s + 1) * Format::kOfPart, load, codes, of_x, acc);
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      const __m256 scale = _mm256_set1_ps(r.scale[block + m * count]);
      for (int k = 0; k < 2; ++k) {
        float* sum = sums[m].of_output + 8 * k;
        _mm256_store_ps(sum, AddScaled(_mm256_cvtepi32_ps(acc[m][k][0]), scale, scales[k], _mm256_load_ps(sum)));
      }
    }
  }
  const bool last_of_group = t.panel + 1 == a.panels || blocks.panels[t.panel + 1].group != panel.group;
  for (int m = 0; m < ROWS && p.offset.kind != kNone && last_of_group; ++m) {
    const __m256 total = _mm256_set1_ps(a.total[(row + m) * NumGroups(p) + panel.group]);
    for (int k = 0; k < 2; ++k) {
      float* sum = sums[m].of_output + 8 * k;
      _mm256_store_ps(sum, _mm256_fmadd_ps(total, _mm256_loadu_ps(t.offsets + 8 * k), _mm256_load_ps(sum)));
    }
  }
}

// Codes that lie by inputs or in tiles: the outputs [begin, end) of the rows [first_row, last_row) of x.
template <typename Format>
static void Columns(const Product& p, const Blocks& blocks, const SignedValues& v, const Rounded& r, const Quads& a,
                    int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
  constexpr int OPERANDS = Format::kOperands;
  const Format format(v.bytes);
  const int64_t rows = last_row - first_row;
  alignas(32) __m256i expanded[kBlock / 4 * OPERANDS * 2];
  static thread_local std::vector<SumsOfTile> sums;  // keeps its memory from call to call
  sums.resize(rows);
  static thread_local std::vector<float> scales, offsets;  // (groups, 16)
  scales.resize(NumGroups(p) * kTileOutputs);
  offsets.resize(p.offset.kind == kNone ? 0 : scales.size());
  for (int64_t line = begin; line < end; line += kLine) {
    const Tiles tiles(p, blocks.panels, line, std::min(line + kLine, end));
    for (int64_t n = line; n < std::min(line + kLine, end); n += kTileOutputs) {
      const int64_t width = std::min(kTileOutputs, end - n);
      const uint8_t* quads = tiles.Of(n);
      std::fill_n(sums.begin(), rows, SumsOfTile{});
      ScalesOfTile(p.scale, NumGroups(p), n, width, scales.data());
      if (p.offset.kind != kNone) ScalesOfTile(p.offset, NumGroups(p), n, width, offsets.data());
      PanelOfTile t{};
      for (t.panel = 0; t.panel < a.panels; ++t.panel, quads += t.quads * kQuadBytes) {
        const Panel& panel = blocks.panels[t.panel];
        t.quads = NumQuads(panel.size);
        t.scales = scales.data() + panel.group * kTileOutputs;
        t.offsets = offsets.data() + panel.group * kTileOutputs;
        __m256i quad[2];
        const auto load = [&](int64_t q) { LoadQuad(quads + q * kQuadBytes, quad); };
        const auto codes = [&](int i, __m256i* w) { w[0] = format.Expand(quad[0], i), w[1] = format.Expand(quad[1], i); };
        if (rows == 1) {
          AddPanel<Format, 1>(p, blocks, v.zero, r, a, t, first_row, sums.data(), load, codes);
          continue;
        }
        for (int64_t q = 0; q < t.quads; ++q) {
          load(q);
          for (int i = 0; i < OPERANDS; ++i) codes(i, expanded + (q * OPERANDS + i) * 2);
        }
        const __m256i* at = expanded;
        const auto from = [&](int64_t q) { at = expanded + q * OPERANDS * 2; };
        const auto expanded_codes = [&](int i, __m256i* w) { w[0] = at[2 * i], w[1] = at[2 * i + 1]; };
        int64_t row = 0;
        for (; row + kRows <= rows; row += kRows) {
          AddPanel<Format, kRows>(p, blocks, v.zero, r, a, t, first_row + row, sums.data() + row, from, expanded_codes);
        }
        for (; row < rows; ++row) {
          AddPanel<Format, 1>(p, blocks, v.zero, r, a, t, first_row + row, sums.data() + row, from, expanded_codes);
        }
      }
      for (int64_t m = 0; m < rows; ++m) {
        std::memcpy(p.y + (first_row + m) * p.outputs + n, sums[m].of_output, 4 * width);
      }
    }
  }
}

// ROWS rows of x times two outputs. `load(j)` makes their codes of the vector j current, `codes(i, w)` expands these.
template <typename Format, int ROWS, typename Load, typename Codes>
static inline __attribute__((always_inline)) void TwoOutputs(const Quads& a, int64_t row, const float* scales,
                                                             int64_t scale_stride, const Load& load, const Codes& codes,
                                                             float (*y)[2]) {
  __m256 sums[ROWS][2];
  for (int m = 0; m < ROWS; ++m) sums[m][0] = sums[m][1] = _mm256_setzero_ps();
  for (int64_t j = 0; j < a.panels; ++j) {
    const __m256i lane = Load32(a.group.data() + j * 8);
    const float* first = scales + a.first_group[j];
    const __m256 of_weight[2] = {_mm256_permutevar8x32_ps(_mm256_loadu_ps(first), lane),
                                 _mm256_permutevar8x32_ps(_mm256_loadu_ps(first + scale_stride), lane)};
    const auto load_vector = [&](int64_t) { load(j); };
    const auto of_x = [&](int m, int64_t, int i, int) {
      return Load32(a.x.data() + (row + m) * a.of_row + j * a.of_panel + i * 32);
    };
    for (int s = 0; s < a.sums; ++s) {
      __m256i acc[ROWS][2][1];
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        acc[m][0][0] = acc[m][1][0] = Load32(a.start.data() + (((row + m) * a.panels + j) * a.sums + s) * 8);
      }
      if (a.sums == 1) {
        MultiplyAdd<Format, ROWS, 1>(1, 0, Format::kOperands, load_vector, codes, of_x, acc);
      } else {
        MultiplyAdd<Format, ROWS, 1>(1, s * Format::kOfPart, (s + 1) * Format::kOfPart, load_vector, codes, of_x, acc);
      }
#pragma GCC unroll 4
      for (int m = 0; m < ROWS; ++m) {
        const __m256 scale = _mm256_loadu_ps(a.scale.data() + (((row + m) * a.panels + j) * a.sums + s) * 8);
        for (int k = 0; k < 2; ++k) {
          sums[m][k] = AddScaled(_mm256_cvtepi32_ps(acc[m][k][0]), scale, of_weight[k], sums[m][k]);
        }
      }
    }
  }
  for (int m = 0; m < ROWS; ++m) {
    for (int k = 0; k < 2; ++k) y[m][k] = SumOfEight(sums[m][k]);
  }
}

template <typename Format>
static void Rows(const Product& p, const SignedValues& v, const Quads& a, int64_t first_row, int64_t last_row,
                 int64_t begin, int64_t end) {
  constexpr int OPERANDS = Format::kOperands;
  const Format format(v.bytes);
  const int64_t groups = NumGroups(p), row_bytes = groups * GroupBytes(p), whole = row_bytes / 32, stride = groups + 16;
  std::vector<float> scales(2 * stride), offsets(groups + 8);
  alignas(32) uint8_t last[2][32] = {};
  thread_local std::vector<uint8_t> expanded;  // (V, operands, 2 outputs), keeps its memory from call to call
  const bool expand = last_row - first_row >= kRows;
  if (expand) expanded.resize(a.panels * OPERANDS * 64);
  for (int64_t n = begin; n < end; n += 2) {
    const int64_t count = std::min<int64_t>(2, end - n);
    const uint8_t* w[2] = {p.codes + n * row_bytes, p.codes + (n + count - 1) * row_bytes};
    for (int64_t k = 0; k < 2; ++k) {
      LoadScales(p.scale, n + std::min(k, count - 1), 0, groups, scales.data() + k * stride);
      if (row_bytes % 32) std::memcpy(last[k], w[k] + whole * 32, row_bytes % 32);
    }
    for (int64_t b = 0; b < 2 * row_bytes; b += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(w[0] + b + kAheadBytes), _MM_HINT_T1);
    }
    __m256i quads[2];
    const auto load = [&](int64_t j) {
      for (int k = 0; k < 2; ++k) quads[k] = Load32(j < whole ? w[k] + j * 32 : last[k]);
    };
    const auto codes = [&](int i, __m256i* out) { out[0] = format.Expand(quads[0], i), out[1] = format.Expand(quads[1], i); };
    const uint8_t* at = expanded.data();
    const auto from = [&](int64_t j) { at = expanded.data() + j * OPERANDS * 64; };
    const auto expanded_codes = [&](int i, __m256i* out) { out[0] = Load32(at + i * 64), out[1] = Load32(at + i * 64 + 32); };
    for (int64_t j = 0; j < a.panels && expand; ++j) {
      load(j);
      for (int i = 0; i < OPERANDS; ++i) {
        __m256i two[2];
        codes(i, two);
        std::memcpy(expanded.data() + (j * OPERANDS + i) * 64, two, 64);
      }
    }
    int64_t row = first_row;
    float y[kRows][2];
    for (; row + kRows <= last_row; row += kRows) {
      TwoOutputs<Format, kRows>(a, row, scales.data(), stride, from, expanded_codes, y);
      for (int64_t m = 0; m < kRows; ++m) std::memcpy(p.y + (row + m) * p.outputs + n, y[m], 4 * count);
    }
    for (; row < last_row; ++row) {
      TwoOutputs<Format, 1>(a, row, scales.data(), stride, load, codes, y);
      std::memcpy(p.y + row * p.outputs + n, y[0], 4 * count);
    }
    if (p.offset.kind == kNone) continue;
    for (int64_t k = 0; k < count; ++k) {
      LoadScales(p.offset, n + k, 0, groups, offsets.data());
      for (row = first_row; row < last_row; ++row) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += a.total[row * groups + g] * offsets[g];
        p.y[row * p.outputs + n + k] += sum;
      }
    }
  }
}

static void Divide(const Product& p, const Blocks& blocks, bool table, Quads* a) {
  WithFormat(p, table, [&](auto* f) { Divide<std::remove_pointer_t<decltype(f)>>(p, blocks, a); });
}

static void ArrangeRow(const Product& p, const Blocks& blocks, bool table, const SignedValues& v, const Rounded& r,
                       int64_t row, Quads* a) {
  WithFormat(p, table, [&](auto* f) { ArrangeRow<std::remove_pointer_t<decltype(f)>>(p, blocks, v, r, row, a); });
}

// The outputs [begin, end) of the rows [first_row, last_row).
static void Outputs(const Product& p, const Blocks& blocks, bool table, const SignedValues& v, const Rounded& r,
                    const Quads& a, int64_t first_row, int64_t last_row, int64_t begin, int64_t end) {
  WithFormat(p, table, [&](auto* f) {
    using Format = std::remove_pointer_t<decltype(f)>;
    if (p.by_output) return Rows<Format>(p, v, a, first_row, last_row, begin, end);
    constexpr int64_t kMost = 64;  // rows whose activations and outputs of a tile stay in the caches
    for (int64_t row = first_row; row < last_row; row += kMost) {
      Columns<Format>(p, blocks, v, r, a, row, std::min(row + kMost, last_row), begin, end);
    }
  });
}

}  // namespace avx2
