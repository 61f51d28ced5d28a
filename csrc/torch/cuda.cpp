// CUDA kernels of the ops, in a library of its own that is only loaded where torch has CUDA.
#include <Python.h>

#include <optional>

#include "../cuda/distance.h"
#include "tensors.h"

namespace bf::glue {
namespace {

Tensor distance(const Tensor& x, const Tensor& x_hat, const std::optional<Tensor>& weight, double p, int64_t reduction) {
  check(x.is_cuda() && x_hat.is_cuda() && x.get_device_index() == x_hat.get_device_index(), "beniful_fast: both tensors must be on one CUDA device");
  check(p == 2 && reduction == kMean && !weight, "beniful_fast: the CUDA kernel takes p = 2, reduction mean and no weight");
  check(dtype_of(x) == kFloat32 && dtype_of(x_hat) == kFloat32, "beniful_fast: the CUDA kernel takes float32");
  check(x.is_contiguous() && x_hat.is_contiguous(), "beniful_fast: the CUDA kernel takes contiguous tensors");
  check(x.dim() >= 2 && x.dim() == x_hat.dim(), "beniful_fast: both tensors need one shape (N, ...)");
  int64_t d = 1;
  for (int64_t i = 0; i < x.dim(); ++i) {
    check(x.size(i) == x_hat.size(i), "beniful_fast: both tensors need one shape (N, ...)");
    if (i) d *= x.size(i);
  }
  check(d > 0, "beniful_fast: rows must not be empty");
  const int32_t device = x.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  Tensor out = empty({x.size(0)}, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device);
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  const char* error = bf::cuda::distance_mean_square(static_cast<const float*>(x.const_data_ptr()), static_cast<const float*>(x_hat.const_data_ptr()),
                                                     static_cast<float*>(out.mutable_data_ptr()), x.size(0), d, stream);
  check(error == nullptr, error);
  return out;
}

}  // namespace
}  // namespace bf::glue

STABLE_TORCH_LIBRARY_IMPL(beniful_fast, CUDA, m) { m.impl("distance", TORCH_BOX(&bf::glue::distance)); }

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C_cuda", "CUDA kernels of beniful_fast.", -1, nullptr, nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC PyInit__C_cuda(void) {
  PyObject* module = PyModule_Create(&definition);
  // The loader compares it with torch's own CUDA before it offers the backend.
  if (module && PyModule_AddIntConstant(module, "cuda_major", BF_CUDA_MAJOR) < 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
