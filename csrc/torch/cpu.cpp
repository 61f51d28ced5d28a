// The CPU kernels of the ops in beniful_fast/ops/schemas.py: check what memory safety needs, find a walk, call the core.
#include <optional>
#include <tuple>
#include <vector>

#include "../core/run.h"
#include "tensors.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace bf::glue {
namespace {

const Parallel kTorch{[](int64_t units, int64_t grain, RangeFn fn, void* context, int) {
                        STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, units, grain, fn, context));
                      },
                      0};

Tensor empty_cpu(std::initializer_list<int64_t> sizes, int32_t dtype) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  return empty(sizes, dtype, cpu, 0);
}

// Two tensors of one shape as rows; the tensors are kept because they may be copies.
struct Pair {
  Tensor x, y;
  Rows rows;
  bool in_place;
};

bool contiguous_rows(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

Pair pair_of(const Tensor& x, const Tensor& y, bool contiguous) {
  check(x.is_cpu() && y.is_cpu(), "beniful_fast: both tensors must be on the CPU");
  const int64_t dims = x.dim();
  check(dims >= 2 && y.dim() == dims, "beniful_fast: both tensors need one shape (N, ...)");
  const Dtype dtype = dtype_of(x);
  check(dtype != kDtypes && dtype_of(y) == dtype, "beniful_fast: both tensors need one dtype of float32, float64, bfloat16, float16");
  auto sizes = x.sizes(), other = y.sizes();
  int64_t d = 1;
  for (int64_t i = 0; i < dims; ++i) {
    check(sizes[i] == other[i], "beniful_fast: both tensors need one shape (N, ...)");
    if (i) d *= sizes[i];
  }
  check(d > 0, "beniful_fast: rows must not be empty");
  Pair pair{x, y, {nullptr, nullptr, sizes[0], d, 0, 0, dtype}, true};
  pair.in_place = (contiguous ? contiguous_rows(x) : dense(1, dims, sizes.data(), x.strides().data())) &&
                  same_walk(1, dims, sizes.data(), x.strides().data(), y.strides().data());
  if (!pair.in_place && !contiguous && dense(1, dims, sizes.data(), x.strides().data())) {
    // Only y walks differently: one copy, into x's layout.
    Tensor copy = torch::stable::empty_like(x);
    if (same_walk(1, dims, sizes.data(), x.strides().data(), copy.strides().data())) {
      pair.y = torch::stable::copy_(copy, y);
      pair.in_place = true;
    }
  }
  if (!pair.in_place) {
    pair.x = torch::stable::contiguous(x);
    pair.y = torch::stable::contiguous(y);
  }
  pair.rows.x = pair.x.const_data_ptr();
  pair.rows.y = pair.y.const_data_ptr();
  pair.rows.x_stride = pair.x.stride(0);
  pair.rows.y_stride = pair.y.stride(0);
  return pair;
}

const void* weight_of(const std::optional<Tensor>& weight, const Rows& rows, Tensor& keep) {
  if (!weight) return nullptr;
  check(weight->is_cpu() && weight->dim() == 1 && weight->size(0) == rows.d, "beniful_fast: weight must be (D,) on the CPU");
  check(dtype_code(*weight) == result_code(rows.dtype), "beniful_fast: weight must be of the result's dtype");
  keep = torch::stable::contiguous(*weight);
  return keep.const_data_ptr();
}

Norm checked_norm(double p) {
  int norm = norm_of(p);
  check(norm >= 0, "beniful_fast: p must be 1, 2 or inf");
  return static_cast<Norm>(norm);
}
Reduction checked_reduction(int64_t reduction) {
  check(reduction >= kMean && reduction <= kRoot, "beniful_fast: reduction must be 0, 1 or 2");
  return static_cast<Reduction>(reduction);
}

// Fresh pages cost more than the arithmetic: ask for huge ones inside a large new buffer.
void want_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t(1) << 21;
  const size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes < 2 * kHuge) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t first = (start + kHuge - 1) & ~(kHuge - 1), last = (start + bytes) & ~(kHuge - 1);
  if (last > first) (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

// Where a gradient goes: `tensor` is what the caller gets, `target` where the kernel writes, in the walk of `pair`.
struct Gradient {
  Tensor tensor, target;
  bool copied;
  void finish() {
    if (copied) torch::stable::copy_(tensor, target);
  }
};

Tensor fresh_like(const Tensor& x) {
  if (!x.is_contiguous()) return torch::stable::empty_like(x);
  AtenTensorHandle handle = nullptr;
  auto sizes = x.sizes(), strides = x.strides();
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(x.dim(), sizes.data(), strides.data(), dtype_code(x), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

Gradient gradient_of(const Tensor& x, const Tensor& y, bool contiguous, Pair& pair) {
  pair = pair_of(x, y, contiguous);
  Tensor like = fresh_like(x);
  want_huge_pages(like);
  auto strides = like.strides();
  if (pair.in_place && same_walk(1, x.dim(), x.sizes().data(), x.strides().data(), strides.data())) return {like, like, false};
  if (pair.in_place) {
    // The kernel would walk x and the gradient differently.
    pair = pair_of(torch::stable::contiguous(x), torch::stable::contiguous(y), true);
  }
  if (contiguous_rows(like)) return {like, like, false};
  Tensor target = torch::stable::contiguous(like);
  return {like, target, true};
}

Tensor distance(const Tensor& x, const Tensor& x_hat, const std::optional<Tensor>& weight, double p, int64_t reduction) {
  const Norm norm = checked_norm(p);
  const Reduction how = checked_reduction(reduction);
  Pair pair = pair_of(x, x_hat, weight.has_value());
  Tensor keep = pair.x;
  const void* w = weight_of(weight, pair.rows, keep);
  Tensor out = empty_cpu({pair.rows.n}, result_code(pair.rows.dtype));
  bf::distance(kTorch, pair.rows, w, norm, how, out.mutable_data_ptr());
  return out;
}

Tensor distance_backward(const Tensor& grad, const Tensor& out, const Tensor& x, const Tensor& x_hat, const std::optional<Tensor>& weight, double p,
                         int64_t reduction) {
  const Norm norm = checked_norm(p);
  const Reduction how = checked_reduction(reduction);
  Pair pair{x, x_hat, {}, true};
  Gradient gradient = gradient_of(x, x_hat, weight.has_value(), pair);
  for (const Tensor* t : {&grad, &out}) {
    check(t->is_cpu() && t->dim() == 1 && t->size(0) == pair.rows.n && dtype_code(*t) == result_code(pair.rows.dtype),
          "beniful_fast: grad and out must be (N,) of the result's dtype on the CPU");
  }
  Tensor keep = pair.x, upstream = torch::stable::contiguous(grad), result = torch::stable::contiguous(out);
  const void* w = weight_of(weight, pair.rows, keep);
  bf::distance_backward(kTorch, pair.rows, w, norm, how, upstream.const_data_ptr(), result.const_data_ptr(), gradient.target.mutable_data_ptr(),
                        gradient.target.stride(0));
  gradient.finish();
  return gradient.tensor;
}

std::tuple<Tensor, std::vector<Tensor>> feature_loss(std::vector<Tensor> features, std::vector<Tensor> targets, std::vector<double> weights, int64_t kind,
                                                     std::optional<double> margin, int64_t reduction, bool need_grad) {
  check(!features.empty() && targets.size() == features.size() && weights.size() == features.size(),
        "beniful_fast: features, targets and weights need one length above 0");
  check(kind >= kMse && kind <= kRelative, "beniful_fast: kind must be 0, 1 or 2");
  check(reduction == 0 || reduction == 1, "beniful_fast: reduction must be 0 or 1");
  const bool mean = reduction == 0;
  const int32_t code = result_code(dtype_of(features[0]));
  check(features[0].dim() >= 2, "beniful_fast: features need a shape (N, ...)");
  const int64_t first_n = features[0].size(0);
  std::vector<double> total(mean ? 1 : first_n, 0.0), values;
  std::vector<Tensor> gradients;
  for (size_t l = 0; l < features.size(); ++l) {
    const Tensor &f = features[l], &t = targets[l];
    Pair pair{f, t, {}, true};
    Gradient gradient{f, f, false};
    if (need_grad) gradient = gradient_of(f, t, false, pair);
    else pair = pair_of(f, t, false);
    const int64_t n = pair.rows.n;
    check(result_code(pair.rows.dtype) == code, "beniful_fast: float64 and narrower layers do not mix");
    check(mean || n == first_n, "beniful_fast: every layer needs the same batch size");
    values.resize(n);
    const double share = mean && n ? weights[l] / static_cast<double>(n) : weights[l];
    bf::feature_loss(kTorch, pair.rows, static_cast<Kind>(kind), margin ? &*margin : nullptr, share, need_grad ? gradient.target.mutable_data_ptr() : nullptr,
                     need_grad ? gradient.target.stride(0) : 0, values.data());
    if (mean) {
      double sum = 0;
      for (double value : values) sum += value;
      total[0] += weights[l] * (sum / static_cast<double>(n));   // NaN for an empty batch, as torch's mean
    } else {
      for (int64_t i = 0; i < n; ++i) total[i] += weights[l] * values[i];
    }
    if (need_grad) {
      gradient.finish();
      gradients.push_back(gradient.tensor);
    }
  }
  Tensor out = mean ? empty_cpu({}, code) : empty_cpu({first_n}, code);
  void* to = out.mutable_data_ptr();
  for (size_t i = 0; i < total.size(); ++i) {
    if (code == aoti_torch_dtype_float64()) static_cast<double*>(to)[i] = total[i];
    else static_cast<float*>(to)[i] = static_cast<float>(total[i]);
  }
  return {out, gradients};
}

std::tuple<Tensor, Tensor, Tensor> channel_stats(const Tensor& x, int64_t dim, bool per_sample, int64_t norms) {
  check(x.is_cpu(), "beniful_fast: the tensor must be on the CPU");
  const Dtype dtype = dtype_of(x);
  check(dtype != kDtypes, "beniful_fast: the tensor must be float32, float64, bfloat16 or float16");
  const int64_t dims = x.dim();
  check(dims >= 1 && dim >= -dims && dim < dims, "beniful_fast: dim is out of range");
  if (dim < 0) dim += dims;
  check(norms >= 1 && norms <= 7, "beniful_fast: norms must be a bit set of 1, 2 and 4");
  check(!per_sample || dim != 0, "beniful_fast: per_sample needs a channel dim other than the sample dim 0");
  Tensor walked = x;
  StatsPlan plan = plan_stats(dims, x.sizes().data(), x.strides().data(), dim, per_sample);
  if (!plan.ok) {
    // One copy, with the channel next to the samples (a channel dim in the middle has no single walk).
    walked = torch::stable::contiguous(dim > 1 ? torch::stable::transpose(x, 1, dim) : x);
    plan = plan_stats(dims, walked.sizes().data(), walked.strides().data(), dim > 1 ? 1 : dim, per_sample);
    check(plan.ok, "beniful_fast: no kernel walks this tensor");
  }
  const int64_t samples = x.size(0), channels = x.size(dim);
  auto result = [&](bool present, int32_t code) {
    if (!present) return empty_cpu({0}, code);
    return per_sample ? empty_cpu({samples, channels}, code) : empty_cpu({channels}, code);
  };
  Tensor linf = result(norms & 1, result_code(dtype)), l1 = result(norms & 2, aoti_torch_dtype_float64()), sumsq = result(norms & 4, aoti_torch_dtype_float64());
  bf::channel_stats(kTorch, plan, walked.const_data_ptr(), dtype, per_sample, norms, linf.mutable_data_ptr(), static_cast<double*>(l1.mutable_data_ptr()),
                    static_cast<double*>(sumsq.mutable_data_ptr()));
  return {linf, l1, sumsq};
}

}  // namespace
}  // namespace bf::glue

STABLE_TORCH_LIBRARY_IMPL(beniful_fast, CPU, m) {
  m.impl("distance", TORCH_BOX(&bf::glue::distance));
  m.impl("distance_backward", TORCH_BOX(&bf::glue::distance_backward));
  m.impl("feature_loss", TORCH_BOX(&bf::glue::feature_loss));
  m.impl("channel_stats", TORCH_BOX(&bf::glue::channel_stats));
}
