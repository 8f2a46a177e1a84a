// Products of float32 activations by AVX2: the integers of vnni_operands.h, split into digits of the format of the codes, or
// float32 where the values of codes are not small integers (NF4). Included with the compiler's target set.

namespace avx2 {

// The values of codes as integers: value = unit * (P - zero), where P is the code or, of a table, a signed byte.
struct Values {
  bool table, floats;  // floats: there are no such integers
  float unit;
  int64_t zero;
  alignas(16) uint8_t bytes[16];
};

static Values ValuesOf(const Product& p) {
  Values v{false, false, 1.0f, 0, {}};
  if (p.kind != kTable) return v;
  if (IsConsecutive(p)) {
    v.zero = -static_cast<int64_t>(p.table[0]);
    return v;
  }
  v.table = true;
  v.unit = 0.5f;
  for (int64_t i = 0; i < 1 << p.bits; ++i) {
    const float twice = 2 * p.table[i];
    v.floats |= !(twice == std::nearbyint(twice) && std::fabs(twice) <= 127);
    if (!v.floats) v.bytes[i] = static_cast<uint8_t>(static_cast<int8_t>(twice));
  }
  for (int64_t i = 1 << p.bits; i < 16; ++i) v.bytes[i] = v.bytes[i % (1 << p.bits)];
  if (v.floats) v.unit = 1.0f;
  return v;
}

// A part of the codes: `size` rows of codes in one group where codes lie by inputs, else at most 32 bytes of each output.
struct Panel {
  int64_t begin, size, group;
};

struct Activations {
  int64_t stride;   // bytes of an operand and digit of a panel; 32 where codes lie by outputs
  int64_t of_panel;  // bytes of a panel
  std::vector<Panel> panels;
  std::vector<uint8_t> x;         // (M, panels, of_panel)
  std::vector<int32_t> start;     // (M, panels, digits, 8): -zero * x by digits; by inputs its sum in all lanes
  std::vector<float> unit;        // (M, panels): the unit of the integers times that of the values
  std::vector<float> total;       // (M, groups): sums of the activations
  std::vector<int64_t> finite, others;  // rows of x that have digits, and those left to float arithmetic
  std::vector<float> by_part;     // memory of one row: (S, bytes of the codes of an output), in the order of the codes
};

static bool Has(const Product& p, const Values& values) {
  return (!values.floats || p.bits == 4) && (!p.by_output || p.group == p.inputs || GroupBytes(p) % 4 == 0);
}

static void Divide(const Product& p, Activations* a) {
  const int64_t bytes = GroupBytes(p), all = NumGroups(p) * bytes;
  a->panels.clear();
  a->stride = 32;
  if (p.by_output) {
    for (int64_t b = 0; b < all; b += 32) a->panels.push_back({b, std::min<int64_t>(32, all - b), b / bytes});
    return;
  }
  for (int64_t g = 0; g < NumGroups(p); ++g) {
    for (int64_t b = 0; b < bytes; b += kPanelBytes) {
      a->panels.push_back({g * bytes + b, std::min(kPanelBytes, bytes - b), g});
      a->stride = std::max(a->stride, (a->panels.back().size + 31) / 32 * 32);
    }
  }
}

static float LargestMagnitude(const float* x, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  float magnitude;
  std::memcpy(&magnitude, &largest, 4);
  return magnitude;
}

// Writes the digits of a row; false if its magnitudes have none.
template <typename Format>
static bool PrepareRow(const Product& p, const Values& values, int64_t row, Activations* a) {
  constexpr int DIGITS = Format::kDigits;
  const float* x = p.x + row * p.inputs;
  const int64_t bytes = GroupBytes(p), groups = NumGroups(p), all = groups * bytes, num_panels = a->panels.size();
  const float of_row = LargestMagnitude(x, p.inputs);
  if (!values.floats && !(of_row == 0 || (of_row > 1e-18f && of_row < 1e18f))) return false;
  const int64_t padded = all + 8;
  a->by_part.resize(Format::kParts * padded);
  for (int64_t g = 0; g < groups; ++g) {
    for (int s = 0; s < Format::kParts; ++s) {
      std::memcpy(a->by_part.data() + s * padded + g * bytes, x + g * p.group + s * bytes, 4 * bytes);
    }
  }
  float* total = a->total.data() + row * groups;
  for (int64_t g = 0; g < groups; ++g) total[g] = 0;
  for (int64_t j = 0; j < num_panels; ++j) {
    const Panel& panel = a->panels[j];
    const float* parts = a->by_part.data() + panel.begin;
    float largest = of_row;
    if (!p.by_output) {
      largest = 0;
      for (int s = 0; s < Format::kParts; ++s) largest = std::max(largest, LargestMagnitude(parts + s * padded, panel.size));
    }
    // Numbers below 2^-40 of the row are as good as 0.
    const int exponent = largest > of_row * 0x1p-40f ? Exponent(largest) : Exponent(of_row > 0 ? of_row : 1);
    const __m256 to_integers = _mm256_set1_ps(PowerOfTwo(exponent));
    uint8_t* digits = a->x.data() + (row * num_panels + j) * a->of_panel;
    for (int s = 0; s < Format::kParts; ++s) {
      Arrange<Format, DIGITS>(panel.size, s, a->stride, [&](int64_t b) {
        const __m256 inside = _mm256_cmp_ps(_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7),
                                            _mm256_set1_ps(static_cast<float>(panel.size - b)), _CMP_LT_OQ);
        const __m256 eight = _mm256_and_ps(inside, _mm256_loadu_ps(parts + s * padded + b));
        if (values.floats) return _mm256_castps_si256(eight);
        return _mm256_cvtps_epi32(_mm256_mul_ps(eight, to_integers));
      }, digits);
    }
    a->unit[row * num_panels + j] = values.floats ? 1.0f : PowerOfTwo(-exponent) * values.unit;
    int32_t* start = a->start.data() + (row * num_panels + j) * DIGITS * 8;
    for (int d = 0; d < DIGITS && values.zero; ++d) {
      __m256i sum = _mm256_setzero_si256();
      for (int i = 0; i < Format::kOperands; ++i) {
        for (int64_t b = 0; b < a->stride; b += 32) {
          sum = _mm256_add_epi32(sum, Format::Sum(Load32(digits + (i * DIGITS + d) * a->stride + b)));
        }
      }
      if (!p.by_output) sum = _mm256_set1_epi32(static_cast<int32_t>(SumOfEight(sum)));
      const __m256i minus_zero = _mm256_set1_epi32(static_cast<int>(-values.zero));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(start + d * 8), _mm256_mullo_epi32(minus_zero, sum));
    }
  }
  if (p.offset.kind == kNone) return true;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < p.group; ++i) total[g] += x[g * p.group + i];
  }
  return true;
}

template <typename Format>
static void Prepare(const Product& p, const Values& values, Activations* a) {
  Divide(p, a);
  const int64_t num_panels = a->panels.size();
  a->of_panel = Format::kOperands * Format::kDigits * a->stride;
  a->x.assign(p.rows * num_panels * a->of_panel, 0);
  a->start.assign(p.rows * num_panels * Format::kDigits * 8, 0);
  a->unit.resize(p.rows * num_panels);
  a->total.resize(p.rows * NumGroups(p));
  a->finite.clear();
  a->others.clear();
  for (int64_t row = 0; row < p.rows; ++row) (PrepareRow<Format>(p, values, row, a) ? a->finite : a->others).push_back(row);
}

// The number that has these digits.
template <typename Format>
static inline __attribute__((always_inline)) __m256 Joined(const __m256i* digits) {
  constexpr int DIGITS = Format::kDigits;
  if (DIGITS == 1) return _mm256_castsi256_ps(digits[0]);
  const __m256 base = _mm256_set1_ps(static_cast<float>(int64_t{1} << Format::kDigitBits));
  __m256i high = digits[DIGITS - 1];
  if (DIGITS == 3) high = _mm256_add_epi32(_mm256_slli_epi32(high, Format::kDigitBits), digits[1]);
  return _mm256_fmadd_ps(_mm256_cvtepi32_ps(high), base, _mm256_cvtepi32_ps(digits[0]));
}

template <typename Format>
static auto TableOf(const Product& p, const Values& values) {
  if constexpr (std::is_same_v<Format, TableFloats>) return p.table;
  else return values.bytes;
}

// A panel of a tile of 16 outputs, where codes lie by inputs or in tiles.
struct PanelOfTile {
  int64_t panel;
  const float *scales, *offsets;  // of the outputs
};

// sums += a row of x times a panel of a tile. `load(q)` makes a quad of codes current, `codes(i, w)` expands it.
template <typename Format, typename Load, typename Codes>
static inline __attribute__((always_inline)) void AddPanel(const Product& p, const Activations& a, const PanelOfTile& t,
                                                           int64_t row, float* sums, const Load& load, const Codes& codes) {
  constexpr int DIGITS = Format::kDigits;
  const Panel& panel = a.panels[t.panel];
  const int64_t num_panels = a.panels.size(), index = row * num_panels + t.panel;
  const uint8_t* x = a.x.data() + index * a.of_panel;
  const auto of_x = [&](int, int64_t q, int i, int d) { return FourBytes(x + (i * DIGITS + d) * a.stride + 4 * q); };
  __m256i digits[1][2][DIGITS];
  for (int d = 0; d < DIGITS; ++d) digits[0][0][d] = digits[0][1][d] = Load32(a.start.data() + (index * DIGITS + d) * 8);
  MultiplyAdd<Format, 1, DIGITS>(NumQuads(panel.size), 0, Format::kOperands, load, codes, of_x, digits);
  const __m256 unit = _mm256_set1_ps(a.unit[index]);
  const bool last_of_group = t.panel + 1 == num_panels || a.panels[t.panel + 1].group != panel.group;
  for (int k = 0; k < 2; ++k) {
    __m256 sum = _mm256_load_ps(sums + 8 * k);
    sum = _mm256_fmadd_ps(_mm256_mul_ps(Joined<Format>(digits[0][k]), unit), _mm256_loadu_ps(t.scales + 8 * k), sum);
    if (p.offset.kind != kNone && last_of_group) {
      const __m256 total = _mm256_set1_ps(a.total[row * NumGroups(p) + panel.group]);
      sum = _mm256_fmadd_ps(total, _mm256_loadu_ps(t.offsets + 8 * k), sum);
    }
    _mm256_store_ps(sums + 8 * k, sum);
  }
}

// Codes that lie by inputs or in tiles: the outputs [begin, end) of the rows `a.finite` of x.
template <typename Format>
static void Columns(const Product& p, const Values& values, const Activations& a, int64_t begin, int64_t end) {
  constexpr int OPERANDS = Format::kOperands;
  const int64_t rows = a.finite.size(), num_panels = a.panels.size();
  const Format format(TableOf<Format>(p, values));
  alignas(32) __m256i expanded[kPanelBytes / 4 * OPERANDS * 2];
  static thread_local std::vector<SumsOfTile> sums;  // keeps its memory from call to call
  sums.resize(rows);
  static thread_local std::vector<float> scales, offsets;  // (groups, 16)
  scales.resize(NumGroups(p) * kTileOutputs);
  offsets.resize(p.offset.kind == kNone ? 0 : scales.size());
  for (int64_t line = begin; line < end; line += kLine) {
    const Tiles tiles(p, a.panels, line, std::min(line + kLine, end));
    for (int64_t n = line; n < std::min(line + kLine, end); n += kTileOutputs) {
      const int64_t width = std::min(kTileOutputs, end - n);
      const uint8_t* quads = tiles.Of(n);
      std::fill_n(sums.begin(), rows, SumsOfTile{});
      ScalesOfTile(p.scale, NumGroups(p), n, width, scales.data());
      if (p.offset.kind != kNone) ScalesOfTile(p.offset, NumGroups(p), n, width, offsets.data());
      PanelOfTile t{};
      for (t.panel = 0; t.panel < num_panels; ++t.panel) {
        const Panel& panel = a.panels[t.panel];
        const int64_t num_quads = NumQuads(panel.size);
        t.scales = scales.data() + panel.group * kTileOutputs;
        t.offsets = offsets.data() + panel.group * kTileOutputs;
        __m256i quad[2];
        const auto load = [&](int64_t q) { LoadQuad(quads + q * kQuadBytes, quad); };
        const auto codes = [&](int i, __m256i* w) { w[0] = format.Expand(quad[0], i), w[1] = format.Expand(quad[1], i); };
        if (rows == 1) {
          AddPanel<Format>(p, a, t, a.finite[0], sums[0].of_output, load, codes);
        } else {
          for (int64_t q = 0; q < num_quads; ++q) {
            load(q);
            for (int i = 0; i < OPERANDS; ++i) codes(i, expanded + (q * OPERANDS + i) * 2);
          }
          const __m256i* at = expanded;
          const auto from = [&](int64_t q) { at = expanded + q * OPERANDS * 2; };
          const auto expanded_codes = [&](int i, __m256i* w) { w[0] = at[2 * i], w[1] = at[2 * i + 1]; };
          for (int64_t m = 0; m < rows; ++m) {
            AddPanel<Format>(p, a, t, a.finite[m], sums[m].of_output, from, expanded_codes);
          }
        }
        quads += num_quads * kQuadBytes;
      }
      for (int64_t m = 0; m < rows; ++m) std::memcpy(p.y + a.finite[m] * p.outputs + n, sums[m].of_output, 4 * width);
    }
  }
}

// `length` vectors of two outputs from the panel `j` on, whose integer sums are added to `sums` times the scale of a lane.
template <typename Format>
static inline __attribute__((always_inline)) void AddRun(const Format& format, const Activations& a, bool has_zero,
                                                         int64_t row, int64_t j, int64_t length,
                                                         const uint8_t* const* w, const __m256* scales, __m256* sums) {
  constexpr int DIGITS = Format::kDigits, OPERANDS = Format::kOperands;
  const int64_t index = row * static_cast<int64_t>(a.panels.size()) + j;
  __m256i acc[1][2][DIGITS];
#pragma GCC unroll 3
  for (int d = 0; d < DIGITS; ++d) {
    acc[0][0][d] = _mm256_setzero_si256();
    for (int64_t q = 0; q < length && has_zero; ++q) {
      acc[0][0][d] = _mm256_add_epi32(acc[0][0][d], Load32(a.start.data() + ((index + q) * DIGITS + d) * 8));
    }
    acc[0][1][d] = acc[0][0][d];
  }
  const uint8_t* x = a.x.data() + index * (OPERANDS * DIGITS * 32);
  __m256i v[2];
  const auto load = [&](int64_t q) { v[0] = Load32(w[0] + q * 32), v[1] = Load32(w[1] + q * 32); };
  const auto codes = [&](int i, __m256i* out) { out[0] = format.Expand(v[0], i), out[1] = format.Expand(v[1], i); };
  const auto of_x = [&](int, int64_t q, int i, int d) { return Load32(x + ((q * OPERANDS + i) * DIGITS + d) * 32); };
  MultiplyAdd<Format, 1, DIGITS>(length, 0, OPERANDS, load, codes, of_x, acc);
  for (int k = 0; k < 2; ++k) sums[k] = _mm256_fmadd_ps(Joined<Format>(acc[0][k]), scales[k], sums[k]);
}

// Codes that lie by outputs.
template <typename Format>
static void Rows(const Product& p, const Values& values, const Activations& a, int64_t begin, int64_t end) {
  constexpr int64_t kRun = 16;  // most vectors whose sums are added as integers
  const Format format(TableOf<Format>(p, values));
  const int64_t bytes = GroupBytes(p), groups = NumGroups(p), row_bytes = groups * bytes, num_panels = a.panels.size();
  const int64_t whole = row_bytes / 32, run = groups == 1 ? kRun : bytes % 32 ? 1 : std::min(kRun, bytes / 32);
  std::vector<int32_t> lanes(num_panels * 8);  // the group of a lane after that of the first one
  for (int64_t i = 0; i < num_panels * 8; ++i) {
    lanes[i] = static_cast<int32_t>(std::min(i * 4 / bytes, groups - 1) - a.panels[i / 8].group);
  }
  std::vector<float> scales(2 * (groups + 16)), offsets(groups + 8);
  alignas(32) uint8_t last[2][32] = {};
  const uint8_t* const last_of[2] = {last[0], last[1]};
  for (int64_t n = begin; n < end; n += 2) {
    const int64_t count = std::min<int64_t>(2, end - n);
    const uint8_t* w[2] = {p.codes + n * row_bytes, p.codes + (n + count - 1) * row_bytes};
    for (int64_t k = 0; k < 2; ++k) {
      LoadScales(p.scale, n + std::min(k, count - 1), 0, groups, scales.data() + k * (groups + 16));
      if (row_bytes % 32) std::memcpy(last[k], w[k] + whole * 32, row_bytes % 32);
    }
    for (int64_t b = 0; b < 2 * row_bytes; b += 64) {
      _mm_prefetch(reinterpret_cast<const char*>(w[0] + b + kAheadBytes), _MM_HINT_T1);
    }
    for (int64_t row : a.finite) {
      __m256 sums[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
      for (int64_t j = 0; j < num_panels;) {
        const __m256i lane = Load32(lanes.data() + j * 8);
        const float* first = scales.data() + a.panels[j].group;
        const __m256 of_lanes[2] = {_mm256_permutevar8x32_ps(_mm256_loadu_ps(first), lane),
                                    _mm256_permutevar8x32_ps(_mm256_loadu_ps(first + groups + 16), lane)};
        const uint8_t* at[2] = {w[0] + j * 32, w[1] + j * 32};
        const bool has_zero = values.zero != 0;
        if (run == 1 || j >= whole) {
          AddRun<Format>(format, a, has_zero, row, j, 1, j < whole ? at : last_of, of_lanes, sums);
          ++j;
          continue;
        }
        int64_t length = std::min(run, whole - j);  // a run ends with its group
        while (a.panels[j + length - 1].group != a.panels[j].group) --length;
        AddRun<Format>(format, a, has_zero, row, j, length, at, of_lanes, sums);
        j += length;
      }
      for (int64_t k = 0; k < count; ++k) p.y[row * p.outputs + n + k] = SumOfEight(sums[k]) * a.unit[row * num_panels];
    }
    if (p.offset.kind == kNone) continue;
    for (int64_t k = 0; k < count; ++k) {
      LoadScales(p.offset, n + k, 0, groups, offsets.data());
      for (int64_t row : a.finite) {
        float sum = 0;
        for (int64_t g = 0; g < groups; ++g) sum += a.total[row * groups + g] * offsets[g];
        p.y[row * p.outputs + n + k] += sum;
      }
    }
  }
}

static void Prepare(const Product& p, const Values& values, Activations* a) {
  if (values.floats) return Prepare<TableFloats>(p, values, a);
  WithFormat(p, values.table, [&](auto* f) { Prepare<std::remove_pointer_t<decltype(f)>>(p, values, a); });
}

template <typename Format>
static void OutputsOf(const Product& p, const Values& values, const Activations& a, int64_t begin, int64_t end) {
  p.by_output ? Rows<Format>(p, values, a, begin, end) : Columns<Format>(p, values, a, begin, end);
}

// The outputs [begin, end) of the rows `a.finite` of x.
static void Outputs(const Product& p, const Values& values, const Activations& a, int64_t begin, int64_t end) {
  if (values.floats) return OutputsOf<TableFloats>(p, values, a, begin, end);
  WithFormat(p, values.table, [&](auto* f) { OutputsOf<std::remove_pointer_t<decltype(f)>>(p, values, a, begin, end); });
}

}  // namespace avx2
