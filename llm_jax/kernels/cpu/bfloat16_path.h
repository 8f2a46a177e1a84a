// Products of few rows with a bfloat16 weight, with float32 sums, in plain C++ that compilers vectorize. Included once per
// instruction set, inside a namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kTile = 256;  // outputs of a tile
constexpr int64_t kLanes = 16;

static inline float Wide(uint16_t value) {
  const uint32_t bits = static_cast<uint32_t>(value) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

// acc[n] += the sum of x[i] w[i][n] over `count` (at most 4) rows of w.
static inline void AddRows(const float* x, const uint16_t* w, int64_t stride, int64_t count, int64_t width,
                           float* __restrict acc) {
  if (count == 4) {
    const uint16_t *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
    const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    for (int64_t n = 0; n < width; ++n) {
      acc[n] += (x0 * Wide(w0[n]) + x1 * Wide(w1[n])) + (x2 * Wide(w2[n]) + x3 * Wide(w3[n]));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t n = 0; n < width; ++n) acc[n] += x[i] * Wide(w[i * stride + n]);
  }
}

static inline float Dot(const float* x, const uint16_t* w, int64_t count) {
  float acc[2 * kLanes] = {};
  int64_t k = 0;
  for (; k + 2 * kLanes <= count; k += 2 * kLanes) {
    for (int64_t i = 0; i < 2 * kLanes; ++i) acc[i] += x[k + i] * Wide(w[k + i]);
  }
  float sum = 0;
  for (; k < count; ++k) sum += x[k] * Wide(w[k]);
  for (int64_t half = kLanes; half; half /= 2) {
    for (int64_t i = 0; i < half; ++i) acc[i] += acc[i + half];
  }
  return acc[0] + sum;
}

// The outputs [begin, end) of all rows. `x` are the activations in float32.
static void Outputs(const BFloat16Product& p, const float* x, int64_t begin, int64_t end) {
  if (p.by_output) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t m = 0; m < p.rows; ++m) p.y[m * p.outputs + n] = Dot(x + m * p.inputs, p.w + n * p.inputs, p.inputs);
    }
    return;
  }
  for (int64_t n = begin; n < end; n += kTile) {
    const int64_t width = end - n < kTile ? end - n : kTile;
    for (int64_t m = 0; m < p.rows; ++m) {
      for (int64_t i = 0; i < width; ++i) p.y[m * p.outputs + n + i] = 0;
    }
    for (int64_t k = 0; k < p.inputs; k += 4) {
      const int64_t count = p.inputs - k < 4 ? p.inputs - k : 4;
      for (int64_t m = 0; m < p.rows; ++m) {
        AddRows(x + m * p.inputs + k, p.w + k * p.outputs + n, p.outputs, count, width, p.y + m * p.outputs + n);
      }
    }
  }
}
