// Products of rounded activations by the 8-bit dot products of NEON, which multiply signed bytes; blockwise.h describes the
// operands. A row has the same result in whatever number of rows. Included with the compiler's target set.

namespace neon {

constexpr int64_t kColumns = 64, kOutputs = 16;  // outputs of a tile, and those that are computed together
constexpr int64_t kQuads = kBlock / 4;

// The bytes of the dot products are P - `low`; they fit int8.
static inline int32_t LowOf(const Product& p, const ByteValues& v) { return p.bits == 8 || v.table ? 128 : 0; }

// Four rows of codes as vectors of 4 outputs with their four codes, or four bytes of the rows of 16 outputs.
static inline void LoadFours(const Product& p, const Panel& panel, int64_t b, int64_t column, uint8x16_t* fours) {
  const int64_t width = std::min(kOutputs, p.outputs - column), count = std::min<int64_t>(4, panel.size - b);
  alignas(16) uint8_t bytes[4 * kOutputs] = {};
  if (p.by_output) {
    const int64_t all = NumGroups(p) * GroupBytes(p);
    for (int64_t n = 0; n < width; ++n) std::memcpy(bytes + 4 * n, p.codes + (column + n) * all + panel.begin + b, count);
    for (int i = 0; i < 4; ++i) fours[i] = vld1q_u8(bytes + 16 * i);
    return;
  }
  uint8x16_t rows[4];
  for (int64_t i = 0; i < 4; ++i) {
    const uint8_t* w = p.codes + (panel.begin + b + i) * p.outputs + column;
    if (i < count && width < kOutputs) std::memcpy(bytes + 16 * i, w, width);
    rows[i] = vld1q_u8(i < count && width == kOutputs ? w : bytes + 16 * i);
  }
  const uint16x8_t low01 = vreinterpretq_u16_u8(vzip1q_u8(rows[0], rows[1])),
                   high01 = vreinterpretq_u16_u8(vzip2q_u8(rows[0], rows[1])),
                   low23 = vreinterpretq_u16_u8(vzip1q_u8(rows[2], rows[3])),
                   high23 = vreinterpretq_u16_u8(vzip2q_u8(rows[2], rows[3]));
  fours[0] = vreinterpretq_u8_u16(vzip1q_u16(low01, low23));
  fours[1] = vreinterpretq_u8_u16(vzip2q_u16(low01, low23));
  fours[2] = vreinterpretq_u8_u16(vzip1q_u16(high01, high23));
  fours[3] = vreinterpretq_u8_u16(vzip2q_u16(high01, high23));
}

// The bytes of the blocks of a panel, (blocks, quads, 4 vectors of 4 outputs with four inputs).
static void ExpandPanel(const Product& p, const Blocks& blocks, const ByteValues& v, const Panel& panel, int64_t column,
                        uint8x16_t* expanded) {
  const uint8x16_t mask = vdupq_n_u8(static_cast<uint8_t>((1 << p.bits) - 1)), sign = vdupq_n_u8(0x80);
  const uint8x16_t table = veorq_u8(vld1q_u8(v.bytes), sign);
  for (int64_t b = 0; b < panel.size; b += 4) {
    uint8x16_t fours[4];
    LoadFours(p, panel, b, column, fours);
    for (int64_t s = 0; s < CodesPerByte(p); ++s) {
      uint8x16_t* out = expanded + 4 * (blocks.joint ? (s * panel.size + b) / 4 : s * kQuads + b / 4);
      const int8x16_t shift = vdupq_n_s8(static_cast<int8_t>(-s * p.bits));
      for (int i = 0; i < 4; ++i) {
        uint8x16_t codes = fours[i];
        if (p.bits < 8) codes = vandq_u8(vshlq_u8(codes, shift), mask);
        if (v.table) codes = vqtbl1q_u8(table, codes);
        if (p.kind == kUint8) codes = veorq_u8(codes, sign);  // the bytes of kInt8 are P - 128
        out[i] = codes;
      }
    }
  }
}

// As `ExpandPanel`, of one block whose inputs do not follow the bytes of codes.
static void ExpandBlock(const Product& p, const ByteValues& v, const Block& block, int64_t column, uint8x16_t* expanded) {
  const int64_t width = std::min(kOutputs, p.outputs - column);
  alignas(16) uint8_t bytes[kBlock * kOutputs] = {};
  const int32_t low = LowOf(p, v);
  for (int64_t i = 0; i < block.size; ++i) {
    for (int64_t n = 0; n < width; ++n) {
      bytes[i / 4 * 4 * kOutputs + 4 * n + i % 4] = static_cast<uint8_t>(ByteAt(p, v, block.first + i, column + n) - low);
    }
  }
  for (int64_t i = 0; i < 4 * kQuads; ++i) expanded[i] = vld1q_u8(bytes + 16 * i);
}

static inline void LoadScales(const Product& p, const Scales& s, int64_t group, int64_t column, float* scales) {
  const int64_t width = std::min(kOutputs, p.outputs - column), index = (s.rows == 1 ? 0 : group) * s.columns + column;
  if (s.kind == kNone) return;
  if (!p.by_output && s.columns > 1 && s.kind == kFloat32) {
    std::memcpy(scales, static_cast<const float*>(s.data) + index, 4 * width);
    return;
  }
  if (!p.by_output && s.columns > 1 && s.kind == kFloat16) {
    for (int64_t n = 0; n < width; ++n) scales[n] = HalfToFloat(static_cast<const uint16_t*>(s.data)[index + n]);
    return;
  }
  for (int64_t n = 0; n < width; ++n) {
    scales[n] = p.by_output ? ScaleAt(s, column + n, group) : ScaleAt(s, group, column + n);
  }
}

// What the sum over a block starts from, because the bytes of the weight are P - low and not P - zero.
static inline int32_t StartOf(const Product& p, const ByteValues& v, const Blocks& blocks, const Rounded& r, int64_t index) {
  if (v.zero == LowOf(p, v)) return 0;
  if (p.bits < 8) return r.start[index];  // low is 0
  int32_t sum = 0;                        // kUint8: zero is 0
  for (int64_t i = 0; i < blocks.stride; ++i) sum += r.codes[index * blocks.stride + i];
  return 128 * sum;
}

// y += a block times 16 outputs, for ROWS rows.
template <int ROWS>
static inline void AddBlock(const Product& p, const ByteValues& v, const Blocks& blocks, const Rounded& r, int64_t row,
                            int64_t block, int64_t column, const uint8x16_t* expanded, const float* scales,
                            const float* offsets) {
  const int64_t count = blocks.list.size(), next = count * blocks.stride, index = row * count + block;
  const int8_t* x = r.codes.data() + index * blocks.stride;
  int32x4_t acc[ROWS][4];
#pragma GCC unroll 4
  for (int m = 0; m < ROWS; ++m) {
    acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = vdupq_n_s32(StartOf(p, v, blocks, r, index + m * count));
  }
  for (int64_t q = 0; q < blocks.stride / 4; ++q, expanded += 4, x += 4) {
#pragma GCC unroll 4
    for (int m = 0; m < ROWS; ++m) {
      int32_t four;
      std::memcpy(&four, x + m * next, 4);
      const int8x16_t xs = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[m][i] = vdotq_s32(acc[m][i], vreinterpretq_s8_u8(expanded[i]), xs);
    }
  }
  const int64_t width = std::min(kOutputs, p.outputs - column);
  for (int m = 0; m < ROWS; ++m) {
    float* y = p.y + (row + m) * p.outputs + column;
    float sums[kOutputs] = {};
    std::memcpy(sums, y, 4 * width);
    for (int i = 0; i < 4; ++i) {
      const float32x4_t scaled = vmulq_n_f32(vcvtq_f32_s32(acc[m][i]), r.scale[index + m * count]);
      float32x4_t sum = vfmaq_f32(vld1q_f32(sums + 4 * i), scaled, vld1q_f32(scales + 4 * i));
      if (p.offset.kind != kNone) sum = vfmaq_n_f32(sum, vld1q_f32(offsets + 4 * i), r.total[index + m * count]);
      vst1q_f32(sums + 4 * i, sum);
    }
    std::memcpy(y, sums, 4 * width);
  }
}

// The outputs [begin, end) of the rows [first_row, last_row).
static void Outputs(const Product& p, const Blocks& blocks, const ByteValues& v, const Rounded& r, int64_t first_row,
                    int64_t last_row, int64_t begin, int64_t end) {
  const int64_t num_panels = blocks.panels.size(), count = num_panels ? num_panels : blocks.list.size();
  const int64_t blocks_of_panel = num_panels && !blocks.joint ? CodesPerByte(p) : 1;
  uint8x16_t expanded[4 * 4 * kQuads];
  for (int64_t m = first_row; m < last_row; ++m) std::memset(p.y + m * p.outputs + begin, 0, 4 * (end - begin));
  for (int64_t tile = begin; tile < end; tile += kColumns) {
    for (int64_t j = 0; j < count; ++j) {
      const int64_t first = num_panels ? blocks.panels[j].block : j;
      for (int64_t column = tile; column < std::min(tile + kColumns, end); column += kOutputs) {
        if (num_panels) {
          ExpandPanel(p, blocks, v, blocks.panels[j], column, expanded);
        } else {
          ExpandBlock(p, v, blocks.list[j], column, expanded);
        }
        float scales[kOutputs] = {}, offsets[kOutputs] = {};
        LoadScales(p, p.scale, blocks.list[first].group, column, scales);
        LoadScales(p, p.offset, blocks.list[first].group, column, offsets);
        for (int64_t s = 0; s < blocks_of_panel; ++s) {
          const uint8x16_t* bytes = expanded + s * 4 * kQuads;
          int64_t row = first_row;
          for (; row + 4 <= last_row; row += 4) AddBlock<4>(p, v, blocks, r, row, first + s, column, bytes, scales, offsets);
          for (; row < last_row; ++row) AddBlock<1>(p, v, blocks, r, row, first + s, column, bytes, scales, offsets);
        }
      }
    }
  }
}

}  // namespace neon
