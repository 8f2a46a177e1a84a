// The values of codes in tiles as float32, in plain C++ that compilers vectorize. Included once per instruction set, inside a
// namespace and with the compiler's target set; so it has no include guard.

constexpr int64_t kLine = 64;  // outputs that are written together
constexpr int64_t kConsecutive = 3;  // a table of consecutive integers

// The values of one row of codes of a quad times their scales, plus their offsets.
template <int64_t KIND, bool OFFSET>
static inline void ExpandRow(const uint8_t* quad, int shift, uint32_t mask, const float* __restrict table,
                             const float* __restrict scale, const float* __restrict offset, float* __restrict y) {
  typedef uint32_t Word __attribute__((may_alias, aligned(1)));  // a copy of the bytes would be slower
  const Word* words = reinterpret_cast<const Word*>(quad);       // one of each output
  const float low = KIND == kConsecutive ? table[0] : 0.0f;
  for (int64_t n = 0; n < kTileOutputs; ++n) {
    const uint32_t code = (words[n] >> shift) & mask;
    float value;
    if (KIND == kInt8) {
      value = static_cast<float>(static_cast<int8_t>(code));
    } else if (KIND == kTable) {
      value = table[code];
    } else {
      value = static_cast<float>(static_cast<int32_t>(code)) + low;
    }
    y[n] = OFFSET ? value * scale[n] + offset[n] : value * scale[n];
  }
}

template <int64_t KIND>
static void ExpandLine(const Product& p, int64_t begin, int64_t end) {
  const int64_t parts = CodesPerByte(p), bytes = GroupBytes(p), rows = NumGroups(p) * bytes;
  float scales[kLine], offsets[kLine];
  for (int64_t row = 0; row < rows; row += kTileRows) {
    const int64_t group = row / bytes;
    for (int64_t n = begin; n < end && row % bytes == 0; ++n) {
      scales[n - begin] = ScaleAt(p.scale, group, n);
      if (p.offset.kind != kNone) offsets[n - begin] = ScaleAt(p.offset, group, n);
    }
    for (int64_t part = 0; part < parts; ++part) {
      for (int64_t r = 0; r < kTileRows; ++r) {
        float* y = p.y + (group * p.group + part * bytes + row % bytes + r) * p.outputs;
        for (int64_t n = begin; n < end; n += kTileOutputs) {
          const auto expand = [&](auto row_function) {
            row_function(p.codes + n * rows + row * kTileOutputs, static_cast<int>(8 * r + part * p.bits),
                         (1u << p.bits) - 1, p.table, scales + n - begin, offsets + n - begin, y + n);
          };
          p.offset.kind == kNone ? expand(ExpandRow<KIND, false>) : expand(ExpandRow<KIND, true>);
        }
      }
    }
  }
}

static void Expand(const Product& p, int64_t begin, int64_t end) {
  if (p.kind == kInt8) return ExpandLine<kInt8>(p, begin, end);
  if (p.kind == kUint8) return ExpandLine<kUint8>(p, begin, end);
  if (IsConsecutive(p)) return ExpandLine<kConsecutive>(p, begin, end);
  ExpandLine<kTable>(p, begin, end);
}
