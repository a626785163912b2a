// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// The tiles of one instruction set: included once for each, within its namespace and its target, with RL_LANES set.
//
// A tile is R rows by some panels of kColumns columns. Every element of it is a chain of its own over k, in a vector
// lane of its own, so that R, the panels and kLanes change nothing:
//   kFma    s = fma(x[k], w[k], s)
//   kPairs  the same over pairs of bf16, each exact in fp32: k, then k + 1
//   kDot    s = dpbf16(s, x[k..k+1], w[k..k+1])

constexpr int kLanes = RL_LANES;
constexpr int kVectors = kColumns / kLanes;                         // of a panel
constexpr int kRows = kLanes == 16 ? 12 : 6;                        // most rows of a tile
constexpr int kAccumulators = kRows * 2;                            // what the registers hold beside operands

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));

template <class V, class T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if RL_LANES == 16
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#endif
}

inline Vec splat(uint32_t word) { return (Vec)(UVec{} + word); }

// One unit of R rows: s[r][v] takes in x[r] * w[v].
template <Mode mode, int R, int V>
inline void step(Vec (&s)[R][V], const uint32_t* x, const UVec (&w)[V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
    const Vec a = splat(x[r]);
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
#ifdef RL_DOT
      if constexpr (mode == kDot) {
        s[r][v] = (Vec)_mm512_dpbf16_ps((__m512)s[r][v], (__m512bh)a, (__m512bh)w[v]);
        continue;
      }
#endif
      s[r][v] = fma(a, (Vec)w[v], s[r][v]);
    }
  }
}

// x: [units][R] words, twice as many for kPairs (k, then k + 1, as fp32); w: the first panel of P.
template <Mode mode, int R, int P>
void block(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t units, float* c, int64_t ldc, bool first,
    int64_t ahead) {
  constexpr int V = P * kVectors;
  Vec s[R][V];
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) s[r][v] = first ? Vec{} : load<Vec>(c + r * ldc + v * kLanes);
  }
  for (int64_t u = 0; u < units; u++, w += kColumns) {
    UVec words[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) words[v] = load<UVec>(w + v / kVectors * panel + v % kVectors * kLanes);
    if (ahead)
      for (int p = 0; p < P; p++) _mm_prefetch(w + p * panel + ahead, _MM_HINT_T0);
    if constexpr (mode == kPairs) {
      UVec halves[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) halves[v] = words[v] << 16;
      step<kFma, R, V>(s, x, halves);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) halves[v] = words[v] & 0xffff0000u;
      step<kFma, R, V>(s, x + R, halves);
      x += 2 * R;
    } else {
      step<mode, R, V>(s, x, words);
      x += R;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) std::memcpy(c + r * ldc + v * kLanes, &s[r][v], sizeof(Vec));
  }
}

template <Mode mode, int R>
void tile(
    const uint32_t* x, const uint32_t* w, int64_t panel, int64_t panels, int64_t units, float* c, int64_t ldc,
    bool first, int64_t ahead) {
  constexpr int P = std::clamp(kAccumulators / (R * kVectors), 1, 4);
  int64_t p = 0;
  for (; p + P <= panels; p += P) 
    block<mode, R, P>(x, w + p * panel, panel, units, c + p * kColumns, ldc, first, ahead);
  for (; p < panels; p++) block<mode, R, 1>(x, w + p * panel, panel, units, c + p * kColumns, ldc, first, ahead);
}

#ifdef RL_DOT
// Rounds `count` sums, a multiple of 16, to bf16 as narrow() does, by the CPU's own instruction. That takes numbers
// below the normal ones for zero: they are left to narrow().
inline void narrow_row(const float* sum, uint16_t* out, int64_t count) {
  const __m512i one = _mm512_set1_epi32(1), most = _mm512_set1_epi32(0x7fffff);
  for (int64_t c = 0; c < count; c += 16) {
    const __m512 s = _mm512_loadu_ps(sum + c);
    const __m512i magnitude = _mm512_and_epi32(_mm512_castps_si512(s), _mm512_set1_epi32(0x7fffffff));
    if (_mm512_cmplt_epu32_mask(_mm512_sub_epi32(magnitude, one), most)) {
      for (int64_t i = c; i < c + 16; i++) narrow(sum[i], out + i);
    } else {
      const __m256i bits = (__m256i)_mm512_cvtneps_pbh(s);
      std::memcpy(out + c, &bits, sizeof bits);
    }
  }
}
#endif

// By the number of rows, from 1 on. Constants: code of this target must not run before the CPU was asked.
template <Mode mode, class>
struct Table;
template <Mode mode, int... I>
struct Table<mode, std::integer_sequence<int, I...>> {
  static constexpr Tile tiles[] = {nullptr, tile<mode, I + 1>...};
};
template <Mode mode>
constexpr const Tile* kTiles = Table<mode, std::make_integer_sequence<int, kRows>>::tiles;
