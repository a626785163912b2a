// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Causal attention on a CPU whose bits depend on the row alone.
//
// A row is one query token of one head. What it computes is fixed by its query, and by the keys and values at
// positions 0..p of its sequence: keys are taken in tiles of kTile at absolute positions, and for each tile
//   score[j] = sum over d of q[d] * k[j][d]      one FMA after another over d; keys are vector lanes
//   m, l, o  = online softmax, base 2, fp32      (Milakov and Gimelshein, arXiv:1805.02867)
//   o[d]    += p[j] * v[j][d]                    one FMA after another over j; d are vector lanes
// Each lane is a chain of its own, so how many rows or lanes share a register block, which thread runs it, and where
// the keys lie in memory change nothing. A paged decode, a chunk of a prefill and a packed training batch all call
// attend() below. Keys beyond a row are masked by a select, so that what an unused cache slot holds never enters.
//
// Plain C ABI, no torch headers: compiles in seconds, called through ctypes.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kCols = 4;  // vectors a register block is wide: kRows * kCols accumulators fit the register file
#else
constexpr int kLanes = 8;
constexpr int kCols = 2;
#endif
constexpr int kRows = 6;                   // rows of a register block
constexpr int kTile = 64;                  // keys a softmax step takes
constexpr int kSub = 32;                   // keys that lie side by side in memory: K is stored as [.., D, kSub]
constexpr int kTileVecs = kTile / kLanes;
constexpr int kTaskRows = 96;              // rows (query tokens x heads of the group) of one task
constexpr int kWidenRows = 2 * kRows;      // above this many rows a bf16 tile is converted once for all
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2e = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IVec __attribute__((vector_size(kLanes * 4)));
typedef uint32_t UVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t HVec __attribute__((vector_size(kLanes * 2)));

struct bf16 {
  uint16_t bits;
};

inline Vec splat(float x) { return Vec{} + x; }

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const bf16* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(bf16* p, Vec v) {
  UVec u = (UVec)v;
  UVec rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  UVec bits = v == v ? rounded : UVec{} + 0x7fc0;
  HVec h = __builtin_convertvector(bits, HVec);
  std::memcpy(p, &h, sizeof h);
}

inline Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;  // built with -ffp-contract=off: two roundings, everywhere
#endif
}

inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }

inline float reduce_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = std::max(best, v[i]);
  return best;
#endif
}

inline float reduce_sum(Vec v) {
  float sum = v[0];
  for (int i = 1; i < kLanes; i++) sum += v[i];
  return sum;
}

// 2^x for x <= 0 (a rounding error above is fine), 0 below the normal range. Polynomial: least-squares fit, reweighted
// towards minimax, of 2^r on [-1/2, 1/2]; relative error 2e-9 before rounding. exp2(0) is exactly 1.
inline Vec exp2v(Vec x) {
  const Vec shift = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x + shift) - shift;
  Vec r = x - n;
  Vec y = splat(0.00015353360504377633f);
  y = fma(y, r, splat(0.0013398875016719103f));
  y = fma(y, r, splat(0.00961843691766262f));
  y = fma(y, r, splat(0.055503323674201965f));
  y = fma(y, r, splat(0.24022647738456726f));
  y = fma(y, r, splat(0.6931471824645996f));
  y = fma(y, r, splat(1.f));
  IVec exponent = (__builtin_convertvector(n, IVec) + 127) << 23;
  return x < splat(-126.f) ? Vec{} : y * (Vec)exponent;
}

inline IVec lane_index() {
  IVec v{};
  for (int i = 0; i < kLanes; i++) v[i] = i;
  return v;
}

// A 64-byte aligned buffer that grows and is kept for the thread's next call.
class Scratch {
 public:
  void reserve(int64_t bytes) {
    bytes += kAlign;
    if ((int64_t)buffer_.size() < bytes) buffer_.resize(bytes);
    next_ = buffer_.data() + (kAlign - (uintptr_t)buffer_.data() % kAlign) % kAlign;
  }
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(next_);
    next_ += size<T>(n);
    return p;
  }
  template <class T>
  static int64_t size(int64_t n) {
    return (n * (int64_t)sizeof(T) + kAlign - 1) / kAlign * kAlign;
  }

 private:
  static constexpr int64_t kAlign = 64;
  std::vector<char> buffer_;
  char* next_ = nullptr;
};

// ---- register blocks -----------------------------------------------------------------------------------------------

// s[r][c] = sum over d of q[r][d] * k[d][c], for R rows and V vectors of keys.
template <class T, int R, int V>
void dot_block(const float* q, int64_t d_size, const T* const* k, float* s) {
  Vec acc[R][V] = {};
  for (int64_t d = 0; d < d_size; d++) {
    Vec kv[V];
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) kv[c] = load(k[c] + d * kSub);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec x = splat(q[r * d_size + d]);
#pragma GCC unroll 8
      for (int c = 0; c < V; c++) acc[r][c] = fma(x, kv[c], acc[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int c = 0; c < V; c++) store(s + r * kTile + c * kLanes, acc[r][c]);
}

// c[r] += sum over j < n of a[r * a_row + j * a_col] * b[j], for R rows and V vectors of columns.
template <class T, int R, int V>
void axpy_block(const float* a, int64_t a_row, int64_t a_col, const T* b, int64_t b_row, int64_t n, float* c,
                int64_t c_row) {
  Vec acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) acc[r][v] = load(c + r * c_row + v * kLanes);
  for (int64_t j = 0; j < n; j++) {
    Vec bv[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) bv[v] = load(b + j * b_row + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const Vec x = splat(a[r * a_row + j * a_col]);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[r][v] = fma(x, bv[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) store(c + r * c_row + v * kLanes, acc[r][v]);
}

// Calls f(std::integral_constant<R>, std::integral_constant<V>) for rows R <= kRows and vectors V <= kCols.
template <int N>
struct Int {
  static constexpr int value = N;
};

template <int Max, class F>
inline void with_size(int n, F&& f) {
  if constexpr (Max > 1) {
    if (n < Max) return with_size<Max - 1>(n, f);
  }
  f(Int<Max>{});
}

// Splits rows into even blocks of at most kRows.
template <class F>
inline void for_row_blocks(int rows, F&& f) {
  const int blocks = (rows + kRows - 1) / kRows;
  for (int b = 0; b < blocks; b++) {
    const int r0 = (int64_t)rows * b / blocks;
    const int r1 = (int64_t)rows * (b + 1) / blocks;
    f(r0, r1 - r0);
  }
}

// s[r][0..n) of every row against n keys: k0 and k1 are the tile's two runs of kSub keys, each [D, kSub].
template <class T>
void scores(const float* q, int rows, int64_t d_size, const T* k0, const T* k1, int n, float* s) {
  const T* k[kTileVecs];
  for (int c = 0; c < kTileVecs; c++) {
    const int key = c * kLanes;
    k[c] = key < kSub ? k0 + key : k1 + (key - kSub);
  }
  const int vecs = (n + kLanes - 1) / kLanes;
  for_row_blocks(rows, [&](int r0, int count) {
    for (int c = 0; c < vecs; c += kCols) {
      with_size<kRows>(count, [&](auto r) {
        with_size<kCols>(std::min(kCols, vecs - c), [&](auto v) {
          dot_block<T, decltype(r)::value, decltype(v)::value>(q + r0 * d_size, d_size, k + c,
                                                               s + r0 * kTile + c * kLanes);
        });
      });
    }
  });
}

// c[r] += sum over j < n of a[r, j] * b[j], D columns.
template <class T>
void axpy(const float* a, int64_t a_row, int64_t a_col, int rows, const T* b, int64_t b_row, int64_t n, float* c,
          int64_t d_size) {
  const int vecs = d_size / kLanes;
  for_row_blocks(rows, [&](int r0, int count) {
    for (int v0 = 0; v0 < vecs; v0 += kCols) {
      with_size<kRows>(count, [&](auto r) {
        with_size<kCols>(std::min(kCols, vecs - v0), [&](auto v) {
          axpy_block<T, decltype(r)::value, decltype(v)::value>(a + r0 * a_row, a_row, a_col, b + v0 * kLanes, b_row,
                                                                n, c + r0 * d_size + v0 * kLanes, d_size);
        });
      });
    }
  });
}

// ---- one sequence, one key/value head ------------------------------------------------------------------------------

// Where the keys lie, in runs of kSub. Packed keys are one block that has no end.
template <class T>
struct Keys {
  const T* k;               // run i of a block: k + i * D * kSub, as [D, kSub]
  const T* v;               // key j of a block: v + j * v_row
  int64_t v_row;
  int64_t k_run;            // D * kSub
  const int32_t* table;     // block numbers of the sequence
  int64_t block_stride;     // elements from block to block
  int runs;                 // runs of kSub keys in a block

  const T* key_run(int i) const { return k + table[i / runs] * block_stride + (i % runs) * k_run; }
  const T* value_run(int i) const { return v + table[i / runs] * block_stride + (i % runs) * kSub * v_row; }
};

const int32_t kOneBlock[1] = {0};

// State of `rows` rows: row r is head r % group of the token at position first + r / group.
struct Rows {
  float* q;  // [rows, D], times scale * log2(e)
  float* o;  // [rows, D]
  float* s;  // [rows, kTile]
  Vec* l;    // [rows], lane-wise sums of the probabilities
  float* m;  // [rows], running maxima, base 2
  float* wide;  // room for a tile of keys and values in fp32
  int rows;
  int group;
  int first;

  int visible(int r) const { return first + r / group + 1; }
  // First row that sees a key of the tile at `start`.
  int first_row(int start) const { return std::max(0, start - first) * group; }
};

void mask_row(float* s, int n, int vecs) {
  const IVec lane = lane_index();
  for (int c = n / kLanes; c < vecs; c++)
    store(s + c * kLanes, lane + c * kLanes < n ? load(s + c * kLanes) : splat(-kInfinity));
}

// Turns a row's scores into probabilities relative to its running maximum; rescales l and o when that moves.
void softmax_row(float* s, int vecs, Vec& l, float& m, float* o, int64_t d_size) {
  Vec top = load(s);
  for (int c = 1; c < vecs; c++) top = vmax(top, load(s + c * kLanes));
  const float m_new = std::max(m, reduce_max(top));
  if (m_new != m) {
    const Vec alpha = exp2v(splat(m - m_new));
    l *= alpha;
    for (int64_t d = 0; d < d_size; d += kLanes) store(o + d, load(o + d) * alpha);
    m = m_new;
  }
  for (int c = 0; c < vecs; c++) {
    const Vec p = exp2v(load(s + c * kLanes) - m);
    store(s + c * kLanes, p);
    l += p;
  }
}

void widen(const bf16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; i += kLanes) store(to + i, load(from + i));
}

// One tile of n keys: scores, softmax, values, for rows r0 and on. v0 and v1 are the tile's two runs of values.
template <class T>
void attend_tile(const Rows& x, int start, int n, const T* k0, const T* k1, const T* v0, const T* v1, int64_t v_row,
                 int64_t d_size) {
  const int vecs = (n + kLanes - 1) / kLanes;
  const int r0 = x.first_row(start);
  scores(x.q + r0 * d_size, x.rows - r0, d_size, k0, k1, n, x.s + r0 * kTile);
  for (int r = r0; r < x.rows; r++) {
    const int seen = x.visible(r) - start;
    if (seen < vecs * kLanes) mask_row(x.s + r * kTile, seen, vecs);
    softmax_row(x.s + r * kTile, vecs, x.l[r], x.m[r], x.o + r * d_size, d_size);
  }
  const int n0 = n <= kSub || v1 == v0 + kSub * v_row ? n : kSub;
  const float* p = x.s + r0 * kTile;
  axpy(p, kTile, 1, x.rows - r0, v0, v_row, n0, x.o + r0 * d_size, d_size);
  if (n0 < n) axpy(p + n0, kTile, 1, x.rows - r0, v1, v_row, n - n0, x.o + r0 * d_size, d_size);
}

// The same over a copy of the tile in fp32: many rows then share the conversion. Same bits.
void attend_widened(const Rows& x, int start, int n, const bf16* k0, const bf16* k1, const bf16* v0, const bf16* v1,
                    int64_t v_row, int64_t d_size) {
  const int64_t run = kSub * d_size;
  widen(k0, run, x.wide);
  if (n > kSub) widen(k1, run, x.wide + run);
  float* v = x.wide + 2 * run;
  for (int j = 0; j < n; j++) widen(j < kSub ? v0 + j * v_row : v1 + (j - kSub) * v_row, d_size, v + j * d_size);
  attend_tile(x, start, n, x.wide, x.wide + run, v, v + run, d_size, d_size);
}

template <class T>
void ask_for(const T* p, int64_t n) {
  constexpr int64_t kLine = 64 / sizeof(T);
  for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(p + i);
}

// Asks the caches for the runs of the tile that begins with `run`, whose keys end with `last`.
template <class T>
void ask_for_tile(const Keys<T>& keys, int run, int last, int64_t d_size) {
  for (int i = run; i <= std::min(run + kTile / kSub - 1, last); i++) {
    ask_for(keys.key_run(i), kSub * d_size);
    const T* v = keys.value_run(i);
    for (int j = 0; j < kSub; j++) ask_for(v + j * keys.v_row, d_size);
  }
}

template <class T>
void attend(const Rows& x, const Keys<T>& keys, int64_t d_size) {
  std::fill(x.o, x.o + x.rows * d_size, 0.f);
  std::fill(x.l, x.l + x.rows, Vec{});
  std::fill(x.m, x.m + x.rows, -kInfinity);
  const int end = x.visible(x.rows - 1);
  for (int start = 0; start < end; start += kTile) {
    const int n = std::min(kTile, end - start);
    const int run = start / kSub;
    const int next = n > kSub ? run + 1 : run;  // the second run may not be there
    const T *k0 = keys.key_run(run), *k1 = keys.key_run(next);
    const T *v0 = keys.value_run(run), *v1 = keys.value_run(next);
    // A decode reads its keys once, from far away.
    if (x.rows <= kWidenRows && start + kTile < end) ask_for_tile(keys, run + kTile / kSub, (end - 1) / kSub, d_size);
    if constexpr (std::is_same_v<T, bf16>) {
      if (x.rows > kWidenRows) {
        attend_widened(x, start, n, k0, k1, v0, v1, keys.v_row, d_size);
        continue;
      }
    }
    attend_tile(x, start, n, k0, k1, v0, v1, keys.v_row, d_size);
  }
}

template <class T>
void load_scaled(const T* from, float factor, float* to, int64_t d_size) {
  for (int64_t d = 0; d < d_size; d += kLanes) store(to + d, load(from + d) * factor);
}

// ---- the batch -----------------------------------------------------------------------------------------------------

// A tensor [tokens, heads, D] whose last dimension is dense.
template <class T>
struct Heads {
  T* data;
  int64_t token;
  int64_t head;
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

struct Task {
  int sequence;
  int token;   // first query token, counted from the sequence's first one in this batch
  int tokens;
};

int64_t work(const Task& t, const int32_t* starts, const int32_t* lengths) {
  const int context = lengths[t.sequence] - (starts[t.sequence + 1] - starts[t.sequence]);
  return (int64_t)t.tokens * (context + t.token + t.tokens);
}

// Query tokens of all sequences in blocks of kTaskRows rows, the costly ones first. lengths[s] counts the keys of
// sequence s, of which its last starts[s + 1] - starts[s] ones are this batch's.
std::vector<Task> make_tasks(const int32_t* starts, const int32_t* lengths, int sequences, int group) {
  const int step = std::max(1, kTaskRows / group);
  std::vector<Task> tasks;
  for (int s = 0; s < sequences; s++)
    for (int t = 0, n = starts[s + 1] - starts[s]; t < n; t += step)
      tasks.push_back({s, t, std::min(step, n - t)});
  std::stable_sort(tasks.begin(), tasks.end(), [&](const Task& a, const Task& b) {
    return work(a, starts, lengths) > work(b, starts, lengths);
  });
  return tasks;
}

template <class T>
struct Batch {
  Heads<const T> q;
  Heads<T> out;
  float* lse;              // [Hq, tokens], base 2, or null
  const int32_t* starts;   // [sequences + 1]
  const int32_t* lengths;  // [sequences]
  int64_t tokens;
  int group;
  int64_t d_size;
  float scale;
};

thread_local Scratch scratch;

template <class T>
void run_task(const Batch<T>& b, const Task& task, int kv_head, const Keys<T>& keys) {
  const int rows = task.tokens * b.group;
  const int64_t d = b.d_size;
  scratch.reserve(2 * Scratch::size<float>(rows * d) + Scratch::size<float>(rows * kTile) + Scratch::size<Vec>(rows) +
                  Scratch::size<float>(rows) + Scratch::size<float>(2 * kTile * d));
  Rows x;
  x.q = scratch.take<float>(rows * d);
  x.o = scratch.take<float>(rows * d);
  x.s = scratch.take<float>(rows * kTile);
  x.l = scratch.take<Vec>(rows);
  x.m = scratch.take<float>(rows);
  x.wide = scratch.take<float>(2 * kTile * d);
  x.rows = rows;
  x.group = b.group;
  const int32_t start = b.starts[task.sequence];
  x.first = b.lengths[task.sequence] - (b.starts[task.sequence + 1] - start) + task.token;
  const auto token = [&](int r) { return start + task.token + r / b.group; };
  const auto head = [&](int r) { return kv_head * b.group + r % b.group; };
  for (int r = 0; r < rows; r++) load_scaled(b.q.at(token(r), head(r)), b.scale * kLog2e, x.q + r * d, d);
  attend(x, keys, d);
  for (int r = 0; r < rows; r++) {
    const float sum = reduce_sum(x.l[r]);
    T* out = b.out.at(token(r), head(r));
    for (int64_t i = 0; i < d; i += kLanes) store(out + i, load(x.o + r * d + i) / sum);
    if (b.lse) b.lse[head(r) * b.tokens + token(r)] = x.m[r] + std::log2(sum);
  }
}

// Runs a task for each (task, kv head); keys_of(sequence, kv_head) says where its keys lie. Call inside omp parallel.
template <class T, class F>
void run_tasks(const Batch<T>& b, const std::vector<Task>& tasks, int kv_heads, F&& keys_of) {
  const int64_t count = (int64_t)tasks.size() * kv_heads;
#pragma omp for schedule(dynamic, 1)
  for (int64_t i = 0; i < count; i++) {
    const Task& task = tasks[i / kv_heads];
    const int head = i % kv_heads;
    run_task(b, task, head, keys_of(task.sequence, head));
  }
}

// Transposes n keys, token stride `row`, into runs [D, kSub]. Lanes beyond n keep what they held: they are masked.
template <class T>
void pack_keys(const T* from, int64_t row, int n, int64_t d_size, T* to) {
  for (int64_t d = 0; d < d_size; d++)
    for (int j = 0; j < n; j++) to[d * kSub + j] = from[j * row + d];
}

struct PagedCache {
  void* data;
  int64_t block_stride;
  int64_t head_stride;
  int block_size;
};

template <class T>
void write_cache(const PagedCache& c, Heads<const T> key, Heads<const T> value, const int64_t* slots, int64_t tokens,
                 int kv_heads, int64_t d_size) {
  // One thread takes kSub tokens in a row: they mostly fall into one run, whose lines stay in its cache.
  const int64_t chunks = (tokens + kSub - 1) / kSub;
#pragma omp for schedule(static)
  for (int64_t i = 0; i < chunks * kv_heads; i++) {
    const int64_t head = i % kv_heads;
    const int64_t first = i / kv_heads * kSub;
    for (int64_t t = first; t < std::min(tokens, first + kSub); t++) {
      if (slots[t] < 0) continue;
      T* block = static_cast<T*>(c.data) + slots[t] / c.block_size * c.block_stride + head * c.head_stride;
      const int64_t j = slots[t] % c.block_size;
      T* k = block + j / kSub * kSub * d_size + j % kSub;
      const T* from = key.at(t, head);
      for (int64_t d = 0; d < d_size; d++) k[d * kSub] = from[d];
      std::memcpy(block + (c.block_size + j) * d_size, value.at(t, head), d_size * sizeof(T));
    }
  }
}

template <class T>
void paged(const Batch<T>& b, const PagedCache& c, Heads<const T> key, Heads<const T> value, const int64_t* slots,
           const int32_t* table, int64_t table_row, int sequences, int kv_heads, int threads) {
  const std::vector<Task> tasks = make_tasks(b.starts, b.lengths, sequences, b.group);
  const T* data = static_cast<const T*>(c.data);
#pragma omp parallel num_threads(threads)
  {
    write_cache(c, key, value, slots, b.tokens, kv_heads, b.d_size);
    run_tasks(b, tasks, kv_heads, [&](int s, int h) {
      const T* k = data + h * c.head_stride;
      return Keys<T>{k,       k + c.block_size * b.d_size, b.d_size,
                     b.d_size * kSub, table + s * table_row,       c.block_stride,
                     c.block_size / kSub};
    });
  }
}

std::vector<int32_t> differences(const int32_t* starts, int sequences) {
  std::vector<int32_t> n(sequences);
  for (int s = 0; s < sequences; s++) n[s] = starts[s + 1] - starts[s];
  return n;
}

template <class T>
void packed(const Batch<T>& b, Heads<const T> key, Heads<const T> value, T* packed_keys, int sequences, int kv_heads,
            int threads) {
  const std::vector<Task> tasks = make_tasks(b.starts, b.lengths, sequences, b.group);
  // Sequence s begins at run starts[s] / kSub + s of a head: rounding each up to whole runs never overlaps.
  const int64_t head_runs = b.tokens / kSub + sequences;
  const int64_t run_size = b.d_size * kSub;
  const auto first_run = [&](int s, int h) { return h * head_runs + b.starts[s] / kSub + s; };
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 1)
    for (int i = 0; i < sequences * kv_heads; i++) {
      const int s = i / kv_heads, h = i % kv_heads;
      for (int t = 0; t < b.lengths[s]; t += kSub)
        pack_keys(key.at(b.starts[s] + t, h), key.token, std::min(kSub, b.lengths[s] - t), b.d_size,
                  packed_keys + (first_run(s, h) + t / kSub) * run_size);
    }
    run_tasks(b, tasks, kv_heads, [&](int s, int h) {
      return Keys<T>{packed_keys + first_run(s, h) * run_size, value.at(b.starts[s], h), value.token, run_size,
                     kOneBlock, 0, std::numeric_limits<int>::max()};
    });
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <class T>
struct Gradients {
  Heads<const T> out;  // forward's result
  Heads<const T> dout;
  const float* lse;    // [Hq, tokens], base 2
  Heads<T> dq;
  Heads<T> dk;
  Heads<T> dv;
};

// One (sequence, kv head): the probabilities are computed again, tile by tile (FlashAttention-2, arXiv:2307.08691,
// algorithm 2). One thread does all of it, so sums into dk and dv have one order: query blocks, then rows.
template <class T>
void backward_task(const Batch<T>& b, const Gradients<T>& g, Heads<const T> key, Heads<const T> value, int sequence,
                   int kv_head) {
  const int64_t d = b.d_size;
  const int length = b.lengths[sequence];
  const int32_t start = b.starts[sequence];
  const int runs = (length + kSub - 1) / kSub;
  const int step = std::max(1, kTaskRows / b.group);
  const int max_rows = std::min(step, length) * b.group;
  scratch.reserve(2 * Scratch::size<T>(runs * kSub * d) + 2 * Scratch::size<float>(length * d) +
                  3 * Scratch::size<float>(max_rows * d) + 2 * Scratch::size<float>(max_rows * kTile) +
                  2 * Scratch::size<float>(max_rows));
  T* kt = scratch.take<T>(runs * kSub * d);
  T* vt = scratch.take<T>(runs * kSub * d);
  float* dk = scratch.take<float>(length * d);
  float* dv = scratch.take<float>(length * d);
  float* q = scratch.take<float>(max_rows * d);
  float* dout = scratch.take<float>(max_rows * d);
  float* dq = scratch.take<float>(max_rows * d);
  float* p = scratch.take<float>(max_rows * kTile);
  float* ds = scratch.take<float>(max_rows * kTile);
  float* lse = scratch.take<float>(max_rows);
  float* delta = scratch.take<float>(max_rows);

  for (int t = 0; t < length; t += kSub) {
    const int n = std::min(kSub, length - t);
    pack_keys(key.at(start + t, kv_head), key.token, n, d, kt + t * d);
    pack_keys(value.at(start + t, kv_head), value.token, n, d, vt + t * d);
  }
  std::fill(dk, dk + length * d, 0.f);
  std::fill(dv, dv + length * d, 0.f);

  for (int first = 0; first < length; first += step) {
    const int rows = std::min(step, length - first) * b.group;
    const auto token = [&](int r) { return start + first + r / b.group; };
    const auto head = [&](int r) { return kv_head * b.group + r % b.group; };
    for (int r = 0; r < rows; r++) {
      load_scaled(b.q.at(token(r), head(r)), b.scale * kLog2e, q + r * d, d);
      load_scaled(g.dout.at(token(r), head(r)), 1.f, dout + r * d, d);
      const T* out = g.out.at(token(r), head(r));
      Vec sum{};
      for (int64_t i = 0; i < d; i += kLanes) sum = fma(load(out + i), load(dout + r * d + i), sum);
      delta[r] = reduce_sum(sum);
      lse[r] = g.lse[head(r) * b.tokens + token(r)];
    }
    std::fill(dq, dq + rows * d, 0.f);
    const int end = first + rows / b.group;
    for (int tile = 0; tile < end; tile += kTile) {
      const int n = std::min(kTile, end - tile);
      const int vecs = (n + kLanes - 1) / kLanes;
      const int r0 = std::max(0, tile - first) * b.group;
      const int count = rows - r0;
      const int64_t second = n > kSub ? kSub * d : 0;
      scores(q + r0 * d, count, d, kt + tile * d, kt + tile * d + second, n, p + r0 * kTile);
      scores(dout + r0 * d, count, d, vt + tile * d, vt + tile * d + second, n, ds + r0 * kTile);
      for (int r = r0; r < rows; r++) {
        float* pr = p + r * kTile;
        float* dsr = ds + r * kTile;
        const int seen = first + r / b.group + 1 - tile;
        if (seen < vecs * kLanes) {
          mask_row(pr, seen, vecs);
          for (int c = seen; c < vecs * kLanes; c++) dsr[c] = 0.f;
        }
        for (int c = 0; c < vecs; c++) {
          const Vec prob = exp2v(load(pr + c * kLanes) - lse[r]);
          store(pr + c * kLanes, prob);
          store(dsr + c * kLanes, prob * (load(dsr + c * kLanes) - delta[r]));
        }
      }
      axpy(p + r0 * kTile, 1, kTile, n, dout + r0 * d, d, count, dv + tile * d, d);
      axpy(ds + r0 * kTile, 1, kTile, n, q + r0 * d, d, count, dk + tile * d, d);
      axpy(ds + r0 * kTile, kTile, 1, count, key.at(start + tile, kv_head), key.token, n, dq + r0 * d, d);
    }
    for (int r = 0; r < rows; r++)
      for (int64_t i = 0; i < d; i += kLanes)
        store(g.dq.at(token(r), head(r)) + i, load(dq + r * d + i) * b.scale);
  }
  for (int t = 0; t < length; t++)
    for (int64_t i = 0; i < d; i += kLanes) {
      store(g.dk.at(start + t, kv_head) + i, load(dk + t * d + i) * kLn2);  // q holds scale * log2(e)
      store(g.dv.at(start + t, kv_head) + i, load(dv + t * d + i));
    }
}

template <class T>
void backward(const Batch<T>& b, const Gradients<T>& g, Heads<const T> key, Heads<const T> value, int sequences,
              int kv_heads, int threads) {
  std::vector<int> order(sequences);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int x, int y) { return b.lengths[x] > b.lengths[y]; });
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int i = 0; i < sequences * kv_heads; i++)
    backward_task(b, g, key, value, order[i / kv_heads], i % kv_heads);
}

template <class T>
Heads<const T> input(const void* data, int64_t token, int64_t head) {
  return {static_cast<const T*>(data), token, head};
}

template <class T>
Heads<T> dense(void* data, int64_t heads, int64_t d_size) {
  return {static_cast<T*>(data), heads * d_size, d_size};
}

template <class F>
void with_type(int is_bf16, F&& f) {
  if (is_bf16)
    f(bf16{});
  else
    f(float{});
}

}  // namespace

extern "C" {

// Writes key and value into the cache, then attends. Strides count elements. A negative slot is not written.
void paged_attention(const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
                     const void* v, int64_t v_token, int64_t v_head, void* out, void* cache, int64_t block_stride,
                     int64_t head_stride, int block_size, const int32_t* query_starts, const int32_t* lengths,
                     const int32_t* table, int64_t table_row, const int64_t* slots, int64_t tokens, int sequences,
                     int heads, int kv_heads, int64_t d_size, float scale, int is_bf16, int threads) {
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    const Batch<T> b{input<T>(q, q_token, q_head), dense<T>(out, heads, d_size), nullptr, query_starts, lengths,
                     tokens, heads / kv_heads, d_size, scale};
    paged<T>(b, {cache, block_stride, head_stride, block_size}, input<T>(k, k_token, k_head),
             input<T>(v, v_token, v_head), slots, table, table_row, sequences, kv_heads, threads);
  });
}

// packed_keys: room for kv_heads * (tokens / 32 + sequences) * D * 32 elements.
void packed_attention(const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token, int64_t k_head,
                      const void* v, int64_t v_token, int64_t v_head, void* out, float* lse, void* packed_keys,
                      const int32_t* starts, int64_t tokens, int sequences, int heads, int kv_heads, int64_t d_size,
                      float scale, int is_bf16, int threads) {
  const std::vector<int32_t> lengths = differences(starts, sequences);
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    const Batch<T> b{input<T>(q, q_token, q_head), dense<T>(out, heads, d_size), lse, starts, lengths.data(),
                     tokens, heads / kv_heads, d_size, scale};
    packed<T>(b, input<T>(k, k_token, k_head), input<T>(v, v_token, v_head), static_cast<T*>(packed_keys), sequences,
              kv_heads, threads);
  });
}

// out and the three gradients are dense; dout has strides of its own.
void packed_attention_backward(const void* q, int64_t q_token, int64_t q_head, const void* k, int64_t k_token,
                               int64_t k_head, const void* v, int64_t v_token, int64_t v_head, const void* out,
                               const float* lse, const void* dout, int64_t dout_token, int64_t dout_head, void* dq,
                               void* dk, void* dv, const int32_t* starts, int64_t tokens, int sequences, int heads,
                               int kv_heads, int64_t d_size, float scale, int is_bf16, int threads) {
  const std::vector<int32_t> lengths = differences(starts, sequences);
  with_type(is_bf16, [&](auto type) {
    using T = decltype(type);
    const Batch<T> b{input<T>(q, q_token, q_head), {nullptr, 0, 0}, nullptr, starts, lengths.data(), tokens,
                     heads / kv_heads, d_size, scale};
    const Gradients<T> g{input<T>(out, heads * d_size, d_size), input<T>(dout, dout_token, dout_head), lse,
                         dense<T>(dq, heads, d_size), dense<T>(dk, kv_heads, d_size), dense<T>(dv, kv_heads, d_size)};
    backward<T>(b, g, input<T>(k, k_token, k_head), input<T>(v, v_token, v_head), sequences, kv_heads, threads);
  });
}
}
