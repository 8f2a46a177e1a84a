// The values of codes in tiles as float32 by AVX2. Included after quads_avx2.h with the compiler's target set.

namespace avx2 {

constexpr int64_t kConsecutive = 3;  // a table of consecutive integers

// A part of the words of eight outputs as values of the codes.
template <int64_t KIND>
static inline __m256 CodeValues(__m256i words, __m128i shift, __m256i mask, __m256 low, __m256 high) {
  const __m256i code = _mm256_and_si256(_mm256_srl_epi32(words, shift), mask);
  if (KIND == kInt8) return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(code, 24), 24));
  if (KIND == kUint8) return _mm256_cvtepi32_ps(code);
  if (KIND == kConsecutive) return _mm256_add_ps(_mm256_cvtepi32_ps(code), _mm256_broadcastss_ps(_mm256_castps256_ps128(low)));
  const __m256 fourth_bit = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, code), _mm256_permutevar8x32_ps(high, code), fourth_bit);
}

// The columns of `TILES` tiles from an output on. Each line of the result is written whole and past the caches, because it
// would otherwise be read first; the rows of a quad are far from each other.
template <int64_t KIND, int TILES>
static void ExpandTiles(const Product& p, int64_t first) {
  const int64_t parts = CodesPerByte(p), bytes = GroupBytes(p), groups = NumGroups(p), rows = groups * bytes;
  static thread_local std::vector<float> scales, offsets;  // (tiles, groups, 16); keep their memory from call to call
  scales.resize(TILES * groups * kTileOutputs);
  offsets.resize(p.offset.kind == kNone ? 0 : scales.size());
  for (int t = 0; t < TILES; ++t) {
    const int64_t at = t * groups * kTileOutputs, column = first + t * kTileOutputs;
    ScalesOfTile(p.scale, groups, column, kTileOutputs, scales.data() + at);
    if (p.offset.kind != kNone) ScalesOfTile(p.offset, groups, column, kTileOutputs, offsets.data() + at);
  }
  alignas(32) float table[16] = {};
  if (p.kind == kTable) std::memcpy(table, p.table, sizeof(float) << p.bits);
  const __m256 low = _mm256_load_ps(table), high = _mm256_load_ps(table + 8);
  const __m256i mask = _mm256_set1_epi32((1 << p.bits) - 1);
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t group = row / bytes;
    for (int64_t i = 0; i < parts * kTileRows; ++i) {
      const int64_t part = i / kTileRows, r = i % kTileRows;
      const __m128i shift = _mm_cvtsi32_si128(static_cast<int>(8 * r + part * p.bits));
      float* y = p.y + (group * p.group + part * bytes + row % bytes + r) * p.outputs + first;
      for (int t = 0; t < TILES; ++t) {
        for (int64_t n = 0; n < kTileOutputs; n += 8) {
          const __m256i words = Load32(p.codes + (first + t * kTileOutputs) * rows + row * kTileOutputs + n * kTileRows);
          const int64_t at = (t * groups + group) * kTileOutputs + n;
          __m256 values = _mm256_mul_ps(CodeValues<KIND>(words, shift, mask, low, high), _mm256_loadu_ps(scales.data() + at));
          if (!offsets.empty()) values = _mm256_add_ps(values, _mm256_loadu_ps(offsets.data() + at));
          _mm256_stream_ps(y + t * kTileOutputs + n, values);
        }
      }
    }
  }
  _mm_sfence();
}

template <int64_t KIND>
static void ExpandColumns(const Product& p, int64_t begin, int64_t end) {
  constexpr int kTiles = 4;
  int64_t n = begin;
  for (; n + kTiles * kTileOutputs <= end; n += kTiles * kTileOutputs) ExpandTiles<KIND, kTiles>(p, n);
  for (; n < end; n += kTileOutputs) ExpandTiles<KIND, 1>(p, n);
}

// The columns [begin, end) of the result, which is aligned to 32 bytes.
static void Expand(const Product& p, int64_t begin, int64_t end) {
  if (p.kind == kInt8) return ExpandColumns<kInt8>(p, begin, end);
  if (p.kind == kUint8) return ExpandColumns<kUint8>(p, begin, end);
  if (IsConsecutive(p)) return ExpandColumns<kConsecutive>(p, begin, end);
  ExpandColumns<kTable>(p, begin, end);
}

}  // namespace avx2
