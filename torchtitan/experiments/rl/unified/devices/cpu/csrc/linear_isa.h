// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// The instruction sets that products are computed by, and what this CPU has of them.

enum Isa { kAvx2, kAvx512, kAvx512Bf16, kAmx };
enum Mode { kFma, kPairs, kDot, kAmxTiles };

// Some rows of x by some panels into c, on top of what c holds unless it is the first part of a sum. `panel` is the
// distance of panels, `units` how many units of k, `ahead` how many words early w is asked for where it is read as a
// stream; x and w as in linear_pack.h.
using Tile = void (*)(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t panels, int64_t units, float* c, int64_t ldc,
    bool first, int64_t ahead);

// How one dtype is computed, and in which blocks for the caches; the blocks have no say in the bits.
struct Path {
  Mode mode;
  int64_t tile_rows;  // most rows of a tile
  const Tile* tiles;  // by the number of rows, from 1 on
  int64_t panels;     // panels that share one reading of a block's rows
  int64_t rows;       // rows of a block
  int64_t units;      // units of a block
};

#define RL_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define RL_BEGIN(features) RL_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#define RL_END RL_PRAGMA(clang attribute pop)
#else
#define RL_BEGIN(features) RL_PRAGMA(GCC push_options) RL_PRAGMA(GCC target(features))
#define RL_END RL_PRAGMA(GCC pop_options)
#endif

RL_BEGIN("avx2,fma")
namespace avx2 {
#define RL_LANES 8
#include "linear_tiles.h"
#undef RL_LANES
}  // namespace avx2
RL_END

#define RL_LANES 16
RL_BEGIN("avx512f")
namespace avx512 {
#include "linear_tiles.h"
}  // namespace avx512
RL_END

#define RL_DOT
RL_BEGIN("avx512f,avx512bf16")
namespace avx512_bf16 {
#include "linear_tiles.h"
}  // namespace avx512_bf16
RL_END
#undef RL_DOT
#undef RL_LANES

RL_BEGIN("amx-tile,amx-bf16")
namespace amx {
#include "linear_amx.h"
}  // namespace amx
RL_END

// The best that the CPU and Linux give, or -1.
inline int best_isa() {
  static const int best = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return -1;
    if (!__builtin_cpu_supports("avx512f")) return (int)kAvx2;
    if (!__builtin_cpu_supports("avx512bf16")) return (int)kAvx512;
    unsigned a, b, c, d;
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    __cpuid_count(7, 0, a, b, c, d);
    const bool has_tiles = (d & kAmxBf16) && (d & kAmxTile) && amx::allow_tiles();
    return (int)(has_tiles ? kAmx : kAvx512Bf16);
  }();
  return best;
}

constexpr Path kFp32Paths[] = {
    {kFma, avx2::kRows, avx2::kTiles<kFma>, 1, 96, 256},
    {kFma, avx512::kRows, avx512::kTiles<kFma>, 2, 192, 256}};
constexpr Path kBf16Paths[] = {
    {kPairs, avx2::kRows, avx2::kTiles<kPairs>, 1, 96, 128},
    {kPairs, avx512::kRows, avx512::kTiles<kPairs>, 2, 192, 128},
    {kDot, avx512_bf16::kRows, avx512_bf16::kTiles<kDot>, 2, 192, 256},
    {kAmxTiles, amx::kRows, amx::kTiles, 2, 256, 512}};

inline const Path& path_of(int isa, bool is_bf16) {
  return is_bf16 ? kBf16Paths[isa] : kFp32Paths[std::min<int>(isa, kAvx512)];
}
