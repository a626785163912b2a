// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// How the two sides of a product lie in the tiles' memory. A unit is one 32-bit word of a row: one fp32 number, or two
// bf16 numbers that follow each other in k, the first in the low half.
//
// Right side, the same for every instruction set: [panel of kColumns columns][leaf][unit][column], each leaf's units
// filled up with zeros to a multiple of kAlign.

constexpr int64_t kColumns = 16;
constexpr int64_t kAlign = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// K as leaves and units.
struct Depth {
  Depth(int64_t k, bool is_bf16)
      : k(k), per_unit(is_bf16 ? 2 : 1), leaf(ceil_div(k, kLeaves)),
        units(ceil_div(ceil_div(leaf, per_unit), kAlign) * kAlign) {}
  int64_t k, per_unit;
  int64_t leaf;   // numbers of a leaf; fewer in the last
  int64_t units;  // words of a leaf, with the zeros
  int64_t panel() const { return kLeaves * units * kColumns; }
  int64_t leaf_size(int64_t i) const { return std::max<int64_t>(0, std::min(leaf, k - i * leaf)); }
};

inline float widen(float x) { return x; }

inline float widen(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline void narrow(float x, float* y) { *y = x; }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void narrow(float x, uint16_t* y) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  *y = (u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
}

inline uint32_t word(const float* p, int64_t, int64_t) {
  uint32_t w;
  std::memcpy(&w, p, sizeof w);
  return w;
}

inline uint32_t word(const uint16_t* p, int64_t stride, int64_t left) {
  return p[0] | (left > 1 ? (uint32_t)p[stride] << 16 : 0);
}

// rows[r][u] of 4 rows -> out[u][r] for 4 units
inline void transpose_4x4(const void* const (&rows)[4], uint32_t* out, int64_t out_stride) {
  typedef uint32_t V __attribute__((vector_size(16)));
  V r[4];
  for (int i = 0; i < 4; i++) std::memcpy(&r[i], rows[i], sizeof(V));
  const V a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5), b = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
  const V c = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7), d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
  const V columns[4] = {
      __builtin_shufflevector(a, b, 0, 1, 4, 5), __builtin_shufflevector(a, b, 2, 3, 6, 7),
      __builtin_shufflevector(c, d, 0, 1, 4, 5), __builtin_shufflevector(c, d, 2, 3, 6, 7)};
  for (int i = 0; i < 4; i++) std::memcpy(out + i * out_stride, &columns[i], sizeof(V));
}

// `size` numbers in k of some columns -> out[unit][column], `width` words a unit; zeros up to `units`.
template <class T>
void pack(
    const T* w, int64_t k_stride, int64_t n_stride, int64_t size, int64_t columns, int64_t units, uint32_t* out,
    int64_t width) {
  constexpr int64_t per_unit = 4 / sizeof(T);
  constexpr int64_t line = 16;  // units: rows far apart share a place in the first cache, so a line is used up at once
  const int64_t whole = k_stride == 1 ? size / per_unit / 4 * 4 : 0;
  const int64_t fours = whole ? columns / 4 * 4 : 0;
  for (int64_t begin = 0; begin < whole; begin += line) {
    for (int64_t c = 0; c < fours; c += 4) {
      for (int64_t u = begin; u < std::min(whole, begin + line); u += 4) {
        const T* p = w + c * n_stride + u * per_unit;
        transpose_4x4({p, p + n_stride, p + 2 * n_stride, p + 3 * n_stride}, out + u * width + c, width);
      }
    }
  }
  for (int64_t u = 0; u < units; u++) {
    const int64_t left = size - u * per_unit;
    const T* row = w + u * per_unit * k_stride;
    for (int64_t c = u < whole ? fours : 0; c < columns; c++)
      out[u * width + c] = left > 0 ? word(row + c * n_stride, k_stride, left) : 0;
  }
}

// Columns [begin, end) of the packed right side from w, whose first column is `offset` there.
template <class T>
void pack_columns(
    const Depth& depth, const T* w, int64_t k_stride, int64_t n_stride, int64_t begin, int64_t end, uint32_t* packed) {
  for (int64_t n = begin; n < end;) {
    const int64_t columns = std::min(end, (n / kColumns + 1) * kColumns) - n;
    uint32_t* panel = packed + n / kColumns * depth.panel() + n % kColumns;
    for (int64_t leaf = 0; leaf < kLeaves; leaf++) {
      const T* from = w + (n - begin) * n_stride + leaf * depth.leaf * k_stride;
      uint32_t* to = panel + leaf * depth.units * kColumns;
      pack(from, k_stride, n_stride, depth.leaf_size(leaf), columns, depth.units, to, kColumns);
    }
    n += columns;
  }
}
