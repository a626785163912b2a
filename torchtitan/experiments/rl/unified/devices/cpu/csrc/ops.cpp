// All rights reserved.
//
// This source code is licensed under the BSD-style license found in the
// LICENSE file in the root directory of this source tree.

// Matrix products, RMSNorm and SiLU on a CPU whose rows have the same bits whatever the other rows are.
//
// Products: linear.h. SiLU: torch computes full vectors and tails by two formulas; here every element takes the same
// operations. RMSNorm: torch has six operations for it, this is one pass.
//
// The kernels replace torch's at the CPU dispatch key, below autograd: torch's derivative formulas stay in force.

#include <ATen/Parallel.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/_fused_rms_norm_compositeimplicitautograd_dispatch.h>
#include <ATen/ops/bmm_cpu_dispatch.h>
#include <ATen/ops/addmm_cpu_dispatch.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm_cpu_dispatch.h>
#include <ATen/ops/silu_cpu_dispatch.h>
#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/function.h>
#include <torch/library.h>

#if !defined(__x86_64__)
#error "batch-invariant products need an x86-64 CPU"
#endif
#include <cpuid.h>
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

#include "linear.h"

constexpr int64_t kGrain = 32768;  // elements a thread takes at least, as torch has it

std::unique_ptr<torch::Library> library;
int isa = -1;

// Whether the caller is a derivative formula of torch's. Gradients are sums over rows: torch's products serve them.
// Activation checkpointing runs a forward pass within a backward one. That is told by what a formula never has: grad
// mode (but to differentiate twice), hooks for saved tensors, or a node that is not torch's own.
bool is_derivative_formula() {
  if (torch::autograd::get_current_graph_task_id() == -1 || c10::GradMode::is_enabled()) return false;
  if (!at::SavedTensorDefaultHooks::get_tls_state().stack.empty()) return false;
  return dynamic_cast<const torch::autograd::TraceableFunction*>(torch::autograd::get_current_node().get());
}

bool is_covered(const at::Tensor& a, const at::Tensor& b) {
  const auto dtype = a.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && b.scalar_type() == dtype && a.numel() && b.numel() &&
      !is_derivative_formula();
}

void run(const Product& p, at::ScalarType dtype) {
  if (dtype == at::kFloat) {
    multiply<float>(p, isa);
  } else {
    multiply<uint16_t>(p, isa);
  }
}

// `x` with the numbers of a row side by side.
at::Tensor with_plain_rows(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Fills `out`, whose rows are plain. `bias` is of its shape, or not defined.
void product(
    const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias = {}, float alpha = 1,
    float beta = 1) {
  const at::Tensor x = with_plain_rows(a);
  Product p{a.size(0), b.size(1), a.size(1)};
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
  p.w = b.const_data_ptr(), p.w_k = b.stride(0), p.w_n = b.stride(1);
  p.out = out.mutable_data_ptr(), p.out_stride = out.stride(0);
  p.alpha = alpha, p.beta = beta;
  if (bias.defined()) p.bias = bias.const_data_ptr(), p.bias_stride = bias.stride(0);
  run(p, a.scalar_type());
}

at::Tensor mm_rows(const at::Tensor& a, const at::Tensor& b) {
  if (!is_covered(a, b) || a.size(1) != b.size(0)) return at::cpu::mm(a, b);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  product(out, a, b);
  return out;
}

at::Tensor addmm_rows(
    const at::Tensor& bias, const at::Tensor& a, const at::Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  if (!is_covered(a, b) || a.size(1) != b.size(0) || bias.scalar_type() != a.scalar_type())
    return at::cpu::addmm(bias, a, b, beta, alpha);
  at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  const bool no_bias = beta.equal(0);  // its numbers, NaN too, don't count then
  product(
      out, a, b, no_bias ? at::Tensor() : with_plain_rows(bias.expand(out.sizes())), alpha.toFloat(), beta.toFloat());
  return out;
}

at::Tensor bmm_rows(const at::Tensor& a, const at::Tensor& b) {
  if (!is_covered(a, b) || a.size(0) != b.size(0) || a.size(2) != b.size(1)) return at::cpu::bmm(a, b);
  at::Tensor out = at::empty({a.size(0), a.size(1), b.size(2)}, a.options());
  for (int64_t i = 0; i < a.size(0); i++) product(out.select(0, i), a.select(0, i), b.select(0, i));
  return out;
}

// Words of a packed weight [n, k].
int64_t packed_size(int64_t n, int64_t k, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(
      dtype == at::kFloat || dtype == at::kBFloat16, "packed weights are float32 or bfloat16, not ", dtype);
  return ceil_div(n, kColumns) * Depth(k, dtype == at::kBFloat16).panel();
}

void check_packed(const at::Tensor& packed, at::ScalarType dtype, int64_t k, int64_t n) {
  const int64_t words = packed_size(n, k, dtype);
  TORCH_CHECK_VALUE(
      packed.scalar_type() == at::kInt && packed.is_contiguous() && packed.numel() == words,
      "no packed weight of ", n, " x ", k, " in ", dtype, ": it is ", words, " contiguous int32");
}

// Writes `weight` [rows, k] as rows `offset` and following of a packed weight of n rows.
void pack_weight(at::Tensor packed, int64_t n, int64_t offset, const at::Tensor& weight) {
  const int64_t rows = weight.size(0), k = weight.size(1);
  check_packed(packed, weight.scalar_type(), k, n);
  TORCH_CHECK_VALUE(offset >= 0 && offset + rows <= n, "rows ", offset, " to ", offset + rows, " of ", n);
  const bool is_bf16 = weight.scalar_type() == at::kBFloat16;
  const Depth depth(k, is_bf16);
  uint32_t* out = reinterpret_cast<uint32_t*>(packed.mutable_data_ptr<int>());
  const int64_t first = offset / kColumns, panels = ceil_div(offset + rows, kColumns);
  at::parallel_for(first, panels, 4, [&](int64_t p, int64_t end) {
    const int64_t n0 = std::max(offset, p * kColumns), n1 = std::min(offset + rows, end * kColumns);
    const char* from = static_cast<const char*>(weight.const_data_ptr()) +
        (n0 - offset) * weight.stride(0) * weight.element_size();
    if (is_bf16) {
      pack_columns(depth, (const uint16_t*)from, weight.stride(1), weight.stride(0), n0, n1, out);
    } else {
      pack_columns(depth, (const float*)from, weight.stride(1), weight.stride(0), n0, n1, out);
    }
  });
}

// x [.., k] @ weight.T + bias, the weight [n, k] packed.
at::Tensor packed_linear(
    const at::Tensor& input, const at::Tensor& packed, int64_t n, const std::optional<at::Tensor>& bias) {
  const int64_t k = input.size(-1);
  check_packed(packed, input.scalar_type(), k, n);
  auto sizes = input.sizes().vec();
  sizes.back() = n;
  at::Tensor out = at::empty(sizes, input.options());
  if (out.numel() == 0) return out;
  const at::Tensor x = with_plain_rows(input.dim() == 2 ? input : input.reshape({-1, k}));
  Product p{x.size(0), n, k};
  p.x = x.const_data_ptr(), p.x_stride = x.stride(0);
  p.packed = reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int>());
  p.out = out.mutable_data_ptr(), p.out_stride = n;
  if (bias) {
    TORCH_CHECK_VALUE(
        bias->scalar_type() == input.scalar_type() && bias->dim() == 1 && bias->size(0) == n && bias->is_contiguous(),
        "the bias of a packed weight of ", n, " rows is that many numbers of its dtype");
    p.bias = bias->const_data_ptr(), p.bias_stride = 0;
  }
  run(p, input.scalar_type());
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

inline float sum(Vec v) {
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; lane++) total += v[lane];
  return total;
}

// Calls f(i, load) for each vector of a row; `load` reads a vector at i, with zeros beyond the row's end.
template <typename F>
inline void for_vectors(int64_t count, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(i, [i](const auto* p) { return load(p + i); });
  if (i == count) return;
  f(i, [i, count](const auto* p) {
    std::remove_const_t<std::remove_pointer_t<decltype(p)>> tail[kLanes] = {};
    std::copy(p + i, p + count, tail);
    return load(tail);
  });
}

template <typename T>
inline void store_part(T* p, int64_t i, int64_t count, Vec v) {
  if (i + kLanes <= count) return store(p + i, v);
  T tail[kLanes];
  store(tail, v);
  std::copy(tail, tail + (count - i), p + i);
}

// y = x * rstd * weight, rounded once, with rstd = 1 / sqrt(mean(x^2) + eps), in fp32. Sums run in 16 lanes.
template <typename T>
float rms_norm_row(const T* x, const T* weight, T* y, int64_t width, float eps) {
  Vec squares{};
  for_vectors(width, [&](int64_t, auto load) { squares += load(x) * load(x); });
  const float rstd = 1 / std::sqrt(sum(squares) / width + eps);
  for_vectors(width, [&](int64_t i, auto load) { store_part(y, i, width, (load(x) * rstd) * load(weight)); });
  return rstd;
}

// dx = rstd * (g - n * mean(g * n)) with n = x * rstd and g = dy * weight; adds dy * n to dweight.
template <typename T>
void rms_norm_backward_row(
    const T* dy, const T* x, const T* weight, float rstd, T* dx, float* dweight, int64_t width) {
  Vec products{};
  for_vectors(width, [&](int64_t i, auto load) {
    const Vec n = load(x) * rstd, d = load(dy);
    products += d * load(weight) * n;
    store_part(dweight, i, width, load(static_cast<const float*>(dweight)) + d * n);
  });
  const float mean = sum(products) / width;
  for_vectors(width, [&](int64_t i, auto load) {
    store_part(dx, i, width, (load(dy) * load(weight) - load(x) * rstd * mean) * rstd);
  });
}

bool is_rms_norm_here(const at::Tensor& x, at::IntArrayRef shape, const std::optional<at::Tensor>& weight) {
  const auto dtype = x.scalar_type();
  return (dtype == at::kFloat || dtype == at::kBFloat16) && shape.size() == 1 && weight && weight->defined() &&
      weight->scalar_type() == dtype && weight->dim() == 1 && x.numel() && x.size(-1) == weight->numel();
}

int64_t rows_at_once(int64_t width) { return std::max<int64_t>(1, kGrain / width); }

std::tuple<at::Tensor, at::Tensor> rms_norm(
    const at::Tensor& input, at::IntArrayRef shape, const std::optional<at::Tensor>& weight, std::optional<double> e) {
  if (!is_rms_norm_here(input, shape, weight))
    return at::compositeimplicitautograd::_fused_rms_norm(input, shape, weight, e);
  const float eps = e.value_or(0x1p-23);  // of fp32, as torch has it for bf16 too
  const at::Tensor x = input.contiguous(), w = weight->contiguous();
  const int64_t width = x.size(-1);
  auto sizes = x.sizes().vec();
  sizes.back() = 1;
  at::Tensor y = at::empty_like(x), rstd = at::empty(sizes, x.options().dtype(at::kFloat));
  at::parallel_for(0, rstd.numel(), rows_at_once(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const int64_t at = row * width;
      rstd.mutable_data_ptr<float>()[row] = x.scalar_type() == at::kFloat
          ? rms_norm_row(
                x.const_data_ptr<float>() + at, w.const_data_ptr<float>(), y.mutable_data_ptr<float>() + at, width, eps)
          : rms_norm_row(
                x.const_data_ptr<at::BFloat16>() + at, w.const_data_ptr<at::BFloat16>(),
                y.mutable_data_ptr<at::BFloat16>() + at, width, eps);
    }
  });
  return {y, rstd};
}

template <typename T>
void rms_norm_backward_rows(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& w, const at::Tensor& rstd, at::Tensor& dx,
    at::Tensor& dw_parts, int64_t block) {
  const int64_t width = x.size(-1), rows = rstd.numel();
  at::parallel_for(0, dw_parts.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * block; row < std::min(rows, end * block); row++) {
      const int64_t at = row * width;
      rms_norm_backward_row(
          dy.const_data_ptr<T>() + at, x.const_data_ptr<T>() + at, w.const_data_ptr<T>(),
          rstd.const_data_ptr<float>()[row], dx.mutable_data_ptr<T>() + at,
          dw_parts.mutable_data_ptr<float>() + row / block * width, width);
    }
  });
}

// The weight's gradient is summed over blocks of rows, then over the blocks: one order for every number of threads.
std::tuple<at::Tensor, at::Tensor> rms_norm_backward(
    const at::Tensor& grad, const at::Tensor& input, at::IntArrayRef shape, const at::Tensor& rstd,
    const std::optional<at::Tensor>& weight, std::array<bool, 2>) {
  if (!is_rms_norm_here(input, shape, weight) || grad.scalar_type() != input.scalar_type()) {
    const auto dtype = rstd.scalar_type();
    const bool weighted = weight && weight->defined();
    std::vector<int64_t> dims;
    for (int64_t dim = -1; dim >= -static_cast<int64_t>(shape.size()); dim--) dims.push_back(dim);
    const at::Tensor n = input.to(dtype) * rstd, dy = grad.to(dtype), g = weighted ? dy * weight->to(dtype) : dy;
    const at::Tensor dx = (g - n * (g * n).mean(dims, true)) * rstd;
    const at::Tensor dw = weighted ? (dy * n).sum_to_size(weight->sizes()).to(weight->scalar_type()) : at::Tensor();
    return {dx.to(input.scalar_type()), dw};
  }
  const at::Tensor dy = grad.contiguous(), x = input.contiguous(), w = weight->contiguous(), r = rstd.contiguous();
  const int64_t block = rows_at_once(x.size(-1));
  at::Tensor dx = at::empty_like(x);
  at::Tensor dw_parts = at::zeros({ceil_div(r.numel(), block), x.size(-1)}, x.options().dtype(at::kFloat));
  if (x.scalar_type() == at::kFloat) {
    rms_norm_backward_rows<float>(dy, x, w, r, dx, dw_parts, block);
  } else {
    rms_norm_backward_rows<at::BFloat16>(dy, x, w, r, dx, dw_parts, block);
  }
  at::Tensor dw = dw_parts[0];
  for (int64_t part = 1; part < dw_parts.size(0); part++) dw += dw_parts[part];
  return {dx, dw.to(w.scalar_type())};
}

// The dispatcher warns of every replaced kernel, which is what is meant here.
class Silence : public c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

}  // namespace

TORCH_LIBRARY(rl_unified, m) {
  m.def("packed_size(int n, int k, ScalarType dtype) -> int", &packed_size);
  m.def("pack_weight(Tensor(a!) packed, int n, int offset, Tensor weight) -> ()");
  m.def("packed_linear(Tensor x, Tensor packed, int n, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(rl_unified, CPU, m) {
  m.impl("pack_weight", &pack_weight);
  m.impl("packed_linear", &packed_linear);
}

// A graph that was made inside the mode may be walked outside; torch itself has no such kernel on a CPU.
TORCH_LIBRARY_IMPL(aten, CPU, m) { m.impl("_fused_rms_norm_backward", &rms_norm_backward); }

extern "C" {

// The best instruction set there is for products, or -1 where there is none.
int best() { return best_isa(); }

// Computes by this one from now on, in the whole process.
void use(int value) { isa = value; }

// The one that a dtype's products take.
int used(int is_bf16) { return is_bf16 ? isa : std::min<int>(isa, kAvx512); }

// Puts the kernels in the place of torch's.
void install() {
  Silence silence;
  c10::WarningUtils::WarningHandlerGuard guard(&silence);
  library = std::make_unique<torch::Library>(torch::Library::IMPL, "aten", c10::DispatchKey::CPU, __FILE__, __LINE__);
  library->impl("mm", &mm_rows);
  library->impl("addmm", &addmm_rows);
  library->impl("bmm", &bmm_rows);
  library->impl("silu", &silu_elements);
  library->impl("_fused_rms_norm", &rms_norm);
}

// Gives torch its kernels back.
void uninstall() { library.reset(); }
}
