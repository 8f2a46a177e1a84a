// Rounding of activations, and their products with int16 values, in plain C++ that compilers vectorize. Included once per
// instruction set, inside a namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kTile = 64;  // outputs of a tile

#if LLM_JAX_VECTOR_BITS == 512
// The codes of a block of x, and their sum. Returns the bits of its largest magnitude.
static inline uint32_t RoundBlock(const float* x, int64_t size, int64_t stride, int8_t* codes, int32_t* sum) {
  const auto first = [](int64_t count) { return static_cast<__mmask32>((uint64_t{1} << count) - 1); };
  const __mmask32 inside = first(size), stored = first(stride);
  const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside), x),
               high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(inside >> 16), x + 16);
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const uint32_t bits = _mm512_reduce_max_epu32(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(low), magnitude),
                                                                 _mm512_and_si512(_mm512_castps_si512(high), magnitude)));
  const __m512 inverse = _mm512_set1_ps(Inverse(bits));
  const __mmask16 finite = bits < kInfinity ? 0xffff : 0;
  const __m512i low_codes = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(low, inverse)),
                high_codes = _mm512_maskz_cvtps_epi32(finite, _mm512_mul_ps(high, inverse));
  *sum = _mm512_reduce_add_epi32(_mm512_add_epi32(low_codes, high_codes));
  const __m256i bytes =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtepi32_epi8(low_codes)), _mm512_cvtepi32_epi8(high_codes), 1);
  _mm256_mask_storeu_epi8(codes, stored, bytes);
  return bits;
}
#else
static inline uint32_t RoundBlock(const float* x, int64_t size, int64_t stride, int8_t* codes, int32_t* sum) {
  uint32_t bits = 0;
  for (int64_t i = 0; i < size; ++i) {
    uint32_t magnitude;
    std::memcpy(&magnitude, x + i, 4);
    magnitude &= 0x7fffffffu;
    bits = magnitude > bits ? magnitude : bits;
  }
  const float inverse = Inverse(bits);
  *sum = 0;
  for (int64_t i = 0; i < stride; ++i) {
    const int32_t code = i < size && bits < kInfinity ? static_cast<int32_t>(__builtin_rintf(x[i] * inverse)) : 0;
    codes[i] = static_cast<int8_t>(code);
    *sum += code;
  }
  return bits;
}
#endif

// Rounds a row of x; see blockwise.h.
static void Round(const Product& p, const Blocks& blocks, const ByteValues& values, int64_t row, Rounded* r) {
  const int64_t count = blocks.list.size();
  for (int64_t j = 0; j < count; ++j) {
    const Block& block = blocks.list[j];
    const int64_t index = row * count + j;
    int32_t sum;
    const uint32_t bits = RoundBlock(p.x + row * p.inputs + block.first, block.size, blocks.stride,
                                     r->codes.data() + index * blocks.stride, &sum);
    const float scale = bits >= kInfinity ? NAN : Inverse(bits) > 0 ? FromBits(bits) / 127.0f : 0.0f;
    r->scale[index] = scale * values.unit;
    r->total[index] = scale * static_cast<float>(sum);
    r->start[index] = -values.zero * sum;
  }
}

// y[n] += the sum over a block, for the outputs of a tile; `w` has pairs of inputs, (S / 2, kTile, 2).
static inline void AddBlock(const int8_t* x, const int16_t* w, int64_t pairs, int32_t* __restrict acc) {
#if LLM_JAX_VECTOR_BITS >= 256
  __m256i sums[kTile / 8];
  for (int64_t i = 0; i < kTile / 8; ++i) sums[i] = _mm256_setzero_si256();
  for (int64_t k = 0; k < pairs; ++k) {
    const __m256i two = _mm256_set1_epi32((x[2 * k] & 0xffff) | (x[2 * k + 1] * 65536));
    for (int64_t i = 0; i < kTile / 8; ++i) {
      const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + k * 2 * kTile + 16 * i));
      sums[i] = _mm256_add_epi32(sums[i], _mm256_madd_epi16(values, two));
    }
  }
  for (int64_t i = 0; i < kTile / 8; ++i) _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc + 8 * i), sums[i]);
#else
  for (int64_t n = 0; n < kTile; ++n) acc[n] = 0;
  for (int64_t k = 0; k < pairs; ++k) {
    const int32_t x0 = x[2 * k], x1 = x[2 * k + 1];
    for (int64_t n = 0; n < kTile; ++n) acc[n] += x0 * w[(k * kTile + n) * 2] + x1 * w[(k * kTile + n) * 2 + 1];
  }
#endif
}

// The values P - zero of an input for the `width` outputs from `first` on, two apart.
static void ExpandInput(const Product& p, const ByteValues& v, int64_t input, int64_t first, int64_t width,
                        int16_t* __restrict out) {
  if (p.by_output) {
    for (int64_t n = 0; n < width; ++n) out[2 * n] = static_cast<int16_t>(ByteAt(p, v, input, first + n) - v.zero);
    return;
  }
  const int64_t bytes = GroupBytes(p), in_group = input % p.group;
  const uint8_t* w = p.codes + (input / p.group * bytes + in_group % bytes) * p.outputs + first;
  const int shift = static_cast<int>(in_group / bytes * p.bits), mask = (1 << p.bits) - 1, zero = v.zero;
  if (p.kind == kInt8) {
    for (int64_t n = 0; n < width; ++n) out[2 * n] = static_cast<int8_t>(w[n]);
  } else if (v.table) {
    for (int64_t n = 0; n < width; ++n) out[2 * n] = static_cast<int16_t>(v.bytes[(w[n] >> shift) & mask] - zero);
  } else {
    for (int64_t n = 0; n < width; ++n) out[2 * n] = static_cast<int16_t>(((w[n] >> shift) & mask) - zero);
  }
}

// The outputs [begin, end) of the rows [first_row, last_row).
static void Outputs(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, int64_t first_row,
                    int64_t last_row, int64_t begin, int64_t end) {
  const int64_t count = blocks.list.size();
  alignas(64) int16_t w[kBlock * kTile];
  for (int64_t n0 = begin; n0 < end; n0 += kTile) {
    const int64_t width = end - n0 < kTile ? end - n0 : kTile;
    for (int64_t m = first_row; m < last_row; ++m) {
      for (int64_t n = 0; n < width; ++n) p.y[m * p.outputs + n0 + n] = 0;
    }
    for (int64_t j = 0; j < count; ++j) {
      const Block& block = blocks.list[j];
      std::memset(w, 0, sizeof(w));
      for (int64_t i = 0; i < block.size; ++i) ExpandInput(p, v, block.first + i, n0, width, w + i / 2 * 2 * kTile + i % 2);
      float scales[kTile] = {}, offsets[kTile] = {};
      for (int64_t n = 0; n < width; ++n) {
        const int64_t row = p.by_output ? n0 + n : block.group, column = p.by_output ? block.group : n0 + n;
        scales[n] = ScaleAt(p.scale, row, column);
        if (p.offset.kind != kNone) offsets[n] = ScaleAt(p.offset, row, column);
      }
      for (int64_t m = first_row; m < last_row; ++m) {
        int32_t acc[kTile];
        AddBlock(r.codes.data() + (m * count + j) * blocks.stride, w, blocks.stride / 2, acc);
        const float scale = r.scale[m * count + j], total = r.total[m * count + j];
        float* y = p.y + m * p.outputs + n0;
        for (int64_t n = 0; n < width; ++n) y[n] += static_cast<float>(acc[n]) * scale * scales[n];
        if (p.offset.kind == kNone) continue;
        for (int64_t n = 0; n < width; ++n) y[n] += total * offsets[n];
      }
    }
  }
}
