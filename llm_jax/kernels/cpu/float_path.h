// The product in float32 arithmetic, in plain C++ that compilers vectorize. Included once per instruction set, inside a
// namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kTile = 64;      // outputs of a tile

constexpr int64_t kConsecutive = 3;  // a table of consecutive integers

struct Codes {
  int shift;
  unsigned mask;
  const float* table;
  float low;  // the value of code 0
};

template <int KIND>
static inline float Value(const Codes& c, uint8_t byte) {
  if (KIND == kInt8) return static_cast<float>(static_cast<int8_t>(byte));
  if (KIND == kUint8) return static_cast<float>(byte);
  if (KIND == kConsecutive) return static_cast<float>((byte >> c.shift) & c.mask) + c.low;
  return c.table[(byte >> c.shift) & c.mask];
}

// acc[n] += sum of x[r] w[r][n] over `count` (at most 4) rows of codes that are `stride` bytes apart.
template <int KIND>
static void AddRows(const Codes& c, const uint8_t* w, int64_t stride, int64_t count, const float* x, int64_t width,
                    float* __restrict acc) {
  if (count == 4) {
    const uint8_t *w0 = w, *w1 = w + stride, *w2 = w + 2 * stride, *w3 = w + 3 * stride;
    const float x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
    for (int64_t n = 0; n < width; ++n) {
      acc[n] += (x0 * Value<KIND>(c, w0[n]) + x1 * Value<KIND>(c, w1[n])) +
                (x2 * Value<KIND>(c, w2[n]) + x3 * Value<KIND>(c, w3[n]));
    }
    return;
  }
  for (int64_t r = 0; r < count; ++r) {
    for (int64_t n = 0; n < width; ++n) acc[n] += x[r] * Value<KIND>(c, w[r * stride + n]);
  }
}

template <int KIND>
static void ColumnsOfKind(const Product& p, const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t per_byte = CodesPerByte(p), bytes = GroupBytes(p);
  for (int64_t n = begin; n < end; ++n) y[n] = 0;
  for (int64_t g = 0; g < NumGroups(p); ++g) {
    float total = 0;  // of the activations of the group, for offsets
    for (int64_t i = 0; i < p.group; ++i) total += x[g * p.group + i];
    for (int64_t n0 = begin; n0 < end; n0 += kTile) {
      const int64_t width = end - n0 < kTile ? end - n0 : kTile;
      float acc[kTile] = {};
      for (int64_t part = 0; part < per_byte; ++part) {
        const Codes c{static_cast<int>(part * p.bits), (1u << p.bits) - 1, p.table, KIND == kConsecutive ? p.table[0] : 0};
        for (int64_t b = 0; b < bytes; b += 4) {
          AddRows<KIND>(c, p.codes + (g * bytes + b) * p.outputs + n0, p.outputs, bytes - b < 4 ? bytes - b : 4,
                        x + g * p.group + part * bytes + b, width, acc);
        }
      }
      for (int64_t n = 0; n < width; ++n) {
        y[n0 + n] += acc[n] * ScaleAt(p.scale, g, n0 + n);
        if (p.offset.kind != kNone) y[n0 + n] += total * ScaleAt(p.offset, g, n0 + n);
      }
    }
  }
}

template <int KIND>
static float DotOfKind(const Codes& c, const uint8_t* w, const float* x, int64_t count) {
  float acc[16] = {};
  int64_t b = 0;
  for (; b + 16 <= count; b += 16) {
    for (int64_t i = 0; i < 16; ++i) acc[i] += x[b + i] * Value<KIND>(c, w[b + i]);
  }
  float sum = 0;
  for (; b < count; ++b) sum += x[b] * Value<KIND>(c, w[b]);
  for (int64_t width = 8; width; width /= 2) {
    for (int64_t i = 0; i < width; ++i) acc[i] += acc[i + width];
  }
  return acc[0] + sum;
}

template <int KIND>
static void RowsOfKind(const Product& p, const float* x, float* y, int64_t begin, int64_t end) {
  const int64_t per_byte = CodesPerByte(p), bytes = GroupBytes(p), groups = NumGroups(p);
  for (int64_t n = begin; n < end; ++n) {
    float sum = 0;
    for (int64_t g = 0; g < groups; ++g) {
      const uint8_t* w = p.codes + (n * groups + g) * bytes;
      const float* inputs = x + g * p.group;
      float dot = 0;
      for (int64_t part = 0; part < per_byte; ++part) {
        const Codes c{static_cast<int>(part * p.bits), (1u << p.bits) - 1, p.table, KIND == kConsecutive ? p.table[0] : 0};
        dot += DotOfKind<KIND>(c, w, inputs + part * bytes, bytes);
      }
      sum += dot * ScaleAt(p.scale, n, g);
      if (p.offset.kind != kNone) {
        float total = 0;
        for (int64_t i = 0; i < p.group; ++i) total += inputs[i];
        sum += total * ScaleAt(p.offset, n, g);
      }
    }
    y[n] = sum;
  }
}

template <int KIND>
static void OutputsOfKind(const Product& p, int64_t row, int64_t begin, int64_t end) {
  const float* x = p.x + row * p.inputs;
  float* y = p.y + row * p.outputs;
  if (p.by_output) {
    RowsOfKind<KIND>(p, x, y, begin, end);
  } else {
    ColumnsOfKind<KIND>(p, x, y, begin, end);
  }
}

// The outputs [begin, end) of one row of x.
static void Outputs(const Product& p, int64_t row, int64_t begin, int64_t end) {
  if (p.kind == kInt8) return OutputsOfKind<kInt8>(p, row, begin, end);
  if (p.kind == kUint8) return OutputsOfKind<kUint8>(p, row, begin, end);
  if (IsConsecutive(p)) return OutputsOfKind<kConsecutive>(p, row, begin, end);
  OutputsOfKind<kTable>(p, row, begin, end);
}
