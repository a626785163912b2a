// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Matrix products and SiLU on a CPU whose rows have the same bits whatever the other rows are.
//
// Products. The bits of a row are those of the plain library call on a tile of some rows (kTile) by one thread. tiled()
// makes exactly these calls. direct() is one library call on the whole matrix: faster, and equal only where the
// library happens to sum a row in the same order for every number of rows and threads. Which of the two serves a
// weight's shape is asked of Python, once for each shape (cpu.py proves it by trying), so that a choice changes the
// speed and never the bits.
//
// SiLU. torch computes full vectors and tails by two formulas; here every element takes the same operations.
//
// The kernels replace torch's at the CPU dispatch key, below autograd: torch's derivative formulas stay in force.

#include <ATen/Parallel.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>

namespace {

constexpr int64_t kTile = 16;
constexpr int64_t kNativeGemm = 4096;
constexpr int64_t kGrain = 32768;  // elements a thread takes at least, as torch has it

enum Path { kAsk = 0, kDirect = 1, kTiled = 2 };
using Ask = int (*)(int64_t k, int64_t n, int dtype, int transposed);

std::unique_ptr<torch::Library> library;
Ask ask = nullptr;
thread_local Path forced = kAsk;
std::mutex mutex;
std::map<std::tuple<int64_t, int64_t, int, bool, int>, Path> paths;

// `x` with zeros below and to the right; `x` itself where it is that large.
at::Tensor padded(const at::Tensor& x, int64_t rows, int64_t columns) {
  if (x.size(0) >= rows && x.size(1) >= columns) return x;
  at::Tensor y = at::zeros({std::max(rows, x.size(0)), std::max(columns, x.size(1))}, x.options());
  y.narrow(0, 0, x.size(0)).narrow(1, 0, x.size(1)).copy_(x);
  return y;
}

// Fewest rows of a library call. BLAS libraries have other kernels for a few rows of fp32. For the 16-bit types torch
// leaves oneDNN for a kernel of its own where rows * K * N <= 4096; it agrees with oneDNN but once in a thousand calls,
// so that no trial finds it out.
int64_t least_rows(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == at::kFloat ? kTile : kNativeGemm / (b.size(0) * b.size(1)) + 1;
}

at::Tensor direct(const at::Tensor& a, const at::Tensor& b) {
  return at::cpu::mm(padded(a, least_rows(a, b), 0), b).narrow(0, 0, a.size(0));
}

at::Tensor tiled(const at::Tensor& a, const at::Tensor& b) {
  const int64_t height = std::max(kTile, least_rows(a, b));
  const int64_t tiles = (a.size(0) + height - 1) / height;
  at::Tensor a_full = padded(a, tiles * height, 0);
  at::Tensor out = at::empty({tiles * height, b.size(1)}, a.options());
  // Inside a parallel region the library works with the calling thread alone.
  at::parallel_for(0, std::max<int64_t>(tiles, 2), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (int64_t tile = begin; tile < std::min(end, tiles); tile++) {
      at::Tensor out_tile = out.narrow(0, tile * height, height);
      at::cpu::mm_out(out_tile, a_full.narrow(0, tile * height, height), b);
    }
  });
  return out.narrow(0, 0, a.size(0));
}

Path path_for(const at::Tensor& b) {
  if (forced != kAsk) return forced;
  const bool transposed = b.stride(0) == 1 && b.stride(1) != 1;
  const auto key = std::make_tuple(
      b.size(0), b.size(1), static_cast<int>(b.scalar_type()), transposed, at::get_num_threads());
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (auto known = paths.find(key); known != paths.end()) return known->second;
  }
  const Path path = static_cast<Path>(ask(b.size(0), b.size(1), std::get<2>(key), transposed));
  std::lock_guard<std::mutex> lock(mutex);
  return paths[key] = path;
}

at::Tensor mm_rows(const at::Tensor& a, const at::Tensor& b) {
  const auto dtype = a.scalar_type();
  const bool covered = dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf;
  // Gradients are sums over rows: whole calls, whose K changes with every batch.
  const bool backward = torch::autograd::get_current_graph_task_id() != -1;
  if (!covered || backward || a.numel() == 0 || b.numel() == 0 || b.scalar_type() != dtype || a.size(1) != b.size(0))
    return at::cpu::mm(a, b);
  // A single column is a matrix-vector product, with kernels of its own.
  const int64_t columns = b.size(1);
  const at::Tensor wide = padded(b, 0, kTile);
  const at::Tensor rows = a.contiguous();
  const at::Tensor out = path_for(wide) == kDirect ? direct(rows, wide) : tiled(rows, wide);
  return columns < kTile ? out.narrow(1, 0, columns).contiguous() : out;
}

at::Tensor addmm_rows(
    const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  at::Tensor product = mm_rows(a, b);
  if (!alpha.equal(1)) product.mul_(alpha);
  return beta.equal(0) ? product : at::add(product, bias, beta);
}

at::Tensor bmm_rows(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0 || a.size(0) != b.size(0)) return at::cpu::bmm(a, b);
  at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t i = 0; i < a.size(0); i++) out.select(0, i).copy_(mm_rows(a.select(0, i), b.select(0, i)));
  return out;
}

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t IVec __attribute__((vector_size(64)));
typedef uint32_t UVec __attribute__((vector_size(64)));
typedef uint16_t HVec __attribute__((vector_size(32)));
constexpr int64_t kLanes = 16;

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vec load(const at::BFloat16* p) {
  HVec h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, UVec) << 16);
}

inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(at::BFloat16* p, Vec v) {
  const UVec u = (UVec)v;
  const UVec bits = (u & 0x7fffffff) > 0x7f800000 ? UVec{} + 0x7fc0 : (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const HVec h = __builtin_convertvector(bits, HVec);
  std::memcpy(p, &h, sizeof h);
}

// x / (1 + e^-x). e^t is 2^n * e^r with |r| <= ln(2) / 2 and Taylor terms up to r^7, within 2 ulp; beyond +-87, where
// the quotient is x or next to 0, t saturates.
inline Vec silu(Vec x) {
  Vec t = -x;
  t = t < -87.f ? Vec{} - 87.f : t;
  t = t > 87.f ? Vec{} + 87.f : t;
  const Vec n = (t * 1.44269504f + 12582912.f) - 12582912.f;  // rounds: adds and takes away 1.5 * 2^23
  const Vec r = (t - n * 0.693359375f) + n * 2.12194440e-4f;  // ln(2) in two parts (Cody and Waite)
  Vec y = r * (1.f / 5040) + 1.f / 720;
  y = y * r + 1.f / 120;
  y = y * r + 1.f / 24;
  y = y * r + 1.f / 6;
  y = y * r + 0.5f;
  y = (y * r) * r + r + 1.f;
  return x / (1.f + y * (Vec)((__builtin_convertvector(n, IVec) + 127) << 23));
}

template <typename T>
void silu_span(const T* x, T* y, int64_t count) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, silu(load(x + i)));
  if (i == count) return;
  T tail[kLanes] = {};
  std::copy(x + i, x + count, tail);
  store(tail, silu(load(tail)));
  std::copy(tail, tail + (count - i), y + i);
}

at::Tensor silu_elements(const at::Tensor& self) {
  const auto dtype = self.scalar_type();
  if (dtype != at::kFloat && dtype != at::kBFloat16) return at::cpu::silu(self);
  const at::Tensor x = self.contiguous();
  at::Tensor y = at::empty_like(x);
  at::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
    if (dtype == at::kFloat) {
      silu_span(x.const_data_ptr<float>() + begin, y.mutable_data_ptr<float>() + begin, end - begin);
    } else {
      silu_span(
          x.const_data_ptr<at::BFloat16>() + begin, y.mutable_data_ptr<at::BFloat16>() + begin, end - begin);
    }
  });
  return y;
}

// The dispatcher warns of every replaced kernel, which is what is meant here.
class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

extern "C" {

// Puts the kernels in the place of torch's. `callback` answers kDirect or kTiled for the shape of a product's right side.
void install(Ask callback) {
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  ask = callback;
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("mm", &mm_rows);
  library->impl("addmm", &addmm_rows);
  library->impl("bmm", &bmm_rows);
  library->impl("silu", &silu_elements);
}

// Gives torch its kernels back.
void uninstall() { library.reset(); }

// Makes the calling thread take one path, without asking; kAsk ends that.
void force_path(int path) { forced = static_cast<Path>(path); }
}
