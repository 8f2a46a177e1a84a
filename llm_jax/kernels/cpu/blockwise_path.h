// Rounding of activations, and their products with int16 values, in plain C++ that compilers vectorize. Included once per
// instruction set, inside a namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kTile = 64;  // outputs of a tile

// Rounds a row of x; see blockwise.h.
static void Round(const Product& p, const Blocks& blocks, const ByteValues& values, int64_t row, Rounded* r) {
  const int64_t count = blocks.list.size();
  for (int64_t j = 0; j < count; ++j) {
    const Block& block = blocks.list[j];
    const float* x = p.x + row * p.inputs + block.first;
    int8_t* codes = r->codes.data() + (row * count + j) * blocks.stride;
    uint32_t bits[kBlock] = {}, largest_bits = 0;
    std::memcpy(bits, x, block.size * sizeof(float));
    for (int64_t i = 0; i < kBlock; ++i) {
      const uint32_t magnitude = bits[i] & 0x7fffffffu;
      largest_bits = magnitude > largest_bits ? magnitude : largest_bits;
    }
    float largest;
    std::memcpy(&largest, &largest_bits, 4);
    const bool finite = largest_bits < 0x7f800000u;
    const float inverse = finite && largest >= 1e-30f ? 127.0f / largest : 0.0f;
    float padded[kBlock];
    std::memcpy(padded, bits, sizeof(padded));
    int8_t rounded[kBlock];
    int32_t sum = 0;
    for (int64_t i = 0; i < kBlock; ++i) {
      const int32_t code = finite ? static_cast<int32_t>(__builtin_rintf(padded[i] * inverse)) : 0;
      rounded[i] = static_cast<int8_t>(code);
      sum += code;
    }
    std::memcpy(codes, rounded, blocks.stride);
    const float scale = !finite ? NAN : inverse > 0 ? largest / 127.0f : 0.0f;
    r->scale[row * count + j] = scale * values.unit;
    r->total[row * count + j] = scale * static_cast<float>(sum);
    r->start[row * count + j] = -values.zero * sum;
  }
}

// y[n] += the sum over a block, for the outputs of a tile; `w` has pairs of inputs, (S / 2, kTile, 2).
static inline void AddBlock(const int8_t* x, const int16_t* w, int64_t pairs, int32_t* __restrict acc) {
#if defined(__AVX2__)
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
