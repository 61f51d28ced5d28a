// Row distances: one pass over x and x_hat. Long rows are cut into pieces whose sums a second kernel adds in order.
#include "device.cuh"

namespace bf::cuda {
namespace {

struct Args {
  const void *x, *y;
  const float* w;
  int64_t d, x_stride, y_stride, pieces, units;
  int lanes, reduction;
  double divisor;
  float* out;
  void* partial;   // a double a unit, or the bits of a maximum
};

BF_DEVICE float finished(double total, int norm, int reduction, double divisor) {
  return static_cast<float>(reduction == kRoot && norm == kTwo ? sqrt(total) : total / divisor);
}

template <class T, bool W, int WIDTH> BF_DEVICE Floats<T> weights(const float* w) {
  Floats<T> f{};
  if constexpr (W && WIDTH == 16) {
#pragma unroll
    for (int i = 0; i < kWide<T>; i += 4) {
      const float4 v = *reinterpret_cast<const float4*>(w + i);
      f.at[i] = v.x, f.at[i + 1] = v.y, f.at[i + 2] = v.z, f.at[i + 3] = v.w;
    }
  } else if constexpr (W) {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) f.at[i] = w[i];
  }
  return f;
}

// Four sums, or maxima, so that adds do not wait for each other.
template <class T, int P, bool W> struct Part {
  float sum[4] = {0, 0, 0, 0};
  uint32_t top = 0;
  BF_DEVICE void add(const Floats<T>& x, const Floats<T>& y, const Floats<T>& w) {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      const float d = x.at[i] - y.at[i];
      if constexpr (P == kMax) top = max(top, magnitude(W ? d * w.at[i] : d));
      else if constexpr (P == kOne) sum[i % 4] += W ? fabsf(d) * w.at[i] : fabsf(d);
      else sum[i % 4] += W ? d * d * w.at[i] : d * d;
    }
  }
};

template <class T, int P, bool W>
__global__ void __launch_bounds__(kThreads, 3) forward(const __grid_constant__ Args a) {
  constexpr int wide = kWide<T>, U = W ? 2 : 4;   // loads of x and of y under way
  const int lanes = a.lanes, groups = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < a.units; first += int64_t(gridDim.x) * groups) {
    const int64_t unit = first + threadIdx.x / lanes;
    Part<T, P, W> part;
    Place at{0, 0, 0};
    if (unit < a.units) {
      at = place_of(unit, a.pieces, a.d);
      const T* x = static_cast<const T*>(a.x) + at.row * a.x_stride + at.start;
      const T* y = static_cast<const T*>(a.y) + at.row * a.y_stride + at.start;
      const float* w = W ? a.w + at.start : nullptr;
      const int count = static_cast<int>(at.count), step = lanes * wide;
      by_width<T>(address(x) | address(y) | address(w), [&](auto width) {
        constexpr int B = decltype(width)::value;
        int j = lane * wide;
        for (; j + (U - 1) * step + wide <= count; j += U * step) {
          uint4 p[U], q[U];
#pragma unroll
          for (int u = 0; u < U; ++u) {
            p[u] = load<T, B>(x + j + u * step);
            q[u] = load<T, B>(y + j + u * step);
          }
#pragma unroll
          for (int u = 0; u < U; ++u) part.add(unpack<T>(p[u]), unpack<T>(q[u]), weights<T, W, B>(w + j + u * step));
        }
        for (; j + wide <= count; j += step) part.add(unpack<T>(load<T, B>(x + j)), unpack<T>(load<T, B>(y + j)), weights<T, W, B>(w + j));
        if (j < count) {
          Floats<T> weight{};
          if (W) {
#pragma unroll
            for (int i = 0; i < wide; ++i) weight.at[i] = j + i < count ? w[j + i] : 0.0f;
          }
          part.add(load_some(x + j, count - j), load_some(y + j, count - j), weight);
        }
      });
    }
    if constexpr (P == kMax) {
      const uint32_t top = max_over(part.top, lanes);
      if (lane == 0 && unit < a.units) {
        if (a.pieces == 1) a.out[unit] = __uint_as_float(top);
        else static_cast<uint32_t*>(a.partial)[unit] = top;
      }
    } else {
      double total[1] = {(double(part.sum[0]) + part.sum[1]) + (double(part.sum[2]) + part.sum[3])};
      sum_over(total, lanes);
      if (lane == 0 && unit < a.units) {
        if (a.pieces == 1) a.out[unit] = finished(total[0], P, a.reduction, a.divisor);
        else static_cast<double*>(a.partial)[unit] = total[0];
      }
    }
  }
}

template <int P> __global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ Args a, int64_t n) {
  const int lanes = a.lanes, groups = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < n; first += int64_t(gridDim.x) * groups) {
    const int64_t row = first + threadIdx.x / lanes;
    const int64_t end = row < n ? (row + 1) * a.pieces : 0, start = row * a.pieces + lane;
    if constexpr (P == kMax) {
      uint32_t top = 0;
      for (int64_t u = start; u < end; u += lanes) top = max(top, static_cast<const uint32_t*>(a.partial)[u]);
      top = max_over(top, lanes);
      if (lane == 0 && row < n) a.out[row] = __uint_as_float(top);
    } else {
      double total[1] = {0};
#pragma unroll 4
      for (int64_t u = start; u < end; u += lanes) total[0] += static_cast<const double*>(a.partial)[u];
      sum_over(total, lanes);
      if (lane == 0 && row < n) a.out[row] = finished(total[0], P, a.reduction, a.divisor);
    }
  }
}

template <class T, int P> void run(const Args& a, int64_t blocks, Stream stream) {
  if (a.w) forward<T, P, true><<<grid_of(blocks), kThreads, 0, native(stream)>>>(a);
  else forward<T, P, false><<<grid_of(blocks), kThreads, 0, native(stream)>>>(a);
}

}  // namespace

const char* distance(const Rows& r, const float* weight, Norm norm, Reduction reduction, float* out, void* scratch, Stream stream) {
  if (r.n == 0) return nullptr;
  const RowPlan plan = plan_rows(r.n, r.d, size_of(r.dtype));
  Args a{r.x, r.y, weight, r.d, r.x_stride, r.y_stride, plan.pieces, plan.units, plan.lanes, reduction, reduction == kMean ? double(r.d) : 1.0, out, scratch};
  const char* error = by_dtype(r.dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if (norm == kOne) run<T, kOne>(a, plan.blocks, stream);
    else if (norm == kTwo) run<T, kTwo>(a, plan.blocks, stream);
    else run<T, kMax>(a, plan.blocks, stream);
    return launch_error();
  });
  if (error || plan.pieces == 1) return error;
  a.lanes = plan.pieces > 1024 ? kThreads : 32;
  const unsigned grid = grid_of(ceil_div(r.n, kThreads / a.lanes));
  if (norm == kOne) finish<kOne><<<grid, kThreads, 0, native(stream)>>>(a, r.n);
  else if (norm == kTwo) finish<kTwo><<<grid, kThreads, 0, native(stream)>>>(a, r.n);
  else finish<kMax><<<grid, kThreads, 0, native(stream)>>>(a, r.n);
  return launch_error();
}

}  // namespace bf::cuda
