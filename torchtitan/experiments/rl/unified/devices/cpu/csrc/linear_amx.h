// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Tiles of 16 or 32 rows in AMX registers. Of one element, for each kAlign units of k: the even numbers of x and w are
// multiplied and added one after another in fp32, so are the odd ones, and the two sums are added to the element.

#include <sys/syscall.h>
#include <unistd.h>

constexpr int64_t kTileWords = 16 * kAlign;  // a register: 16 rows of kAlign units

// Of the calling thread: all eight registers whole. A constant, since the compiler sees a reading of 8 bytes only.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kConfig;
inline void enter() { _tile_loadconfig(&kConfig); }
inline void leave() { _tile_release(); }

// Asks Linux for the registers, once for the process.
inline bool allow_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// Asks the caches for the register that is read `ahead` words later; 0: w is in them.
inline void ask_for(const uint32_t* w, int64_t ahead) {
  if (!ahead) return;
#pragma GCC unroll 16
  for (int64_t word = 0; word < kTileWords; word += kAlign) _mm_prefetch(w + ahead + word, _MM_HINT_T0);
}

// x: [2][units / kAlign][16 rows][kAlign]
inline void block_2x2(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t units, float* c, int64_t ldc, bool first,
    int64_t ahead) {
  const uint32_t* x1 = x + 16 * units;
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + kColumns, ldc * 4);
    _tile_loadd(2, c + 16 * ldc, ldc * 4);
    _tile_loadd(3, c + 16 * ldc + kColumns, ldc * 4);
  }
  for (int64_t i = 0; i < 16 * units; i += kTileWords) {
    ask_for(w + i, ahead);
    ask_for(w + panel + i, ahead);
    _tile_loadd(4, x + i, 64);
    _tile_loadd(6, w + i, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + panel + i, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, x1 + i, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + kColumns, ldc * 4);
  _tile_stored(2, c + 16 * ldc, ldc * 4);
  _tile_stored(3, c + 16 * ldc + kColumns, ldc * 4);
}

inline void block_1x4(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t units, float* c, int64_t ldc, bool first,
    int64_t ahead) {
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, c, ldc * 4);
    _tile_loadd(1, c + kColumns, ldc * 4);
    _tile_loadd(2, c + 2 * kColumns, ldc * 4);
    _tile_loadd(3, c + 3 * kColumns, ldc * 4);
  }
  for (int64_t i = 0; i < 16 * units; i += kTileWords) {
    for (int64_t p = 0; p < 4; p++) ask_for(w + p * panel + i, ahead);
    _tile_loadd(4, x + i, 64);
    _tile_loadd(5, w + i, 64);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, w + panel + i, 64);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(7, w + 2 * panel + i, 64);
    _tile_dpbf16ps(2, 4, 7);
    _tile_loadd(5, w + 3 * panel + i, 64);
    _tile_dpbf16ps(3, 4, 5);
  }
  _tile_stored(0, c, ldc * 4);
  _tile_stored(1, c + kColumns, ldc * 4);
  _tile_stored(2, c + 2 * kColumns, ldc * 4);
  _tile_stored(3, c + 3 * kColumns, ldc * 4);
}

inline void block_1x1(
    const uint32_t* x, const uint32_t* w, int64_t units, float* c, int64_t ldc, bool first, int64_t ahead) {
  if (first) {
    _tile_zero(0);
  } else {
    _tile_loadd(0, c, ldc * 4);
  }
  for (int64_t i = 0; i < 16 * units; i += kTileWords) {
    ask_for(w + i, ahead);
    _tile_loadd(4, x + i, 64);
    _tile_loadd(5, w + i, 64);
    _tile_dpbf16ps(0, 4, 5);
  }
  _tile_stored(0, c, ldc * 4);
}

// `two`: for 17 to 32 rows.
template <bool two>
void tile(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t panels, int64_t units, float* c, int64_t ldc,
    bool first, int64_t ahead) {
  int64_t p = 0;
  if constexpr (two) {
    for (; p + 2 <= panels; p += 2) block_2x2(x, w + p * panel, panel, units, c + p * kColumns, ldc, first, ahead);
  } else {
    for (; p + 4 <= panels; p += 4) block_1x4(x, w + p * panel, panel, units, c + p * kColumns, ldc, first, ahead);
  }
  for (; p < panels; p++) {
    block_1x1(x, w + p * panel, units, c + p * kColumns, ldc, first, ahead);
    if (two) block_1x1(x + 16 * units, w + p * panel, units, c + 16 * ldc + p * kColumns, ldc, first, ahead);
  }
}

constexpr int kRows = 32;
template <class>
struct Table;
template <int... I>
struct Table<std::integer_sequence<int, I...>> {
  static constexpr Tile tiles[] = {nullptr, tile<(I + 1 > 16)>...};
};
constexpr const Tile* kTiles = Table<std::make_integer_sequence<int, kRows>>::tiles;
