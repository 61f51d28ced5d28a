// Stored gradients times the upstream gradient, which is read on the device: where it is 1, nothing else is touched.
#include "device.cuh"

namespace bf::cuda {
namespace {

constexpr int kMostTensors = 64;
constexpr int64_t kScaleBlocks = 2048;   // a small grid: usually all of them only read the scalar

struct Tensors {
  struct One {
    void* g;
    int64_t d, stride, pieces, units, first;
    int lanes;
  } tensor[kMostTensors];
  int64_t blocks;
  int count;
};

template <class T> __global__ void __launch_bounds__(kThreads) multiply(const __grid_constant__ Tensors all, const float* upstream, int64_t stride) {
  if (stride == 0 && *upstream == 1.0f) return;
  for (int64_t block = blockIdx.x; block < all.blocks; block += gridDim.x) {
    int l = 0;
    while (l + 1 < all.count && block >= all.tensor[l + 1].first) ++l;
    const auto& one = all.tensor[l];
    const int64_t unit = (block - one.first) * (kThreads / one.lanes) + threadIdx.x / one.lanes;
    if (unit >= one.units) continue;
    const Place at = place_of(unit, one.pieces, one.d);
    const float factor = upstream[at.row * stride];
    if (factor == 1.0f) continue;
    T* g = static_cast<T*>(one.g) + at.row * one.stride + at.start;
    const int count = static_cast<int>(at.count);
    auto scaled = [&](Floats<T> v) {
#pragma unroll
      for (int i = 0; i < kWide<T>; ++i) v.at[i] *= factor;
      return v;
    };
    by_width<T>(address(g), [&](auto width) {
      constexpr int B = decltype(width)::value;
      int j = (threadIdx.x & (one.lanes - 1)) * kWide<T>;
#pragma unroll 4
      for (; j + kWide<T> <= count; j += one.lanes * kWide<T>) store<T, B>(g + j, scaled(unpack<T>(load<T, B, false>(g + j))));
      if (j < count) store_some(g + j, scaled(load_some<T>(g + j, count - j)), count - j);
    });
  }
}

}  // namespace

const char* scale(const Rows* gradients, int64_t count, const float* upstream, int64_t upstream_stride, Stream stream) {
  for (Dtype dtype : {kFloat32, kBFloat16, kFloat16}) {
    Tensors all{};
    for (int64_t l = 0; l < count; ++l) {
      const Rows& r = gradients[l];
      if (r.dtype == dtype && r.n > 0 && r.d > 0) {
        const RowPlan plan = plan_rows(r.n, r.d, size_of(dtype));
        all.tensor[all.count++] = {const_cast<void*>(r.x), r.d, r.x_stride, plan.pieces, plan.units, all.blocks, plan.lanes};
        all.blocks += plan.blocks;
      }
      if (all.count == 0 || (all.count < kMostTensors && l + 1 < count)) continue;
      const char* error = by_dtype(dtype, [&](auto* type) {
        multiply<std::remove_pointer_t<decltype(type)>><<<grid_of(least(all.blocks, kScaleBlocks)), kThreads, 0, native(stream)>>>(all, upstream, upstream_stride);
        return launch_error();
      });
      if (error) return error;
      all = Tensors{};
    }
  }
  return nullptr;
}

}  // namespace bf::cuda
