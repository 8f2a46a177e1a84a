// Products of int8 activations and int8 weights by the 8-bit dot products of NEON. Included with the compiler's target set.

namespace neon {

constexpr int64_t kOutputs = 16;  // of a tile

// Four inputs of 16 outputs as vectors of 4 outputs with their four codes.
static inline void PackFour(const int8x16_t* rows, int8_t* out) {
  const int8x16_t low01 = vzip1q_s8(rows[0], rows[1]), high01 = vzip2q_s8(rows[0], rows[1]),
                  low23 = vzip1q_s8(rows[2], rows[3]), high23 = vzip2q_s8(rows[2], rows[3]);
  const int16x8_t a = vreinterpretq_s16_s8(low01), b = vreinterpretq_s16_s8(low23), c = vreinterpretq_s16_s8(high01),
                  d = vreinterpretq_s16_s8(high23);
  vst1q_s8(out, vreinterpretq_s8_s16(vzip1q_s16(a, b)));
  vst1q_s8(out + 16, vreinterpretq_s8_s16(vzip2q_s16(a, b)));
  vst1q_s8(out + 32, vreinterpretq_s8_s16(vzip1q_s16(c, d)));
  vst1q_s8(out + 48, vreinterpretq_s8_s16(vzip2q_s16(c, d)));
}

// The weights of a tile: (K / 4, 16, 4). Inputs beyond K meet activations that are 0.
static void Pack(const IntegerProduct& p, int64_t first, int64_t stride, int8_t* packed) {
  const int64_t width = std::min(kOutputs, p.outputs - first);
  for (int64_t k = 0; k < stride; k += 4) {
    const int64_t count = std::min<int64_t>(4, p.inputs - k);
    alignas(16) int8_t rows[4][kOutputs] = {};
    if (p.by_output) {
      int8_t* out = packed + k * kOutputs;
      std::memset(out, 0, 4 * kOutputs);
      for (int64_t n = 0; n < width && count > 0; ++n) std::memcpy(out + 4 * n, p.codes + (first + n) * p.inputs + k, count);
      continue;
    }
    int8x16_t vectors[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int8_t* w = p.codes + (k + i) * p.outputs + first;
      if (i < count && width < kOutputs) std::memcpy(rows[i], w, width);
      vectors[i] = vld1q_s8(i < count && width == kOutputs ? w : rows[i]);
    }
    PackFour(vectors, packed + k * kOutputs);
  }
}

// ROWS rows of x times a tile.
template <int ROWS>
static void Block(const IntegerProduct& p, const int8_t* x, int64_t stride, int64_t row, int64_t first, const int8_t* packed) {
  int32x4_t acc[ROWS][4];
  for (int r = 0; r < ROWS; ++r) {
    for (int j = 0; j < 4; ++j) acc[r][j] = vdupq_n_s32(0);
  }
  for (int64_t k = 0; k < stride; k += 4) {
    const int8_t* w = packed + k * kOutputs;
    const int8x16_t w0 = vld1q_s8(w), w1 = vld1q_s8(w + 16), w2 = vld1q_s8(w + 32), w3 = vld1q_s8(w + 48);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
      int32_t four;
      std::memcpy(&four, x + (row + r) * stride + k, 4);
      const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
      acc[r][0] = vdotq_s32(acc[r][0], w0, xs);
      acc[r][1] = vdotq_s32(acc[r][1], w1, xs);
      acc[r][2] = vdotq_s32(acc[r][2], w2, xs);
      acc[r][3] = vdotq_s32(acc[r][3], w3, xs);
    }
  }
  const int64_t width = std::min(kOutputs, p.outputs - first);
  for (int r = 0; r < ROWS; ++r) {
    int32_t sums[kOutputs];
    for (int j = 0; j < 4; ++j) vst1q_s32(sums + 4 * j, acc[r][j]);
    float* y = p.y + (row + r) * p.outputs + first;
    const float* scale = p.scale + (p.scales == 1 ? 0 : first);
    const int64_t step = p.scales == 1 ? 0 : 1;
    for (int64_t n = 0; n < width; ++n) y[n] = static_cast<float>(sums[n]) * p.x_scale[row + r] * scale[n * step];
  }
}

// The rows of x, `stride` bytes apart, times a tile.
static void Tile(const IntegerProduct& p, const int8_t* x, int64_t stride, int64_t first, int8_t* packed) {
  Pack(p, first, stride, packed);
  int64_t row = 0;
  for (; row + 4 <= p.rows; row += 4) Block<4>(p, x, stride, row, first, packed);
  for (; row < p.rows; ++row) Block<1>(p, x, stride, row, first, packed);
}

}  // namespace neon
