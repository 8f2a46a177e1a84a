// The instructions of AMX in software, with the checks of the CPU: what it refuses ends the process. See amx.h.

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbsud
#undef _tile_dpbf16ps
#define _tile_loadconfig(config) amx_model::LoadConfig(config)
#define _tile_storeconfig(config) amx_model::StoreConfig(config)
#define _tile_release() amx_model::Release()
#define _tile_loadd(tile, base, stride) amx_model::Load(tile, base, stride)
#define _tile_stored(tile, base, stride) amx_model::Store(tile, base, stride)
#define _tile_zero(tile) amx_model::Zero(tile)
#define _tile_dpbsud(sums, a, b) amx_model::DotBytes(sums, a, b)
#define _tile_dpbf16ps(sums, a, b) amx_model::DotBFloat16(sums, a, b)

namespace amx_model {

struct Tile {
  uint8_t bytes[16][64];
};

struct State {
  uint8_t config[64] = {};  // palette, start row, 14 reserved, 16 times bytes of a row (uint16), 16 times rows (uint8)
  Tile tiles[8];
};

inline State& Get() {
  static thread_local State state;
  return state;
}

[[noreturn]] inline void Refuse(const char* reason) {
  std::fprintf(stderr, "AMX: %s\n", reason);
  std::abort();
}

inline int Bytes(int tile) {
  uint16_t bytes;
  std::memcpy(&bytes, Get().config + 16 + 2 * tile, 2);
  return bytes;
}

inline int Rows(int tile) { return Get().config[48 + tile]; }

// A tile of the configuration, whose bytes a user may read.
inline Tile& Used(int tile) {
  if (!Get().config[0]) Refuse("the tiles of this thread have no shapes");
  if (tile < 0 || tile > 7 || !Rows(tile)) Refuse("the tile has no rows");
  return Get().tiles[tile];
}

inline void Release() { std::memset(&Get(), 0, sizeof(State)); }

inline void LoadConfig(const void* config) {
  Release();
  std::memcpy(Get().config, config, 64);
  if (Get().config[0] != 1) Refuse("the palette");
  for (int i = 1; i < 16; ++i) {
    if (Get().config[i]) Refuse("the start row, or a reserved byte");
  }
  for (int tile = 0; tile < 16; ++tile) {
    if (tile > 7 ? Rows(tile) || Bytes(tile) : Rows(tile) > 16 || Bytes(tile) > 64 || !Rows(tile) != !Bytes(tile)) {
      Refuse("the shape of a tile");
    }
  }
  std::memset(Get().tiles, 0xa5, sizeof(Get().tiles));  // the real ones are 0; the kernels do not rely on it
}

inline void StoreConfig(void* config) { std::memcpy(config, Get().config, 64); }

inline void Load(int tile, const void* base, int64_t stride) {
  Tile& t = Used(tile);
  std::memset(&t, 0, sizeof(t));
  for (int r = 0; r < Rows(tile); ++r) std::memcpy(t.bytes[r], static_cast<const char*>(base) + r * stride, Bytes(tile));
}

inline void Store(int tile, void* base, int64_t stride) {
  const Tile& t = Used(tile);
  for (int r = 0; r < Rows(tile); ++r) std::memcpy(static_cast<char*>(base) + r * stride, t.bytes[r], Bytes(tile));
}

inline void Zero(int tile) { std::memset(&Used(tile), 0, sizeof(Tile)); }

inline void CheckShapes(int sums, int a, int b) {
  if (sums == a || sums == b || a == b) Refuse("the same tile twice");
  Used(sums), Used(a), Used(b);
  if (Rows(sums) != Rows(a) || Bytes(a) != 4 * Rows(b) || Bytes(sums) != Bytes(b)) Refuse("the shapes of a product");
}

template <typename T>
inline T At(const Tile& tile, int row, int index) {
  T value;
  std::memcpy(&value, tile.bytes[row] + sizeof(T) * index, sizeof(T));
  return value;
}

inline void DotBytes(int sums, int a, int b) {
  CheckShapes(sums, a, b);
  for (int m = 0; m < Rows(sums); ++m) {
    for (int n = 0; n < Bytes(sums) / 4; ++n) {
      uint32_t sum = At<uint32_t>(Used(sums), m, n);
      for (int k = 0; k < Bytes(a); ++k) {
        sum += At<int8_t>(Used(a), m, k) * static_cast<int32_t>(At<uint8_t>(Used(b), k / 4, 4 * n + k % 4));
      }
      std::memcpy(Used(sums).bytes[m] + 4 * n, &sum, 4);
    }
  }
}

inline float Wide(uint16_t value) {
  const uint32_t exponent = value & 0x7f80u, bits = exponent ? value << 16 : (value & 0x8000u) << 16;  // denormals are 0
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}

inline void DotBFloat16(int sums, int a, int b) {
  CheckShapes(sums, a, b);
  for (int m = 0; m < Rows(sums); ++m) {
    for (int n = 0; n < Bytes(sums) / 4; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < Bytes(a) / 4; ++k) {
        even = __builtin_fmaf(Wide(At<uint16_t>(Used(a), m, 2 * k)), Wide(At<uint16_t>(Used(b), k, 2 * n)), even);
        odd = __builtin_fmaf(Wide(At<uint16_t>(Used(a), m, 2 * k + 1)), Wide(At<uint16_t>(Used(b), k, 2 * n + 1)), odd);
      }
      const float sum = At<float>(Used(sums), m, n) + (even + odd);
      std::memcpy(Used(sums).bytes[m] + 4 * n, &sum, 4);
    }
  }
}

}  // namespace amx_model
