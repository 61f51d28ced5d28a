// What the glue needs of tensors, over the C shims of the stable ABI (the C++ wrappers where speed does not matter).
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "../core/kernels.h"

// torch 2.12 and newer have it, with what the shim itself has to say about the error.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace bf::glue {

using torch::stable::Tensor;

// A plain RuntimeError: STD_TORCH_CHECK would put the build's paths into the message.
inline void check(bool ok, const char* message) {
  if (__builtin_expect(!ok, 0)) throw std::runtime_error(message);
}

inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

// kDtypes if it is none of ours.
inline Dtype dtype_of(const Tensor& t) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(), aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  int32_t code = dtype_code(t);
  for (int i = 0; i < kDtypes; ++i) {
    if (code == codes[i]) return static_cast<Dtype>(i);
  }
  return kDtypes;
}
inline int32_t result_code(Dtype dtype) { return dtype == kFloat64 ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(); }

// A fresh contiguous tensor; the shim skips the name look-up that new_empty makes at every call.
inline Tensor empty(std::initializer_list<int64_t> sizes, int32_t dtype, int32_t device_type, int32_t device_index) {
  int64_t strides[4], step = 1;
  for (int64_t d = static_cast<int64_t>(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = step;
    step *= sizes.begin()[d];
  }
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, device_type, device_index, &handle));
  return Tensor(handle);
}

}  // namespace bf::glue
