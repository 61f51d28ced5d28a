// C entry points of the emulated kernels, for ctypes.
#include "kernels.h"

#include "cuda_runtime.h"

namespace bf {
// Layout planning lives with the CPU's drivers, whose kernels are not needed here.
const DistanceKernels& distance_kernels() { std::abort(); }
const LossKernels& loss_kernels() { std::abort(); }
const StatsKernels& stats_kernels() { std::abort(); }
}  // namespace bf

using namespace bf;

extern "C" {

void set_machine(int order, int shared_limit, int processors) {
  host_cuda::machine.order = order;
  host_cuda::shared_limit = shared_limit;
  host_cuda::processors = processors;
}
const char* emulated_distance(const Rows* rows, const float* weight, int norm, int reduction, float* out) {
  std::vector<double> scratch(cuda::plan_rows(rows->n, rows->d, cuda::size_of(rows->dtype)).units + 1, NAN);
  return cuda::distance(*rows, weight, Norm(norm), Reduction(reduction), out, scratch.data(), nullptr);
}
const char* emulated_distance_backward(const Rows* rows, const float* weight, int norm, int reduction, const float* grad, const float* out, void* gx, int64_t stride) {
  std::vector<double> scratch(cuda::plan_rows(rows->n, rows->d, cuda::size_of(rows->dtype)).units + rows->n + 1, NAN);
  return cuda::distance_backward(*rows, weight, Norm(norm), Reduction(reduction), grad, out, gx, stride, scratch.data(), nullptr);
}
const char* emulated_feature_loss(const cuda::LossLayer* layers, int64_t count, int kind, const double* margin, int mean, float* out) {
  std::vector<double> scratch(cuda::feature_loss_scratch(layers, count) / 8 + 2, NAN);
  return cuda::feature_loss(layers, count, Kind(kind), margin, mean != 0, out, scratch.data(), nullptr);
}
const char* emulated_scale(const Rows* rows, int64_t count, const float* upstream, int64_t stride) {
  return cuda::scale(rows, count, upstream, stride, nullptr);
}
const char* emulated_channel_stats(const void* x, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t dim, int per_sample, int dtype, float* linf,
                                   double* l1, double* sumsq) {
  const StatsPlan plan = plan_stats(dims, sizes, strides, dim, per_sample != 0);
  if (!plan.ok) return "no walk";
  std::vector<double> scratch(cuda::stats_scratch(plan, x, Dtype(dtype), per_sample != 0) / 8 + 2, NAN);
  return cuda::channel_stats(plan, x, Dtype(dtype), per_sample != 0, {linf, l1, sumsq}, scratch.data(), nullptr);
}
const char* emulated_vae_distance(const cuda::VaeArgs* args, int dtype) { return cuda::vae_distance(*args, Dtype(dtype), nullptr); }

}
