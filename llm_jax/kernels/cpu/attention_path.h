// Attention of few queries in float32 arithmetic, in plain C++ that compilers vectorize. Included once per instruction
// set, inside a namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kLanes = 16;
constexpr int64_t kAhead = 8;  // keys that are fetched in advance

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87. NaN stays NaN.
static inline float Exp(float x) {
  const bool tiny = x < -87.0f;
  const float inside = tiny ? -87.0f : x;
  const float shifted = inside * 1.44269504f + 12582912.0f;  // the rounding to an integer by 1.5 * 2^23
  const float n = shifted - 12582912.0f;
  const float r = (inside - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r * r + r) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = ((bits & 0xffu) + 127u) << 23;  // n as an exponent; its low eight bits are those of n, two's complement
  bits &= 0x7f800000u;
  float power;
  std::memcpy(&power, &bits, 4);
  return tiny ? 0.0f : p * power;
}

// Fetches a row of a cache in advance. The rows of a head are too far apart for the CPU to foresee.
template <typename T>
static inline void Fetch(const T* row, int64_t width) {
  for (int64_t h = 0; h < width; h += 64 / sizeof(T)) __builtin_prefetch(row + h);
}

template <typename T>
static inline float Dot(const float* q, const T* k, int64_t width) {
  float acc[kLanes] = {};
  int64_t h = 0;
  for (; h + kLanes <= width; h += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) acc[i] += q[h + i] * static_cast<float>(k[h + i]);
  }
  float sum = 0;
  for (; h < width; ++h) sum += q[h] * static_cast<float>(k[h]);
  float eight[8], four[4];
  for (int64_t i = 0; i < 8; ++i) eight[i] = acc[i] + acc[i + 8];
  for (int64_t i = 0; i < 4; ++i) four[i] = eight[i] + eight[i + 4];
  return ((four[0] + four[2]) + (four[1] + four[3])) + sum;
}

// y += the sum of w[j] v[j] over `count` (at most 4) rows of v.
template <typename T>
static inline void AddValues(const float* w, const T* const* v, int64_t count, int64_t width, float* __restrict y) {
  if (count == 4) {
    const T *v0 = v[0], *v1 = v[1], *v2 = v[2], *v3 = v[3];
    const float w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
    for (int64_t h = 0; h < width; ++h) {
      y[h] += (w0 * static_cast<float>(v0[h]) + w1 * static_cast<float>(v1[h])) +
              (w2 * static_cast<float>(v2[h]) + w3 * static_cast<float>(v3[h]));
    }
    return;
  }
  for (int64_t j = 0; j < count; ++j) {
    for (int64_t h = 0; h < width; ++h) y[h] += w[j] * static_cast<float>(v[j][h]);
  }
}

// Scores -> exp(scores - the largest). Returns their sum.
static float Exponentials(float* scores, int64_t count) {
  float tops[kLanes], totals[kLanes] = {}, top = -INFINITY, total = 0;
  for (int64_t i = 0; i < kLanes; ++i) tops[i] = -INFINITY;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) tops[i] = scores[j + i] > tops[i] ? scores[j + i] : tops[i];
  }
  for (; j < count; ++j) top = scores[j] > top ? scores[j] : top;
  for (int64_t i = 0; i < kLanes; ++i) top = tops[i] > top ? tops[i] : top;
  for (j = 0; j < count; ++j) scores[j] = Exp(scores[j] - top);
  for (j = 0; j + kLanes <= count; j += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) totals[i] += scores[j + i];
  }
  for (; j < count; ++j) total += scores[j];
  for (int64_t i = 0; i < kLanes; ++i) total += totals[i];
  return total;
}

// The queries of one row that share a head of keys and values. `keys` are the `count` keys that any of them attends to.
template <typename T>
static void HeadOf(const Attention& a, int64_t row, int64_t head, const int64_t* keys, int64_t count, float* scores) {
  const int64_t groups = a.heads / a.kv_heads, stride = a.kv_heads * a.width;
  const T* k = static_cast<const T*>(a.k) + (row * a.keys * a.kv_heads + head) * a.width;
  const T* v = static_cast<const T*>(a.v) + (row * a.keys * a.kv_heads + head) * a.width;
  const int64_t first_scale = row * a.keys * a.kv_heads + head;
  const float scale = 1.0f / std::sqrt(static_cast<float>(a.width));
  for (int64_t t = 0; t < a.queries; ++t) {
    const uint8_t* mask = a.mask + (row * a.queries + t) * a.keys;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t n = head * groups + g, query = (row * a.queries + t) * a.heads + n;
      const float* q = a.q + query * a.width;
      const float* bias = nullptr;
      if (a.bias) bias = a.bias + (((a.bias_rows == 1 ? 0 : row) * a.heads + n) * a.queries + t) * a.keys;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t s = keys[j];
        if (t + g == 0) {  // later queries read them from the caches
          if (j + kAhead < count) Fetch(k + keys[j + kAhead] * stride, a.width);
          Fetch(v + s * stride, a.width);
        }
        float score = Dot(q, k + s * stride, a.width) * scale;
        if (a.k_scale) score *= HalfToFloat(a.k_scale[first_scale + s * a.kv_heads]);
        if (a.softcap != 0) score = a.softcap * std::tanh(score / a.softcap);
        if (bias) score += bias[s];
        scores[j] = mask[s] ? score : -1e30f;
      }
      const float total = Exponentials(scores, count);
      if (a.v_scale) {
        for (int64_t j = 0; j < count; ++j) scores[j] *= HalfToFloat(a.v_scale[first_scale + keys[j] * a.kv_heads]);
      }
      float* y = a.y + query * a.width;
      for (int64_t h = 0; h < a.width; ++h) y[h] = 0;
      for (int64_t j = 0; j < count; j += 4) {
        const int64_t most = count - j < 4 ? count - j : 4;
        const T* rows[4];
        for (int64_t i = 0; i < most; ++i) rows[i] = v + keys[j + i] * stride;
        AddValues(scores + j, rows, most, a.width, y);
      }
      for (int64_t h = 0; h < a.width; ++h) y[h] /= total;
    }
  }
}

static void Head(const Attention& a, int64_t row, int64_t head, const int64_t* keys, int64_t count, float* scores) {
  if (a.type == kInt8Cache) return HeadOf<int8_t>(a, row, head, keys, count, scores);
  if (a.type == kBFloat16Cache) return HeadOf<BFloat16>(a, row, head, keys, count, scores);
  HeadOf<float>(a, row, head, keys, count, scores);
}
