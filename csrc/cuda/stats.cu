// Per-channel max |x|, sum |x| and sum x^2 in one pass: along planes (NCHW) or across rows (channels_last, tokens, (N, C)).
// Units write partials, a second kernel combines them in order; a unit that is a whole result writes it itself.
#include "device.cuh"

namespace bf::cuda {
namespace {

struct Args {
  const void* x;
  int64_t samples, channels, inner, sample_stride, channel_stride, row_stride;
  StatsCut cut;
  uint32_t* top;   // partials, or null: straight into out
  double *l1, *sumsq;
  StatsOut out;
};

BF_DEVICE void put(const Args& a, int64_t at, uint32_t top, double l1, double sumsq) {
  if (a.top) {
    a.top[at] = top;
    a.l1[at] = l1;
    a.sumsq[at] = sumsq;
  } else {
    if (a.out.linf) a.out.linf[at] = __uint_as_float(top);
    if (a.out.l1) a.out.l1[at] = l1;
    if (a.out.sumsq) a.out.sumsq[at] = sumsq;
  }
}

// Steps through (sample, vector) pairs, so that loads of short planes of several samples are under way together.
template <class T> __global__ void __launch_bounds__(kThreads, 4) planes(const __grid_constant__ Args a) {
  constexpr int wide = kWide<T>, U = 4;
  const StatsCut& cut = a.cut;
  const int lanes = cut.lanes, groups = kThreads / lanes, lane = threadIdx.x & (lanes - 1);
  for (int64_t first = int64_t(blockIdx.x) * groups; first < cut.units; first += int64_t(gridDim.x) * groups) {
    const int64_t unit = first + threadIdx.x / lanes;
    uint32_t top = 0;
    float l1[2] = {0, 0}, sumsq[2] = {0, 0};
    if (unit < cut.units) {
      // Samples outside, channels inside: neighbouring groups read neighbouring planes.
      const int64_t plane = cut.pieces == 1 ? unit : unit / cut.pieces, outer = plane / a.channels, channel = plane - outer * a.channels;
      const int64_t start = (unit - plane * cut.pieces) * kPiece, sample = outer * cut.block;
      const int count = static_cast<int>(least(a.inner - start, kPiece)), step = lanes * wide, begin = lane * wide;
      const T* x = static_cast<const T*>(a.x) + sample * a.sample_stride + channel * a.channel_stride + start;
      const int samples = static_cast<int>(least(cut.block, a.samples - sample));
      const int full = count >= begin + wide ? (count - begin - wide) / step + 1 : 0;   // whole vectors of this lane in a plane
      auto add = [&](const Floats<T>& v) {
#pragma unroll
        for (int i = 0; i < wide; ++i) {
          top = max(top, magnitude(v.at[i]));
          l1[i % 2] += fabsf(v.at[i]);
          sumsq[i % 2] += v.at[i] * v.at[i];
        }
      };
      by_width<T>(address(x) | (samples > 1 ? uintptr_t(a.sample_stride) * sizeof(T) : 0), [&](auto width) {
        constexpr int B = decltype(width)::value;
        const int total = samples * full;
        const T* p = x + begin;
        int k = 0, done = 0;
        auto next = [&] {
          const uint4 v = load<T, B>(p + int64_t(k) * step);
          if (++k == full) {
            k = 0;
            p += a.sample_stride;
          }
          return v;
        };
        for (; done + U <= total; done += U) {
          uint4 v[U];
#pragma unroll
          for (int u = 0; u < U; ++u) v[u] = next();
#pragma unroll
          for (int u = 0; u < U; ++u) add(unpack<T>(v[u]));
        }
        for (; done < total; ++done) add(unpack<T>(next()));
      });
      const int tail = begin + full * step;   // one lane at most has elements left in each plane
      if (tail < count) {
        for (int s = 0; s < samples; ++s) add(load_some(x + s * a.sample_stride + tail, count - tail));
      }
    }
    top = max_over(top, lanes);
    double totals[2] = {double(l1[0]) + l1[1], double(sumsq[0]) + sumsq[1]};
    sum_over(totals, lanes);
    if (lane == 0 && unit < cut.units) put(a, unit, top, totals[0], totals[1]);
  }
}

// EACH elements a load: 16 bytes, 4, or one element.
template <class T, int EACH> struct Group {
  float at[EACH];
};
template <class T, int EACH> BF_DEVICE Group<T, EACH> group_at(const T* p) {
  if constexpr (EACH == kWide<T>) {
    const Floats<T> f = unpack<T>(load<T, 16>(p));
    Group<T, EACH> g;
#pragma unroll
    for (int i = 0; i < EACH; ++i) g.at[i] = f.at[i];
    return g;
  } else if constexpr (EACH == 2) {
    const float2 f = two_floats(*reinterpret_cast<const uint32_t*>(p), T());
    return {f.x, f.y};
  } else {
    return {to_float(*p)};
  }
}

template <class T, int EACH> __global__ void __launch_bounds__(kThreads, EACH == 8 ? 3 : 4) across(const __grid_constant__ Args a) {
  constexpr int U = EACH > 1 ? 4 : 8;
  __shared__ uint32_t tops[kThreads * EACH];
  __shared__ float l1s[kThreads * EACH], sumsqs[kThreads * EACH];
  const StatsCut& cut = a.cut;
  const int across = cut.lanes, along = kThreads / across, tx = threadIdx.x & (across - 1), ty = threadIdx.x / across, width = across * EACH;
  for (int64_t unit = blockIdx.x; unit < cut.units; unit += gridDim.x) {
    const int64_t outer = unit / cut.tiles, tile = unit - outer * cut.tiles, sample = outer / cut.row_blocks;
    const int64_t first = (outer - sample * cut.row_blocks) * cut.block;
    const int rows = static_cast<int>(least(cut.block, a.inner - first));
    const int64_t column = tile * width + tx * EACH;
    uint32_t top[EACH] = {};
    float l1[EACH] = {}, sumsq[EACH] = {};
    if (column < a.channels) {
      const T* x = static_cast<const T*>(a.x) + sample * a.sample_stride + (first + ty) * a.row_stride + column;
      const int64_t step = along * a.row_stride;
      auto add = [&](const Group<T, EACH>& v) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
          top[i] = max(top[i], magnitude(v.at[i]));
          l1[i] += fabsf(v.at[i]);
          sumsq[i] += v.at[i] * v.at[i];
        }
      };
      int r = ty;
      for (; r + (U - 1) * along < rows; r += U * along, x += U * step) {
        Group<T, EACH> v[U];
#pragma unroll
        for (int u = 0; u < U; ++u) v[u] = group_at<T, EACH>(x + u * step);
#pragma unroll
        for (int u = 0; u < U; ++u) add(v[u]);
      }
      for (; r < rows; r += along, x += step) add(group_at<T, EACH>(x));
    }
    __syncthreads();   // the last round's readers are done
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int to = ty * width + tx * EACH + i;
      tops[to] = top[i];
      l1s[to] = l1[i];
      sumsqs[to] = sumsq[i];
    }
    __syncthreads();
    const int64_t channel = tile * width + threadIdx.x;
    if (int(threadIdx.x) < width && channel < a.channels) {
      uint32_t all = 0;
      double total = 0, squares = 0;
      for (int y = 0; y < along; ++y) {
        const int from = y * width + threadIdx.x;
        all = max(all, tops[from]);
        total += l1s[from];
        squares += sumsqs[from];
      }
      put(a, outer * a.channels + channel, all, total, squares);
    }
  }
}

// 32 results a block, 8 threads each: partials are read along channels.
__global__ void __launch_bounds__(kThreads) combine(const __grid_constant__ Args a, int64_t results, int64_t each) {
  __shared__ uint32_t tops[8][32];
  __shared__ double l1s[8][32], sumsqs[8][32];
  const int tx = threadIdx.x % 32, ty = threadIdx.x / 32;
  const int64_t pieces = a.cut.pieces, partials = each * pieces;
  for (int64_t first = int64_t(blockIdx.x) * 32; first < results; first += int64_t(gridDim.x) * 32) {
    const int64_t result = first + tx;
    uint32_t top = 0;
    double l1 = 0, sumsq = 0;
    if (result < results) {
      const int64_t sample = result / a.channels, channel = result - sample * a.channels;
#pragma unroll 4
      for (int64_t q = ty; q < partials; q += 8) {
        const int64_t outer = pieces == 1 ? q : q / pieces, from = ((sample * each + outer) * a.channels + channel) * pieces + (q - outer * pieces);
        top = max(top, a.top[from]);
        l1 += a.l1[from];
        sumsq += a.sumsq[from];
      }
    }
    __syncthreads();
    tops[ty][tx] = top;
    l1s[ty][tx] = l1;
    sumsqs[ty][tx] = sumsq;
    __syncthreads();
    if (ty == 0 && result < results) {
      for (int y = 1; y < 8; ++y) {
        top = max(top, tops[y][tx]);
        l1 += l1s[y][tx];
        sumsq += sumsqs[y][tx];
      }
      if (a.out.linf) a.out.linf[result] = __uint_as_float(top);
      if (a.out.l1) a.out.l1[result] = l1;
      if (a.out.sumsq) a.out.sumsq[result] = sumsq;
    }
  }
}

// The widest load that every row of every sample admits.
int64_t row_width(const StatsPlan& plan, const void* x, int64_t size) {
  uintptr_t all = reinterpret_cast<uintptr_t>(x) | uintptr_t(plan.channels * size);
  if (plan.inner > 1) all |= uintptr_t(plan.row_stride * size);
  if (plan.samples > 1) all |= uintptr_t(plan.sample_stride * size);
  return all % 16 == 0 ? 16 : all % 4 == 0 ? 4 : size;
}
StatsCut cut_of(const StatsPlan& plan, const void* x, int64_t size, bool per_sample) {
  return plan.by_rows ? cut_rows(plan.samples, plan.channels, plan.inner, size, row_width(plan, x, size))
                      : cut_planes(plan.samples, plan.channels, plan.inner, size, per_sample);
}
int64_t partials_of(const StatsCut& cut, int64_t channels) { return cut.outer * channels * cut.pieces; }

}  // namespace

int64_t stats_scratch(const StatsPlan& plan, const void* x, Dtype dtype, bool per_sample) {
  return partials_of(cut_of(plan, x, size_of(dtype), per_sample), plan.channels) * 20;
}

const char* channel_stats(const StatsPlan& plan, const void* x, Dtype dtype, bool per_sample, const StatsOut& out, void* scratch, Stream stream) {
  const int64_t results = (per_sample ? plan.samples : 1) * plan.channels;
  if (results == 0) return nullptr;
  Args a{x, plan.samples, plan.channels, plan.inner, plan.sample_stride, plan.channel_stride, plan.row_stride,
         cut_of(plan, x, size_of(dtype), per_sample), nullptr, nullptr, nullptr, out};
  const int64_t partials = partials_of(a.cut, plan.channels);
  if (partials != results) {
    a.l1 = static_cast<double*>(scratch);
    a.sumsq = a.l1 + partials;
    a.top = reinterpret_cast<uint32_t*>(a.sumsq + partials);
  }
  if (a.cut.units > 0) {
    const unsigned grid = grid_of(a.cut.blocks);
    const char* error = by_dtype(dtype, [&](auto* type) {
      using T = std::remove_pointer_t<decltype(type)>;
      if (!plan.by_rows) planes<T><<<grid, kThreads, 0, native(stream)>>>(a);
      else if (a.cut.each == kWide<T>) across<T, kWide<T>><<<grid, kThreads, 0, native(stream)>>>(a);
      else if (a.cut.each == 1) across<T, 1><<<grid, kThreads, 0, native(stream)>>>(a);
      else if constexpr (sizeof(T) == 2) across<T, 2><<<grid, kThreads, 0, native(stream)>>>(a);
      return launch_error();
    });
    if (error) return error;
  }
  if (partials == results) return nullptr;
  combine<<<grid_of(ceil_div(results, 32)), kThreads, 0, native(stream)>>>(a, results, per_sample ? (plan.samples ? a.cut.outer / plan.samples : 0) : a.cut.outer);
  return launch_error();
}

}  // namespace bf::cuda
