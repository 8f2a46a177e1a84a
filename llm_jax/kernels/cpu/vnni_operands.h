// The operands of products by the 8-bit dot products of AVX-512 VNNI, which are exact integers. Included with the
// compiler's target set.
//
// Activations: each row of x is rounded to 24-bit integers in units of a power of two, by its largest magnitude (of a
// panel where the codes lie by inputs). So the rounding error of an activation is at most 2^-23 of the largest one, twice
// that of rounding it to float32. The integers are split into three balanced digits of base 256.
//
// Weights: the values of codes are unit * (P - zero) with unsigned P. P has one byte for integers and for multiples of
// 1/2, or three (24 bits) for other tables such as NF4. The terms zero * x are the same for all outputs: the sums
// start from them, so that nothing is lost by cancellation.

namespace vnni {

constexpr int64_t kDigits = 3;
constexpr int64_t kPanelBytes = 64;  // rows of codes of a panel: their activations stay in the first-level cache
constexpr int64_t kAhead = 4096;     // bytes that are fetched in advance where codes lie by outputs

// The values of codes as integers: value = unit * (P - zero).
struct Planes {
  int64_t count;  // 0: P is the code itself; 1 or 3 tables of the bytes of P, the highest first
  float unit;
  int64_t zero;
  alignas(16) uint8_t bytes[3][16];
};

// A part of the codes: `size` rows of codes in one group where codes lie by inputs, else `size` bytes of each output.
struct Panel {
  int64_t begin, size, group;
};

// Activations as digits. W is `width`, the bytes of a panel rounded up to 16; S parts of a byte.
struct Activations {
  int64_t width, parts;
  std::vector<Panel> panels;
  std::vector<int8_t> digits;     // (M, panels, S, 3, W)
  std::vector<int32_t> start;     // (M, panels, 3, 16): -zero * x by digits; by inputs its sum in all 16
  std::vector<float> unit, total;  // (M, panels): the unit of the integers, and the sum of the activations
  std::vector<int64_t> finite, others;  // rows of x that have digits, and those left to float arithmetic
};

static Planes PlanesOf(const Product& p) {
  Planes planes{};
  planes.unit = 1;
  if (p.kind == kInt8) planes.zero = 128;
  if (p.kind != kTable) return planes;
  if (IsConsecutive(p)) {
    planes.zero = -static_cast<int64_t>(p.table[0]);
    return planes;
  }
  float low = p.table[0], high = p.table[0];
  bool halves = true;
  const int64_t size = 1 << p.bits;
  for (int64_t i = 0; i < size; ++i) {
    low = std::min(low, p.table[i]);
    high = std::max(high, p.table[i]);
    halves &= p.table[i] * 2 == std::nearbyint(p.table[i] * 2);
  }
  if (halves && (high - low) * 2 <= 255) {
    planes.count = 1;
    planes.unit = 0.5f;
    planes.zero = static_cast<int64_t>(-low * 2);
    for (int64_t i = 0; i < size; ++i) planes.bytes[0][i] = static_cast<uint8_t>(p.table[i] * 2 + planes.zero);
    return planes;
  }
  const float largest = std::max(-low, high);
  planes.count = 3;
  planes.zero = 8388600;
  planes.unit = largest / static_cast<float>(planes.zero);
  for (int64_t i = 0; i < size; ++i) {
    const double units = std::nearbyint(static_cast<double>(p.table[i]) / largest * planes.zero);
    const int64_t value = static_cast<int64_t>(units) + planes.zero;
    for (int64_t k = 0; k < 3; ++k) planes.bytes[k][i] = static_cast<uint8_t>(value >> (16 - 8 * k));
  }
  return planes;
}

// Whether this path has the product; the others are for `Outputs` of float_path.h.
static bool Has(const Product& p) {
  if (p.bits == 2 && !IsConsecutive(p)) return false;  // 2-bit codes are taken for the integers P themselves
  if (!p.by_output) return true;
  return p.group == p.inputs || GroupBytes(p) % 16 == 0;  // a vector of 16 bytes has one scale
}

static inline void SplitDigits(__m512i v, __m512i* digits) {
  for (int d = 0; d < 2; ++d) {
    digits[d] = _mm512_srai_epi32(_mm512_slli_epi32(v, 24), 24);
    v = _mm512_srai_epi32(_mm512_sub_epi32(v, digits[d]), 8);
  }
  digits[2] = v;
}

static float LargestMagnitude(const float* x, int64_t count) {
  __m512 largest = _mm512_setzero_ps(), not_a_number = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 v = _mm512_maskz_loadu_ps(First16(count - i), x + i);
    largest = _mm512_max_ps(largest, _mm512_abs_ps(v));
    not_a_number = _mm512_add_ps(not_a_number, _mm512_sub_ps(v, v));  // 0 where finite
  }
  return _mm512_reduce_max_ps(largest) + _mm512_reduce_add_ps(not_a_number);
}

static void Divide(const Product& p, Activations* a) {
  const int64_t bytes = GroupBytes(p), all = NumGroups(p) * bytes;
  a->parts = CodesPerByte(p);
  a->panels.clear();
  if (p.by_output) {
    for (int64_t b = 0; b < all; b += 64) a->panels.push_back({b, std::min<int64_t>(64, all - b), b / bytes});
  } else {
    for (int64_t g = 0; g < NumGroups(p); ++g) {
      for (int64_t b = 0; b < bytes; b += kPanelBytes) {
        a->panels.push_back({g * bytes + b, std::min(kPanelBytes, bytes - b), g});
      }
    }
  }
  a->width = 0;
  for (const Panel& panel : a->panels) a->width = std::max(a->width, (panel.size + 15) / 16 * 16);
}

// Writes the digits of a row; false if its magnitudes have none.
static bool PrepareRow(const Product& p, const Planes& planes, int64_t row, Activations* a) {
  const float* x = p.x + row * p.inputs;
  const int64_t bytes = GroupBytes(p), width = a->width, num_panels = a->panels.size();
  const float of_row = LargestMagnitude(x, p.inputs);
  if (!(of_row == 0 || (of_row > 1e-18f && of_row < 1e18f))) return false;
  for (int64_t j = 0; j < num_panels; ++j) {
    const Panel& panel = a->panels[j];
    int8_t* digits = a->digits.data() + (row * num_panels + j) * a->parts * kDigits * width;
    float largest = of_row;
    if (!p.by_output) {
      __m512 of_panel = _mm512_setzero_ps();  // numbers are finite, as `of_row` is
      for (int64_t s = 0; s < a->parts; ++s) {
        const float* part = x + InputOfByte(p, panel.begin) + s * bytes;
        for (int64_t i = 0; i < panel.size; i += 16) {
          of_panel = _mm512_max_ps(of_panel, _mm512_abs_ps(_mm512_maskz_loadu_ps(First16(panel.size - i), part + i)));
        }
      }
      largest = _mm512_reduce_max_ps(of_panel);
    }
    // Numbers below 2^-40 of the row are as good as 0.
    const int exponent = largest > of_row * 0x1p-40f ? Exponent(largest) : Exponent(of_row > 0 ? of_row : 1);
    const __m512 to_integers = _mm512_set1_ps(PowerOfTwo(exponent));
    __m512i sums = _mm512_setzero_si512();  // 64-bit
    int32_t* start = a->start.data() + (row * num_panels + j) * kDigits * 16;
    for (int64_t lane = 0; lane < width; lane += 16) {
      __m512i sum = _mm512_setzero_si512();
      const int64_t input = InputOfByte(p, panel.begin + std::min(lane, panel.size - 1));
      for (int64_t s = 0; s < a->parts; ++s) {
        const __m512 v = _mm512_maskz_loadu_ps(First16(panel.size - lane), x + input + s * bytes);
        const __m512i integers = _mm512_cvtps_epi32(_mm512_mul_ps(v, to_integers));
        __m512i split[kDigits];
        SplitDigits(integers, split);
        for (int64_t d = 0; d < kDigits; ++d) {
          _mm_storeu_si128(reinterpret_cast<__m128i*>(digits + (s * kDigits + d) * width + lane),
                           _mm512_cvtepi32_epi8(split[d]));
        }
        sum = _mm512_add_epi32(sum, integers);
      }
      sums = _mm512_add_epi64(sums, _mm512_cvtepi32_epi64(_mm512_castsi512_si256(sum)));
      sums = _mm512_add_epi64(sums, _mm512_cvtepi32_epi64(_mm512_extracti64x4_epi64(sum, 1)));
      if (!p.by_output) continue;
      // An accumulator has the sum of four bytes.
      alignas(64) int32_t of_bytes[16];
      _mm512_store_si512(of_bytes, sum);
      for (int64_t i = 0; i < 4; ++i) {
        int64_t four = 0;
        for (int64_t k = 0; k < 4; ++k) four += of_bytes[4 * i + k];
        four *= -planes.zero;
        if (planes.count == 3) four = (four + (1 << 15)) >> 16;
        for (int64_t d = 0; d < 2; ++d) {
          start[d * 16 + lane / 4 + i] = static_cast<int8_t>(four);
          four = (four - static_cast<int8_t>(four)) >> 8;
        }
        start[2 * 16 + lane / 4 + i] = static_cast<int32_t>(four);
      }
    }
    const int64_t panel_sum = _mm512_reduce_add_epi64(sums);
    if (p.by_output) {
      for (int64_t d = 0; d < kDigits; ++d) {
        for (int64_t i = width / 4; i < 16; ++i) start[d * 16 + i] = 0;
      }
    } else {
      int64_t sum = -planes.zero * panel_sum;
      if (planes.count == 3) sum = (sum + (1 << 15)) >> 16;
      for (int64_t d = 0; d < 2; ++d) {
        start[d] = static_cast<int8_t>(sum);
        sum = (sum - static_cast<int8_t>(sum)) >> 8;
      }
      start[2] = static_cast<int32_t>(sum);
    }
    if (p.by_output && p.group == p.inputs && j) {  // one sum for all panels: it starts with the first
      int32_t* first = start - j * kDigits * 16;
      for (int64_t i = 0; i < kDigits * 16; ++i) first[i] += start[i];
    }
    const float unit = PowerOfTwo(-exponent);
    a->unit[row * num_panels + j] = unit;
    a->total[row * num_panels + j] = unit * static_cast<float>(panel_sum);
  }
  return true;
}

static void Prepare(const Product& p, const Planes& planes, Activations* a) {
  Divide(p, a);
  const int64_t num_panels = a->panels.size();
  a->digits.resize(p.rows * num_panels * a->parts * kDigits * a->width);
  a->start.resize(p.rows * num_panels * kDigits * 16);
  a->unit.resize(p.rows * num_panels);
  a->total.resize(p.rows * num_panels);
  a->finite.clear();
  a->others.clear();
  for (int64_t row = 0; row < p.rows; ++row) {
    (PrepareRow(p, planes, row, a) ? a->finite : a->others).push_back(row);
  }
}

}  // namespace vnni
