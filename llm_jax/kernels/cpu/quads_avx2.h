// Products of 8-bit and smaller codes with integers by AVX2. Included with the compiler's target set.
//
// A quad is four bytes of codes of one output. Eight quads fill a vector: of eight outputs where codes lie by inputs, of one
// output where they lie by outputs. A `Format` expands a vector to `kOperands` vectors of integers. The same lanes of the
// vectors of activations, which are in the order of `Arrange`, hold the inputs of these codes, so that sums of products of
// adjacent integers belong to the output of a lane.

namespace avx2 {

constexpr int64_t kLine = 64;        // outputs whose codes are copied to tiles together
constexpr int64_t kPanelBytes = 64;  // most rows of codes of a panel
constexpr int64_t kAheadRows = 16;   // rows of codes that are fetched in advance where they are copied
constexpr int64_t kAheadOfTile = 2048, kAheadBytes = 4096;  // bytes fetched in advance of a tile, and by outputs

// Codes of 4 or 2 bits as unsigned bytes. The sums of 16 products of a code and a byte fit 16 bits.
template <int BITS>
struct SmallCodes {
  static constexpr int kBits = BITS, kParts = 8 / BITS, kOfPart = 1, kOperands = kParts, kDigits = 3, kDigitBits = 8;

  explicit SmallCodes(const uint8_t*) {}

  __m256i Expand(__m256i v, int i) const {
    return _mm256_and_si256(_mm256_srli_epi16(v, BITS * i), _mm256_set1_epi8((1 << BITS) - 1));
  }
  static __m256i MultiplyAdd(__m256i w, __m256i x, __m256i sum) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(w, x)); }
  static __m256i AddTo(__m256i total, __m256i sum) {
    return _mm256_add_epi32(total, _mm256_madd_epi16(sum, _mm256_set1_epi16(1)));
  }
  static __m256i Sum(__m256i x) { return AddTo(_mm256_setzero_si256(), _mm256_maddubs_epi16(_mm256_set1_epi8(1), x)); }
};

// Integers of 16 bits: the bytes 0 and 2 of a quad, then its bytes 1 and 3.
template <int BITS, bool SIGNED, bool TABLE>
struct Words {
  static constexpr int kBits = BITS, kParts = 8 / BITS, kOfPart = 2, kOperands = 2 * kParts, kDigits = 2, kDigitBits = 12;

  explicit Words(const uint8_t* values) {
    if (TABLE) table = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values)));
  }

  __m256i Expand(__m256i v, int i) const {
    if (TABLE) v = _mm256_shuffle_epi8(table, SmallCodes<TABLE ? BITS : 4>(nullptr).Expand(v, i / 2));
    if (!SIGNED) return i % 2 ? _mm256_srli_epi16(v, 8) : _mm256_and_si256(v, _mm256_set1_epi16(255));
    return _mm256_srai_epi16(i % 2 ? v : _mm256_slli_epi16(v, 8), 8);
  }
  static __m256i MultiplyAdd(__m256i w, __m256i x, __m256i sum) { return _mm256_add_epi32(sum, _mm256_madd_epi16(w, x)); }
  static __m256i AddTo(__m256i total, __m256i sum) { return _mm256_add_epi32(total, sum); }
  static __m256i Sum(__m256i x) { return _mm256_madd_epi16(x, _mm256_set1_epi16(1)); }

  __m256i table;
};

// The values of a table of 4-bit codes as float32: the bytes 0, 1, 2 and 3 of a quad.
struct TableFloats {
  static constexpr int kBits = 4, kParts = 2, kOfPart = 4, kOperands = 8, kDigits = 1, kDigitBits = 32;

  explicit TableFloats(const float* values) : low(_mm256_loadu_ps(values)), high(_mm256_loadu_ps(values + 8)) {}

  __m256i Expand(__m256i v, int i) const {
    const int shift = i % 4 * 8 + i / 4 * 4;
    const __m256i code = _mm256_srli_epi32(v, shift), highest_bit = _mm256_slli_epi32(v, 28 - shift);
    return _mm256_castps_si256(_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code),
                                                _mm256_castsi256_ps(highest_bit)));
  }
  static __m256i MultiplyAdd(__m256i w, __m256i x, __m256i sum) {
    return _mm256_castps_si256(
        _mm256_fmadd_ps(_mm256_castsi256_ps(w), _mm256_castsi256_ps(x), _mm256_castsi256_ps(sum)));
  }
  static __m256i Sum(__m256i) { return _mm256_setzero_si256(); }  // its values have no zero
  static __m256i AddTo(__m256i total, __m256i sum) {
    return _mm256_castps_si256(_mm256_add_ps(_mm256_castsi256_ps(total), _mm256_castsi256_ps(sum)));
  }

  __m256 low, high;
};

// Writes `count` integers (or the bits of float32) of one part of consecutive bytes, digit by digit (the lowest first), in
// the order of a format:
// those of an operand and a digit are 4-byte words, one for each quad, `stride` bytes after those of the digit before.
// Integers from `count` to the next multiple of 8 are 0.
template <typename Format, int DIGITS, typename Integers>
static inline __attribute__((always_inline)) void Arrange(int64_t count, int part, int64_t stride, const Integers& integers,
                                                          uint8_t* x) {
  const __m256i odd_after_even = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  for (int64_t b = 0; b < count; b += 8) {
    __m256i v = integers(b);
    uint8_t* first = x + part * Format::kOfPart * DIGITS * stride + b;
    for (int d = 0; d < DIGITS; ++d) {
      constexpr int kShift = 32 - Format::kDigitBits;
      __m256i digit = v;
      if (d + 1 < DIGITS) {
        digit = _mm256_srai_epi32(_mm256_slli_epi32(v, kShift), kShift);
        v = _mm256_srai_epi32(_mm256_sub_epi32(v, digit), Format::kDigitBits);
      }
      if (Format::kOfPart == 4) {
        digit = _mm256_permutevar8x32_epi32(digit, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
        alignas(32) int64_t pairs[4];
        _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), digit);
        for (int i = 0; i < 4; ++i) std::memcpy(first + i * stride, pairs + i, 8);
        continue;
      }
      if (Format::kOfPart == 2) digit = _mm256_permutevar8x32_epi32(digit, odd_after_even);
      const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(digit), _mm256_extracti128_si256(digit, 1));
      if (Format::kOfPart == 1) {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(first + d * stride), _mm_packs_epi16(shorts, shorts));
      } else {
        _mm_storel_epi64(reinterpret_cast<__m128i*>(first + d * stride), shorts);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(first + (DIGITS + d) * stride), _mm_unpackhi_epi64(shorts, shorts));
      }
    }
  }
}

// sums[m][k][d] += the products of two vectors of codes with DIGITS digits of ROWS rows of activations, for the operands
// [first, last). `load(q)` makes the vectors `q` current, `codes(i, w)` expands them, `x(m, q, i, d)` are activations.
template <typename Format, int ROWS, int DIGITS, typename Load, typename Codes, typename Activations>
static inline __attribute__((always_inline)) void MultiplyAdd(int64_t count, int first, int last, Load&& load,
                                                              Codes&& codes, const Activations& x,
                                                              __m256i (*sums)[2][DIGITS]) {
  constexpr int64_t kTogether = 4;  // whose sums fit 16 bits
  for (int64_t q0 = 0; q0 < count; q0 += kTogether) {
    __m256i acc[ROWS][2][DIGITS];
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) acc[m][0][d] = acc[m][1][d] = _mm256_setzero_si256();
    }
    const auto add = [&](int64_t q) __attribute__((always_inline)) {
      load(q);
#pragma GCC unroll 8
      for (int i = first; i < last; ++i) {
        __m256i w[2];
        codes(i, w);
#pragma GCC unroll 4
        for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 3
          for (int d = 0; d < DIGITS; ++d) {
            const __m256i of_x = x(m, q, i, d);
            acc[m][0][d] = Format::MultiplyAdd(w[0], of_x, acc[m][0][d]);
            acc[m][1][d] = Format::MultiplyAdd(w[1], of_x, acc[m][1][d]);
          }
        }
      }
    };
    if (ROWS == 1 && count - q0 >= kTogether) {
#pragma GCC unroll 4
      for (int64_t i = 0; i < kTogether; ++i) {
        add(q0 + i);
        // GCC would otherwise compute the products of all quads before it adds them, and store them meanwhile.
        for (int d = 0; d < DIGITS; ++d) asm("" : "+x"(acc[0][0][d]), "+x"(acc[0][1][d]));
      }
    } else {
      for (int64_t q = q0; q < std::min(q0 + kTogether, count); ++q) add(q);
    }
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
#pragma GCC unroll 3
      for (int d = 0; d < DIGITS; ++d) {
        sums[m][0][d] = Format::AddTo(sums[m][0][d], acc[m][0][d]);
        sums[m][1][d] = Format::AddTo(sums[m][1][d], acc[m][1][d]);
      }
    }
  }
}

static inline __m256i Load32(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

static inline __m256i FourBytes(const uint8_t* x) {
  int32_t four;
  std::memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}

// Eight scales of a row, from a column on.
static inline __m256 EightScales(const Scales& s, int64_t row, int64_t column) {
  row = s.rows == 1 ? 0 : row;
  if (s.columns == 1) return _mm256_set1_ps(ScaleAt(s, row, 0));
  const int64_t index = ScaleIndex(s, row, column);
  if (s.kind == kFloat32) return _mm256_loadu_ps(static_cast<const float*>(s.data) + index);
  if (s.kind == kFloat16) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(s.data) + index)));
  }
  const auto* bytes = reinterpret_cast<const __m128i*>(static_cast<const uint8_t*>(s.data) + index);
  const __m256i codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(bytes));
  if (s.kind == kExponent) return _mm256_castsi256_ps(_mm256_slli_epi32(codes, 23));
  const float* inner = s.inner + row * s.inner_rows / s.rows * s.inner_columns;
  alignas(32) float factors[8];
  if (s.inner_columns == 1) {
    for (int64_t i = 0; i < 8; ++i) factors[i] = inner[0];
  } else {
    for (int64_t i = 0; i < 8; ++i) factors[i] = inner[(column + i) * s.inner_columns / s.columns];
  }
  return _mm256_fmadd_ps(_mm256_i32gather_ps(s.table, codes, 4), _mm256_load_ps(factors), _mm256_set1_ps(s.mean));
}

// `count` scales of a row, from a column on, followed by zeros up to a multiple of 8.
static inline void LoadScales(const Scales& s, int64_t row, int64_t column, int64_t count, float* scales) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(scales + i, EightScales(s, row, column + i));
  for (const int64_t end = (count + 7) / 8 * 8; i < end; ++i) scales[i] = i < count ? ScaleAt(s, row, column + i) : 0.0f;
}

// The scales of 16 outputs: (rows, 16), with zeros beyond `width` outputs.
static inline void ScalesOfTile(const Scales& s, int64_t rows, int64_t column, int64_t width, float* scales) {
  const bool contiguous = s.rows == rows && s.columns > 1 && width == kTileOutputs;
  if (!contiguous || (s.kind != kFloat16 && s.kind != kFloat32)) {
    for (int64_t row = 0; row < rows; ++row) LoadScales(s, row, column, width, scales + row * kTileOutputs);
    return;
  }
  const int64_t first = ScaleIndex(s, 0, column), stride = s.tiled ? kTileOutputs : s.columns;
  const int64_t size = s.kind == kFloat16 ? 2 : 4;
  const char* next = static_cast<const char*>(s.data) + (first + kTileOutputs * rows) * size;
  for (int64_t row = 0; row < rows; ++row, scales += kTileOutputs) {
    if (s.tiled) _mm_prefetch(next + row * kTileOutputs * size, _MM_HINT_T0);
    for (int64_t i = 0; i < kTileOutputs; i += 8) {
      const int64_t at = first + row * stride + i;
      if (s.kind == kFloat16) {
        const auto* halves = static_cast<const uint16_t*>(s.data) + at;
        _mm256_storeu_ps(scales + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves))));
      } else {
        _mm256_storeu_ps(scales + i, _mm256_loadu_ps(static_cast<const float*>(s.data) + at));
      }
    }
  }
}

// Four rows of codes times 16 outputs, in tiles: the four bytes of each output follow each other.
static inline void StoreQuads(__m128i r0, __m128i r1, __m128i r2, __m128i r3, uint8_t* quads) {
  const __m128i low01 = _mm_unpacklo_epi8(r0, r1), high01 = _mm_unpackhi_epi8(r0, r1), low23 = _mm_unpacklo_epi8(r2, r3),
                high23 = _mm_unpackhi_epi8(r2, r3);
  __m128i* out = reinterpret_cast<__m128i*>(quads);
  _mm_storeu_si128(out, _mm_unpacklo_epi16(low01, low23));
  _mm_storeu_si128(out + 1, _mm_unpackhi_epi16(low01, low23));
  _mm_storeu_si128(out + 2, _mm_unpacklo_epi16(high01, high23));
  _mm_storeu_si128(out + 3, _mm_unpackhi_epi16(high01, high23));
}

// Codes of some outputs in tiles: those of the weight, or a copy, in which zeros follow each panel up to a multiple of four
// rows, and the last output up to one of 16. `panels` are the rows of codes in order, with `begin` and `size`.
class Tiles {
 public:
  template <typename Panels>
  Tiles(const Product& p, const Panels& panels, int64_t begin, int64_t end) : first_(begin) {
    if (p.tiled) {
      tile_ = p.codes + begin * NumGroups(p) * GroupBytes(p);
      tile_bytes_ = NumGroups(p) * GroupBytes(p) * kTileOutputs;
      return;
    }
    static thread_local std::vector<uint8_t> copy;  // keeps its memory from call to call
    tile_bytes_ = 0;
    for (const auto& panel : panels) tile_bytes_ += NumQuads(panel.size) * kQuadBytes;
    copy.resize((end - begin + kTileOutputs - 1) / kTileOutputs * tile_bytes_);
    tile_ = copy.data();
    uint8_t* quads = copy.data();
    for (const auto& panel : panels) {
      for (int64_t row = 0; row < panel.size; row += kTileRows, quads += kQuadBytes) {
        const uint8_t* w = p.codes + (panel.begin + row) * p.outputs;
        const int64_t rows = std::min(kTileRows, panel.size - row);
        // Distant rows displace each other in the first-level cache before the next four are read.
        for (int64_t r = 0; r < rows; ++r) _mm_prefetch(reinterpret_cast<const char*>(w + (kAheadRows + r) * p.outputs + begin), _MM_HINT_T0);
        uint8_t* out = quads;
        for (int64_t n = begin; n < end; n += kTileOutputs, out += tile_bytes_) {
          __m128i codes[kTileRows];
          for (int64_t r = 0; r < kTileRows; ++r) {
            alignas(16) uint8_t edge[kTileOutputs] = {};
            if (r < rows && n + kTileOutputs <= end) {
              codes[r] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + r * p.outputs + n));
            } else {
              if (r < rows) std::memcpy(edge, w + r * p.outputs + n, end - n);
              codes[r] = _mm_load_si128(reinterpret_cast<const __m128i*>(edge));
            }
          }
          StoreQuads(codes[0], codes[1], codes[2], codes[3], out);
        }
      }
    }
  }

  // The quads of the tile of an output, whose panels follow each other.
  const uint8_t* Of(int64_t output) const { return tile_ + (output - first_) / kTileOutputs * tile_bytes_; }

 private:
  const uint8_t* tile_;
  int64_t tile_bytes_, first_;
};

struct SumsOfTile {
  alignas(32) float of_output[kTileOutputs];
};

// The two vectors of a quad of a tile, and a fetch of the codes that follow.
static inline __attribute__((always_inline)) void LoadQuad(const uint8_t* quad, __m256i* codes) {
  codes[0] = Load32(quad);
  codes[1] = Load32(quad + 32);
  _mm_prefetch(reinterpret_cast<const char*>(quad + kAheadOfTile), _MM_HINT_T0);
}

// The sum of the eight numbers of a vector.
static inline float SumOfEight(__m256 v) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

static inline int64_t SumOfEight(__m256i v) {
  alignas(32) int32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), v);
  int64_t sum = 0;
  for (int32_t lane : lanes) sum += lane;
  return sum;
}

// Calls run(the format of the codes), a null pointer that has its type.
template <typename Run>
static void WithFormat(const Product& p, bool table, const Run& run) {
  if (p.bits == 8 && p.kind == kInt8) return run(static_cast<Words<8, true, false>*>(nullptr));
  if (p.bits == 8) return run(static_cast<Words<8, false, false>*>(nullptr));
  if (p.bits == 4 && table) return run(static_cast<Words<4, true, true>*>(nullptr));
  if (p.bits == 4) return run(static_cast<SmallCodes<4>*>(nullptr));
  if (table) return run(static_cast<Words<2, true, true>*>(nullptr));
  run(static_cast<SmallCodes<2>*>(nullptr));
}

}  // namespace avx2
