// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// out = alpha * (x @ w) + beta * bias, in fp32 and bf16, whose rows have the same bits whatever else is computed.
//
// The order of sums. The K products of an element are cut into kLeaves leaves of as many numbers; each leaf is summed
// in fp32 from zero, in the order of its path; the leaves' sums are added in pairs, neighbours first (a binary tree).
// The path is a function of the dtype and of the CPU's instruction set:
//   fp32                        one fused multiply-add after another over k          (AVX2 and AVX-512: the same bits)
//   bf16, AVX2 and AVX-512      the same; a bf16 number is exact in fp32
//   bf16, AVX-512 with bf16     vdpbf16ps after vdpbf16ps over pairs of k
//   bf16, AMX                   tdpbf16ps after tdpbf16ps over 32 of k
// Nothing else enters: rows, columns and threads only decide which elements share a register block, and what is cut for
// the caches keeps its fp32 sums. A result is rounded once, after alpha, beta and bias.

constexpr int64_t kLeaves = 1;
static_assert((kLeaves & (kLeaves - 1)) == 0, "a binary tree");
constexpr int64_t kPlanes = __builtin_ctzll(kLeaves) + 1;  // sums of leaves that wait for their neighbour, at most

#include "linear_pack.h"
#include "linear_isa.h"

constexpr int64_t kFewTiles = 2;            // up to so many tiles of rows, whole sums at once: w is read as a stream
constexpr int64_t kAhead = 1024;            // words of that stream on their way: 4 KiB
constexpr int64_t kFewPanels = 4;           // panels at a time with few rows,
constexpr int64_t kManyPanels = 32;         // and with many
constexpr int64_t kWorkOfThread = 1 << 16;  // multiplications that are worth a thread

struct Product {
  int64_t m, n, k;
  const void* x;
  int64_t x_stride;            // of rows; k lies side by side
  const void* w;               // as it lies; or
  int64_t w_k, w_n;            // its strides
  const uint32_t* packed;      // packed by pack_columns
  void* out;
  int64_t out_stride;
  const void* bias = nullptr;  // [m, n] of this row stride
  int64_t bias_stride = 0;
  float alpha = 1, beta = 1;
};

// Memory that a thread keeps for its next product.
template <int kind>
uint32_t* scratch(int64_t words) {
  constexpr int64_t kLine = 64;
  thread_local std::vector<char> buffer;
  if ((int64_t)buffer.size() < 4 * words + kLine) buffer.resize(4 * words + kLine);
  return reinterpret_cast<uint32_t*>(((uintptr_t)buffer.data() + kLine - 1) / kLine * kLine);
}

// One thread's part of a product.
template <class T>
class Part {
 public:
  Part(const Product& p, int isa) : p(p), path(path_of(isa, sizeof(T) == 2)), depth(p.k, sizeof(T) == 2), isa(isa) {}

  // Rows [m0, m1) of panels [p0, p1).
  void compute(int64_t m0, int64_t m1, int64_t p0, int64_t p1) {
    few = ceil_div(m1 - m0, path.tile_rows) <= kFewTiles;
    group = few ? kFewPanels : path.panels;
    cut(few ? depth.units : path.units);
    const int64_t blocks = ceil_div(m1 - m0, path.rows);
    const int64_t panels = few ? kFewPanels : kManyPanels;
    for (int64_t q = p0; q < p1; q += panels) {
      const int64_t end = std::min(p1, q + panels);
      const uint32_t* w = p.packed ? p.packed + q * depth.panel() : pack_panels(q, end);
      for (int64_t b = 0; b < blocks; b++)
        block({m0 + (m1 - m0) * b / blocks, m0 + (m1 - m0) * (b + 1) / blocks}, q, end, w);
    }
  }

 private:
  struct Rows {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
  };

  const uint32_t* pack_panels(int64_t q, int64_t end) {
    uint32_t* w = scratch<0>((end - q) * depth.panel());
    const int64_t n0 = q * kColumns, n1 = std::min(p.n, end * kColumns);
    pack_columns(depth, (const T*)p.w + n0 * p.w_n, p.w_k, p.w_n, 0, n1 - n0, w);
    return w;
  }

  // A part of K that is summed at a time: some units of a leaf.
  struct Slice {
    int64_t leaf, unit;  // of that leaf, the first
    int64_t k, size;     // numbers
    int64_t units;       // that a tile takes: AMX takes the zeros too
    bool first, last;    // of its leaf
  };

  void cut(int64_t units) {
    most_units = std::min(units, depth.units);
    slices.clear();
    for (int64_t leaf = 0; leaf < kLeaves; leaf++) {
      for (int64_t u = 0; u < depth.units; u += units) {
        const int64_t begin = u * depth.per_unit;
        const int64_t size = std::clamp<int64_t>(depth.leaf_size(leaf) - begin, 0, units * depth.per_unit);
        const int64_t taken =
            path.mode == kAmxTiles ? std::min(units, depth.units - u) : ceil_div(size, depth.per_unit);
        slices.push_back({leaf, u, leaf * depth.leaf + begin, size, taken, u == 0, u + units >= depth.units});
      }
    }
  }

  // Some rows of panels [q, end), which lie at w.
  void block(Rows rows, int64_t q, int64_t end, const uint32_t* w) {
    const int64_t tiles = ceil_div(rows.count(), path.tile_rows);
    auto rows_of = [&](int64_t tile) {
      return Rows{rows.begin + rows.count() * tile / tiles, rows.begin + rows.count() * (tile + 1) / tiles};
    };
    // Tiles whose sums are whole at once all take the same place, and are rounded from the first cache.
    const bool at_once = slices.size() == 1;
    const int64_t ldc = (at_once ? group : end - q) * kColumns;
    const int64_t plane = (at_once ? 1 : tiles) * path.tile_rows * ldc;  // one for each sum that waits
    float* sums = reinterpret_cast<float*>(scratch<1>(plane * kPlanes));
    const int64_t x_tile = path.tile_rows * most_units * (path.mode == kPairs ? 2 : 1);
    uint32_t* x = scratch<2>(tiles * x_tile);
    for (const Slice& s : slices) {
      for (int64_t t = 0; t < tiles; t++) pack_rows(rows_of(t), s, x + t * x_tile);
      float* leaf_sums = sums + __builtin_popcountll(s.leaf) * plane;
      for (int64_t g = q; g < end; g += group) {
        const int64_t panels = std::min(group, end - g);
        const Panels right = panels_of(w + (g - q) * depth.panel(), panels, s);
        for (int64_t t = 0; t < tiles; t++) {
          const Rows r = rows_of(t);
          const int64_t place = at_once ? 0 : t * path.tile_rows * ldc + (g - q) * kColumns;
          float* c = leaf_sums + place;
          right.tiles[r.count()](x + t * x_tile, right.w, right.stride, panels, right.units, c, ldc, s.first,
              few ? kAhead : 0);
          if (!s.last) continue;
          add_leaves(s.leaf, c, plane, r.count(), panels * kColumns, ldc);
          if (s.leaf == kLeaves - 1) finish(sums + place, ldc, r, g * kColumns, panels * kColumns);
        }
      }
    }
  }

  void pack_rows(Rows rows, const Slice& s, uint32_t* x) {
    const T* from = (const T*)p.x + rows.begin * p.x_stride + s.k;
    if (path.mode == kAmxTiles) {
      for (int64_t r = 0; r < ceil_div(rows.count(), 16) * 16; r++) {
        const int64_t size = r < rows.count() ? s.size : 0, whole = size / (kAlign * 2) * kAlign;
        const T* row = from + r * p.x_stride;
        uint32_t* to = x + r / 16 * 16 * s.units + r % 16 * kAlign;
        int64_t u = 0;
        for (; u < whole; u += kAlign) std::memcpy(to + u * 16, row + u * 2, kAlign * 4);
        for (; u < s.units; u += kAlign) {
          T rest[kAlign * 4 / sizeof(T)] = {};
          std::copy(row + std::min(size, u * 2), row + std::min(size, (u + kAlign) * 2), rest);
          std::memcpy(to + u * 16, rest, kAlign * 4);
        }
      }
    } else if (path.mode == kPairs) {
      const int64_t count = rows.count();
      float* to = reinterpret_cast<float*>(x);
      for (int64_t r = 0; r < count; r++) {
        for (int64_t k = 0; k < s.size; k++) to[k * count + r] = widen(from[r * p.x_stride + k]);
        if (s.size % 2) to[s.size * count + r] = 0;
      }
    } else {
      pack(from, 1, p.x_stride, s.size, rows.count(), s.units, x, rows.count());
    }
  }

  struct Panels {
    const uint32_t* w;
    int64_t stride, units;
    const Tile* tiles;
  };

  // What tiles read: w as it is packed, or, for many rows, bf16 made fp32 once for all of them.
  Panels panels_of(const uint32_t* w, int64_t panels, const Slice& s) {
    w += (s.leaf * depth.units + s.unit) * kColumns;
    if (path.mode != kPairs || few) return {w, depth.panel(), s.units, path.tiles};
    const int64_t stride = 2 * s.units * kColumns;
    uint32_t* wide = scratch<3>(panels * stride);
    for (int64_t panel = 0; panel < panels; panel++) {
      for (int64_t u = 0; u < s.units; u++) {
        const uint32_t* pairs = w + panel * depth.panel() + u * kColumns;
        uint32_t* to = wide + panel * stride + 2 * u * kColumns;
#pragma omp simd
        for (int64_t c = 0; c < kColumns; c++) to[c] = pairs[c] << 16;
#pragma omp simd
        for (int64_t c = 0; c < kColumns; c++) to[kColumns + c] = pairs[c] & 0xffff0000u;
      }
    }
    return {wide, stride, 2 * s.units, path_of(isa, false).tiles};
  }

  // After `leaf`, whose sums are the last plane: adds the last two planes while they are sums of as many leaves.
  static void add_leaves(int64_t leaf, float* sum, int64_t plane, int64_t rows, int64_t columns, int64_t ldc) {
    for (; leaf & 1; leaf >>= 1, sum -= plane) {
      for (int64_t r = 0; r < rows; r++)
        for (int64_t c = 0; c < columns; c++) sum[r * ldc + c - plane] += sum[r * ldc + c];
    }
  }

  void finish(const float* sum, int64_t ldc, Rows rows, int64_t n, int64_t columns) {
    columns = std::min(columns, p.n - n);
    if (sizeof(T) == 2 && isa >= kAvx512Bf16 && !p.bias && p.alpha == 1 && columns % kColumns == 0) {
      for (int64_t m = rows.begin; m < rows.end; m++, sum += ldc)
        avx512_bf16::narrow_row(sum, (uint16_t*)p.out + m * p.out_stride + n, columns);
      return;
    }
    for (int64_t m = rows.begin; m < rows.end; m++, sum += ldc) {
      T* out = (T*)p.out + m * p.out_stride + n;
      if (p.bias) {
        const T* bias = (const T*)p.bias + m * p.bias_stride + n;
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) narrow(p.alpha * sum[c] + p.beta * widen(bias[c]), out + c);
      } else {
#pragma omp simd
        for (int64_t c = 0; c < columns; c++) narrow(p.alpha * sum[c], out + c);
      }
    }
  }

  const Product& p;
  const Path& path;
  const Depth depth;
  const int isa;
  bool few;
  int64_t group, most_units;
  std::vector<Slice> slices;
};

// How many parts rows and panels are cut into: the largest part's time, with its share of packing, decides.
inline std::pair<int64_t, int64_t> grid(const Product& p, int64_t threads) {
  constexpr int64_t kPackRows = 16, kPackColumns = 16;  // of one number, in multiplications
  std::pair<int64_t, int64_t> best;
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t by_rows = 1; by_rows <= threads; by_rows++) {
    const int64_t rows = ceil_div(p.m, by_rows);
    const int64_t columns = ceil_div(ceil_div(p.n, kColumns), threads / by_rows) * kColumns;
    const int64_t time = (rows + kPackColumns) * (columns + kPackRows);
    if (time < least) least = time, best = {by_rows, threads / by_rows};
  }
  return best;
}

template <class T>
void multiply(const Product& p, int isa) {
  const int64_t available = at::in_parallel_region() ? 1 : at::get_num_threads();
  const auto [by_rows, by_panels] = grid(p, std::min<int64_t>(available, 1 + p.m * p.n * p.k / kWorkOfThread));
  const int64_t panels = ceil_div(p.n, kColumns);
  at::parallel_for(0, by_rows * by_panels, 1, [&, by_rows = by_rows, by_panels = by_panels](int64_t i, int64_t end) {
    if (isa == kAmx && sizeof(T) == 2) amx::enter();
    for (; i < end; i++) {
      const int64_t r = i / by_panels, q = i % by_panels;
      Part<T>(p, isa).compute(
          p.m * r / by_rows, p.m * (r + 1) / by_rows, panels * q / by_panels, panels * (q + 1) / by_panels);
    }
    if (isa == kAmx && sizeof(T) == 2) amx::leave();
  });
}
