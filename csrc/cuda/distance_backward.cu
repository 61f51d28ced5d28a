// The gradient of the row distances: elementwise, but for the maximum, whose ties are counted first.
#include "device.cuh"

namespace bf::cuda {
namespace {

struct Args {
  const void *x, *y;
  const float *w, *grad, *out;
  void* gx;
  int64_t d, x_stride, y_stride, gx_stride, pieces, units;
  int lanes, norm, reduction;
  double divisor;
  int64_t *unit_ties, *ties;   // of rows in several pieces
};

BF_DEVICE float sign(float d) { return float(d > 0) - float(d < 0); }

// Calls f(j, differences, weights, width or 0 for a tail) over this thread's share of a unit.
template <class T, bool W, class F> BF_DEVICE void walk(const Args& a, const Place& at, int lane, uintptr_t also, F&& f) {
  constexpr int wide = kWide<T>, U = 2;
  const T* x = static_cast<const T*>(a.x) + at.row * a.x_stride + at.start;
  const T* y = static_cast<const T*>(a.y) + at.row * a.y_stride + at.start;
  const float* w = W ? a.w + at.start : nullptr;
  const int count = static_cast<int>(at.count), step = a.lanes * wide;
  auto weights = [&](int j, int n) {
    Floats<T> weight{};
    if (W) {
#pragma unroll
      for (int i = 0; i < wide; ++i) weight.at[i] = i < n ? w[j + i] : 0.0f;
    }
    return weight;
  };
  auto difference = [](Floats<T> p, const Floats<T>& q) {
#pragma unroll
    for (int i = 0; i < wide; ++i) p.at[i] -= q.at[i];
    return p;
  };
  by_width<T>(address(x) | address(y) | also, [&](auto width) {
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
      for (int u = 0; u < U; ++u) f(j + u * step, difference(unpack<T>(p[u]), unpack<T>(q[u])), weights(j + u * step, wide), width);
    }
    for (; j + wide <= count; j += step) f(j, difference(unpack<T>(load<T, B>(x + j)), unpack<T>(load<T, B>(y + j))), weights(j, wide), width);
    if (j < count) f(j, difference(load_some(x + j, count - j), load_some(y + j, count - j)), weights(j, count - j), Int<0>());
  });
}

template <class T, bool W> BF_DEVICE double count_ties(const Args& a, const Place& at, int lane, float top) {
  int hits = 0;
  walk<T, W>(a, at, lane, 0, [&](int j, const Floats<T>& d, const Floats<T>& w, auto) {
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) hits += j + i < at.count && magnitude(W ? d.at[i] * w.at[i] : d.at[i]) == magnitude(top);
  });
  return hits;
}

template <class T, bool W> __global__ void __launch_bounds__(kThreads) ties(const __grid_constant__ Args a) {
  const int lanes = a.lanes, groups = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < a.units; first += int64_t(gridDim.x) * groups) {
    const int64_t unit = first + threadIdx.x / lanes;
    double hits[1] = {0};
    if (unit < a.units) {
      const Place at = place_of(unit, a.pieces, a.d);
      hits[0] = count_ties<T, W>(a, at, lane, a.out[at.row]);
    }
    sum_over(hits, lanes);
    if (lane == 0 && unit < a.units) a.unit_ties[unit] = static_cast<int64_t>(hits[0]);
  }
}

__global__ void __launch_bounds__(kThreads) add_ties(const __grid_constant__ Args a, int64_t n) {
  for (int64_t row = blockIdx.x; row < n; row += gridDim.x) {
    double hits[1] = {0};   // counts are exact in double
    for (int64_t u = threadIdx.x; u < a.pieces; u += kThreads) hits[0] += double(a.unit_ties[row * a.pieces + u]);
    sum_over(hits, kThreads);
    if (threadIdx.x == 0) a.ties[row] = static_cast<int64_t>(hits[0]);
  }
}

template <class T, bool W> __global__ void __launch_bounds__(kThreads, 3) backward(const __grid_constant__ Args a) {
  constexpr int wide = kWide<T>;
  const int lanes = a.lanes, groups = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < a.units; first += int64_t(gridDim.x) * groups) {
    const int64_t unit = first + threadIdx.x / lanes;
    const bool live = unit < a.units;
    const Place at = live ? place_of(unit, a.pieces, a.d) : Place{0, 0, 0};
    const float out = a.out[at.row];
    const double upstream = a.grad[at.row];
    double factor;
    if (a.norm == kMax) {
      double hits[1];
      if (a.pieces > 1) {
        hits[0] = static_cast<double>(a.ties[at.row]);
      } else {
        hits[0] = live ? count_ties<T, W>(a, at, lane, out) : 0;
        sum_over(hits, lanes);
      }
      factor = out != out ? out : upstream / hits[0];   // a NaN maximum makes the whole row NaN, as in amax
    } else if (a.norm == kTwo) {
      factor = a.reduction != kRoot ? 2 * upstream / a.divisor : out == 0 ? 0 : upstream / out;
    } else {
      factor = upstream / a.divisor;
    }
    if (!live) continue;
    const float c = static_cast<float>(factor);
    T* g = static_cast<T*>(a.gx) + at.row * a.gx_stride + at.start;
    walk<T, W>(a, at, lane, address(g), [&](int j, const Floats<T>& d, const Floats<T>& w, auto width) {
      Floats<T> slope;
#pragma unroll
      for (int i = 0; i < wide; ++i) {
        float s = d.at[i];
        if (a.norm == kOne) s = sign(s);
        if (a.norm == kMax) s = magnitude(W ? s * w.at[i] : s) == magnitude(out) ? sign(s) : 0.0f;
        slope.at[i] = c * (W ? s * w.at[i] : s);
      }
      if constexpr (decltype(width)::value == 0) store_some(g + j, slope, at.count - j);
      else store<T, decltype(width)::value>(g + j, slope);
    });
  }
}

}  // namespace

const char* distance_backward(const Rows& r, const float* weight, Norm norm, Reduction reduction, const float* grad, const float* out, void* gx,
                              int64_t gx_stride, void* scratch, Stream stream) {
  if (r.n == 0) return nullptr;
  const RowPlan plan = plan_rows(r.n, r.d, size_of(r.dtype));
  Args a{r.x, r.y, weight, grad, out, gx, r.d, r.x_stride, r.y_stride, gx_stride, plan.pieces, plan.units, plan.lanes, norm, reduction,
         reduction == kMean ? double(r.d) : 1.0, static_cast<int64_t*>(scratch), static_cast<int64_t*>(scratch) + plan.units};
  return by_dtype(r.dtype, [&](auto* type) -> const char* {
    using T = std::remove_pointer_t<decltype(type)>;
    const unsigned grid = grid_of(plan.blocks);
    if (norm == kMax && plan.pieces > 1) {
      if (weight) ties<T, true><<<grid, kThreads, 0, native(stream)>>>(a);
      else ties<T, false><<<grid, kThreads, 0, native(stream)>>>(a);
      if (const char* error = launch_error()) return error;
      add_ties<<<grid_of(r.n), kThreads, 0, native(stream)>>>(a, r.n);
      if (const char* error = launch_error()) return error;
    }
    if (weight) backward<T, true><<<grid, kThreads, 0, native(stream)>>>(a);
    else backward<T, false><<<grid, kThreads, 0, native(stream)>>>(a);
    return launch_error();
  });
}

}  // namespace bf::cuda
