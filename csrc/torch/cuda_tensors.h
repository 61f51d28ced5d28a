// Tensors as the rows that the CUDA kernels walk: in place where the layout is dense, else one copy that the pair keeps alive.
#pragma once
#include <optional>

#include "../cuda/kernels.h"
#include "tensors.h"

namespace bf::glue {

inline bool is_narrow(Dtype dtype) { return dtype == kFloat32 || dtype == kBFloat16 || dtype == kFloat16; }

// Makes the tensors' device current and knows its stream.
struct OnDevice {
  int32_t device;
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;
  explicit OnDevice(const Tensor& t) : device(index_of(t)), guard(device) {
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  }
  Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype) const {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    return glue::empty(sizes, dtype, cuda, device);
  }
  // From torch's allocator, so that it lives as long as the stream needs it and graphs may capture it.
  Tensor scratch(int64_t bytes) const { return empty({bytes > 0 ? bytes : 1}, aoti_torch_dtype_uint8()); }

 private:
  static int32_t index_of(const Tensor& t) {
    check(t.is_cuda(), "beniful_fast: every tensor must be on one CUDA device");
    return t.get_device_index();
  }
};
inline void check_device(const Tensor& t, const OnDevice& on) {
  check(t.is_cuda() && t.get_device_index() == on.device, "beniful_fast: every tensor must be on one CUDA device");
}
inline void check_launch(const char* error) {
  if (__builtin_expect(error != nullptr, 0)) throw std::runtime_error(std::string("beniful_fast: CUDA: ") + error);
}

// Two tensors of one shape as rows; the tensors are kept because they may be copies.
struct Pair {
  Tensor x, y;
  Rows rows;
  bool in_place;
};

inline bool contiguous_rows(const Tensor& t) {
  auto sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d > 0; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}
// A row stride means nothing where there is one row, and may be anything.
inline int64_t row_stride(const Tensor& t) { return t.size(0) == 1 ? 0 : t.stride(0); }

inline Pair pair_of(const Tensor& x, const Tensor& y, bool contiguous, const OnDevice& on) {
  check_device(x, on);
  check_device(y, on);
  const int64_t dims = x.dim();
  check(dims >= 2 && y.dim() == dims, "beniful_fast: both tensors need one shape (N, ...)");
  const Dtype dtype = dtype_of(x);
  check(dtype != kFloat64, "beniful_fast: the CUDA kernels do not take float64; use backend='reference' or .float()");
  check(is_narrow(dtype) && dtype_of(y) == dtype, "beniful_fast: both tensors need one dtype of float32, bfloat16, float16");
  auto sizes = x.sizes(), other = y.sizes();
  int64_t d = 1;
  for (int64_t i = 0; i < dims; ++i) {
    check(sizes[i] == other[i], "beniful_fast: both tensors need one shape (N, ...)");
    if (i) d *= sizes[i];
  }
  check(d > 0, "beniful_fast: rows must not be empty");
  Pair pair{x, y, {nullptr, nullptr, sizes[0], d, 0, 0, dtype}, true};
  const bool x_dense = contiguous ? contiguous_rows(x) : dense(1, dims, sizes.data(), x.strides().data());
  pair.in_place = x_dense && same_walk(1, dims, sizes.data(), x.strides().data(), y.strides().data());
  if (!pair.in_place && !contiguous && x_dense) {
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
  pair.rows.x_stride = row_stride(pair.x);
  pair.rows.y_stride = row_stride(pair.y);
  return pair;
}

// Where a gradient goes: `tensor` is what the caller gets, `target` where the kernel writes, in the walk of `pair`.
struct Gradient {
  Tensor tensor, target;
  bool copied;
  void* data() const { return target.mutable_data_ptr(); }
  int64_t stride() const { return row_stride(target); }
  void finish() {
    if (copied) torch::stable::copy_(tensor, target);
  }
};

inline Gradient gradient_of(const Tensor& x, const Tensor& y, bool contiguous, const OnDevice& on, Pair& pair) {
  pair = pair_of(x, y, contiguous, on);
  Tensor like = torch::stable::empty_like(x);
  if (pair.in_place && same_walk(1, x.dim(), x.sizes().data(), x.strides().data(), like.strides().data())) return {like, like, false};
  if (pair.in_place) {
    // The kernel would walk x and the gradient differently.
    pair = pair_of(torch::stable::contiguous(x), torch::stable::contiguous(y), true, on);
  }
  if (contiguous_rows(like)) return {like, like, false};
  return {like, torch::stable::contiguous(like), true};
}

}  // namespace bf::glue
