// Feature distance loss over several layers in one launch; the gradient is written in the forward. mse without a margin is a single
// pass; else each row is read again, from cache, once its sums are known. Rows of several pieces need a second launch for that.
#include "device.cuh"
#include "loss.cuh"

namespace bf::cuda {
namespace {

BF_DEVICE int layer_of(const LossTable& table, int64_t block) {
  int l = 0;
  while (l + 1 < table.count && block >= table.layer[l + 1].first_block) ++l;
  return l;
}

constexpr double kEpsilon = 1e-8;
BF_DEVICE double at_least(double value, double least) { return value < least ? least : value; }   // NaN passes, as in clamp_min

// A row's loss from its sums, and the coefficients of its slope (times the layer's share).
BF_DEVICE double finish_row(const double* s, int kind, double d, const LossRule& rule, double share, LossSlope* slope) {
  double value, of_f, of_t = 0;
  if (kind == kMse) {
    value = s[0] / d;
    of_f = 2 / d;
  } else if (kind == kCosine) {
    const double length = sqrt(s[1]), f = at_least(length, kEpsilon), t = at_least(sqrt(s[2]), kEpsilon), similarity = s[0] / (f * t);
    value = 1 - similarity;
    of_f = length >= kEpsilon ? similarity / (f * f) : 0;
    of_t = -1 / (f * t);
  } else {
    const double length = sqrt(s[0]), t = at_least(sqrt(s[1]), kEpsilon);
    value = length / t;
    of_f = length == 0 ? 0 : 1 / (length * t);
  }
  bool past = false;
  if (rule.hinged) {
    // Past the margin the slope is 0 even where the input is infinite.
    past = value >= rule.margin;
    const double sign = value < rule.margin ? -1 : value;   // the latter is NaN, and stays so
    of_f *= sign;
    of_t *= sign;
    value = past ? 0 : rule.margin - value;
  }
  *slope = {static_cast<float>(of_f * share), static_cast<float>(of_t * share), past};
  return value;
}

template <class T, bool BOTH> BF_DEVICE Floats<T> slope_of(const Floats<T>& f, const Floats<T>& t, const LossSlope& c) {
  Floats<T> g;
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) {
    const float value = BOTH ? c.of_f * f.at[i] + c.of_t * t.at[i] : c.of_f * (f.at[i] - t.at[i]);
    g.at[i] = c.zero ? 0.0f : value;
  }
  return g;
}

// Visits this thread's share of a unit: use(j, f, t, width, count); width 0 marks the tail.
template <class T, int U, class F> BF_DEVICE void walk(const LossRow& layer, const Place& at, int lane, bool writes, F&& use) {
  constexpr int wide = kWide<T>;
  const T* f = static_cast<const T*>(layer.f) + at.row * layer.f_stride + at.start;
  const T* t = static_cast<const T*>(layer.t) + at.row * layer.t_stride + at.start;
  const T* g = static_cast<const T*>(layer.g) + at.row * layer.g_stride + at.start;
  const int count = static_cast<int>(at.count), step = layer.lanes * wide;
  by_width<T>(address(f) | address(t) | (writes ? address(g) : 0), [&](auto width) {
    constexpr int B = decltype(width)::value;
    int j = lane * wide;
    for (; j + (U - 1) * step + wide <= count; j += U * step) {
      uint4 p[U], q[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        p[u] = load<T, B>(f + j + u * step);
        q[u] = load<T, B>(t + j + u * step);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) use(j + u * step, unpack<T>(p[u]), unpack<T>(q[u]), width);
    }
    for (; j + wide <= count; j += step) use(j, unpack<T>(load<T, B>(f + j)), unpack<T>(load<T, B>(t + j)), width);
    if (j < count) use(j, load_some(f + j, count - j), load_some(t + j, count - j), Int<0>());
  });
}

template <class T, bool BOTH> BF_DEVICE void write_slope(const LossRow& layer, const Place& at, int j, const Floats<T>& f, const Floats<T>& t,
                                                         const LossSlope& c, Int<0>) {
  store_some(static_cast<T*>(layer.g) + at.row * layer.g_stride + at.start + j, slope_of<T, BOTH>(f, t, c), at.count - j);
}
template <class T, bool BOTH, int B> BF_DEVICE void write_slope(const LossRow& layer, const Place& at, int j, const Floats<T>& f, const Floats<T>& t,
                                                                const LossSlope& c, Int<B>) {
  store<T, B>(static_cast<T*>(layer.g) + at.row * layer.g_stride + at.start + j, slope_of<T, BOTH>(f, t, c));
}

template <class T, int KIND> __global__ void __launch_bounds__(kThreads) rows(const __grid_constant__ LossTable table, LossRule rule, LossScratch scratch) {
  constexpr int sums = KIND == kMse ? 1 : KIND == kCosine ? 3 : 2;
  for (int64_t block = blockIdx.x; block < table.blocks; block += gridDim.x) {
    const LossRow& layer = table.layer[layer_of(table, block)];
    const int lanes = layer.lanes, lane = threadIdx.x & (lanes - 1);
    const int64_t unit = (block - layer.first_block) * (kThreads / lanes) + threadIdx.x / lanes;
    const bool live = unit < layer.units, fused = KIND == kMse && !rule.hinged && layer.g;
    const Place at = live ? place_of(unit, layer.pieces, layer.d) : Place{0, 0, 0};
    double total[sums] = {};
    if (live) {
      float part[sums][2] = {};
      auto add = [&](const Floats<T>& f, const Floats<T>& t) {
#pragma unroll
        for (int i = 0; i < kWide<T>; ++i) {
          const float p = f.at[i], q = t.at[i], d = p - q;
          part[0][i % 2] += KIND == kCosine ? p * q : d * d;
          if constexpr (KIND == kCosine) {
            part[1][i % 2] += p * p;
            part[2][i % 2] += q * q;
          } else if constexpr (KIND == kRelative) {
            part[1][i % 2] += q * q;
          }
        }
      };
      if (fused) {
        const LossSlope slope{static_cast<float>(layer.share * 2 / double(layer.d)), 0, false};
        walk<T, 2>(layer, at, lane, true, [&](int j, const Floats<T>& f, const Floats<T>& t, auto width) {
          add(f, t);
          write_slope<T, false>(layer, at, j, f, t, slope, width);
        });
      } else {
        walk<T, 2>(layer, at, lane, false, [&](int, const Floats<T>& f, const Floats<T>& t, auto) { add(f, t); });
      }
#pragma unroll
      for (int k = 0; k < sums; ++k) total[k] = double(part[k][0]) + part[k][1];
    }
    sum_over(total, lanes);
    if (layer.pieces > 1) {
      if (live && lane == 0) {
        for (int k = 0; k < sums; ++k) scratch.sums[3 * (layer.first_unit + unit) + k] = total[k];
      }
      continue;
    }
    if (!live) continue;
    LossSlope slope;
    const double value = finish_row(total, KIND, double(layer.d), rule, layer.share, &slope);
    if (lane == 0) scratch.values[layer.first_row + at.row] = value;
    if (layer.g && !fused) {
      walk<T, 2>(layer, at, lane, true, [&](int j, const Floats<T>& f, const Floats<T>& t, auto width) {
        write_slope<T, KIND == kCosine>(layer, at, j, f, t, slope, width);
      });
    }
  }
}

// Rows of several pieces: their sums in order, the value, and the slope's coefficients for the next kernel. One warp a row.
template <int KIND> __global__ void __launch_bounds__(kThreads) finish(const __grid_constant__ LossTable table, LossRule rule, LossScratch scratch) {
  constexpr int sums = KIND == kMse ? 1 : KIND == kCosine ? 3 : 2;
  for (int l = 0; l < table.count; ++l) {
    const LossRow& layer = table.layer[l];
    if (layer.pieces == 1) continue;
    for (int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32; row < layer.n; row += int64_t(gridDim.x) * (kThreads / 32)) {
      double total[sums] = {};
      for (int64_t piece = threadIdx.x % 32; piece < layer.pieces; piece += 32) {
#pragma unroll
        for (int k = 0; k < sums; ++k) total[k] += scratch.sums[3 * (layer.first_unit + row * layer.pieces + piece) + k];
      }
      sum_over(total, 32);
      LossSlope slope;
      const double value = finish_row(total, KIND, double(layer.d), rule, layer.share, &slope);
      if (threadIdx.x % 32 == 0) {
        scratch.values[layer.first_row + row] = value;
        scratch.slopes[layer.first_row + row] = slope;
      }
    }
  }
}

template <class T, bool BOTH> __global__ void __launch_bounds__(kThreads) slopes(const __grid_constant__ LossTable table, LossScratch scratch) {
  for (int64_t block = blockIdx.x; block < table.blocks; block += gridDim.x) {
    const LossRow& layer = table.layer[layer_of(table, block)];
    if (layer.pieces == 1 || !layer.g) continue;   // several pieces: one block a unit
    const Place at = place_of(block - layer.first_block, layer.pieces, layer.d);
    const LossSlope slope = scratch.slopes[layer.first_row + at.row];
    walk<T, 2>(layer, at, threadIdx.x, true, [&](int j, const Floats<T>& f, const Floats<T>& t, auto width) {
      write_slope<T, BOTH>(layer, at, j, f, t, slope, width);
    });
  }
}

template <class T, int KIND> const char* launch(const LossTable& table, const LossRule& rule, const LossScratch& scratch, Stream stream) {
  const unsigned grid = grid_of(table.blocks);
  rows<T, KIND><<<grid, kThreads, 0, native(stream)>>>(table, rule, scratch);
  if (const char* error = launch_error()) return error;
  int64_t longest = 0;
  bool gradient = false;
  for (int l = 0; l < table.count; ++l) {
    if (table.layer[l].pieces == 1) continue;
    longest = most(longest, table.layer[l].n);
    gradient = gradient || table.layer[l].g;
  }
  if (longest == 0) return nullptr;
  finish<KIND><<<grid_of(ceil_div(longest, kThreads / 32)), kThreads, 0, native(stream)>>>(table, rule, scratch);
  if (const char* error = launch_error()) return error;
  if (!gradient || (KIND == kMse && !rule.hinged)) return nullptr;
  slopes<T, KIND == kCosine><<<grid, kThreads, 0, native(stream)>>>(table, scratch);
  return launch_error();
}

// A warp's or block's sum is in `values` by now: the total in a fixed order, layer by layer.
__global__ void __launch_bounds__(kThreads) add_values(const double* values, double* sums, int64_t n) {
  for (int64_t block = blockIdx.x; block < ceil_div(n, kValueBlock); block += gridDim.x) {
    double total[1] = {0};
    const int64_t end = least(n, (block + 1) * kValueBlock);
#pragma unroll 4
    for (int64_t i = block * kValueBlock + threadIdx.x; i < end; i += kThreads) total[0] += values[i];
    sum_over(total, kThreads);
    if (threadIdx.x == 0) sums[block] = total[0];
  }
}
__global__ void __launch_bounds__(kThreads) total_mean(const __grid_constant__ LossTotals totals, float* out, bool add) {
  double sum = 0;
  for (int l = 0; l < totals.count; ++l) {
    const LossTotal& layer = totals.layer[l];
    double part[1] = {0};
#pragma unroll 4
    for (int64_t i = threadIdx.x; i < layer.count; i += kThreads) part[0] += layer.values[i];
    sum_over(part, kThreads);
    sum += layer.weight * (part[0] / double(layer.n));   // NaN for an empty batch, as torch's mean
  }
  if (threadIdx.x == 0) *out = static_cast<float>(add ? *out + sum : sum);
}
__global__ void __launch_bounds__(kThreads) total_none(const __grid_constant__ LossTotals totals, float* out, int64_t n, bool add) {
  for (int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x; i < n; i += int64_t(gridDim.x) * kThreads) {
    double sum = add ? out[i] : 0;
    for (int l = 0; l < totals.count; ++l) sum += totals.layer[l].weight * totals.layer[l].values[i];
    out[i] = static_cast<float>(sum);
  }
}

const char* total(const LossLayer* layers, int64_t count, bool mean, float* out, const LossScratch& scratch, Stream stream) {
  const double* values = scratch.values;
  double* sums = scratch.value_sums;
  for (int64_t first = 0; first < count; first += kMostTotals) {
    LossTotals totals{};
    totals.count = static_cast<int>(least(kMostTotals, count - first));
    for (int l = 0; l < totals.count; ++l) {
      const LossLayer& layer = layers[first + l];
      const int64_t n = layer.rows.n;
      totals.layer[l] = {values, n, n, layer.weight};
      if (mean && n > kValueBlock) {
        const int64_t blocks = ceil_div(n, kValueBlock);
        add_values<<<grid_of(blocks), kThreads, 0, native(stream)>>>(values, sums, n);
        if (const char* error = launch_error()) return error;
        totals.layer[l].values = sums;
        totals.layer[l].count = blocks;
        sums += blocks;
      }
      values += n;
    }
    const int64_t n = layers[0].rows.n;
    if (mean) total_mean<<<1, kThreads, 0, native(stream)>>>(totals, out, first > 0);
    else if (n) total_none<<<grid_of(least(ceil_div(n, kThreads), 4096)), kThreads, 0, native(stream)>>>(totals, out, n, first > 0);
    if (const char* error = launch_error()) return error;
  }
  return nullptr;
}

}  // namespace

int64_t feature_loss_scratch(const LossLayer* layers, int64_t count) {
  int64_t units = 0, values = 0, sums = 0;
  for (int64_t l = 0; l < count; ++l) {
    const RowPlan plan = plan_rows(layers[l].rows.n, layers[l].rows.d, size_of(layers[l].rows.dtype));
    units += plan.pieces > 1 ? plan.units : 0;
    values += plan.n;
    sums += ceil_div(plan.n, kValueBlock);
  }
  return (3 * units + values + sums) * 8 + values * int64_t(sizeof(LossSlope));
}

const char* feature_loss(const LossLayer* layers, int64_t count, Kind kind, const double* margin, bool mean, float* out, void* memory, Stream stream) {
  int64_t units = 0, values = 0, sums = 0;
  for (int64_t l = 0; l < count; ++l) {
    const RowPlan plan = plan_rows(layers[l].rows.n, layers[l].rows.d, size_of(layers[l].rows.dtype));
    units += plan.pieces > 1 ? plan.units : 0;
    values += plan.n;
    sums += ceil_div(plan.n, kValueBlock);
  }
  LossScratch scratch{};
  scratch.sums = static_cast<double*>(memory);
  scratch.values = scratch.sums + 3 * units;
  scratch.value_sums = scratch.values + values;
  scratch.slopes = reinterpret_cast<LossSlope*>(scratch.value_sums + sums);
  const LossRule rule{margin ? *margin : 0, margin != nullptr};
  // One launch a dtype, and as many layers a launch as its parameters hold.
  for (Dtype dtype : {kFloat32, kBFloat16, kFloat16}) {
    LossTable table{};
    int64_t first_row = 0, first_unit = 0;
    for (int64_t l = 0; l < count; ++l) {
      const LossLayer& layer = layers[l];
      const Rows& r = layer.rows;
      const RowPlan plan = plan_rows(r.n, r.d, size_of(r.dtype));
      if (r.dtype == dtype && r.n > 0) {
        table.layer[table.count++] = {r.x, r.y, layer.g, r.n, r.d, r.x_stride, r.y_stride, layer.g_stride, plan.pieces, plan.units, table.blocks,
                                      first_unit, first_row, layer.share, plan.lanes};
        table.blocks += plan.blocks;
      }
      first_row += r.n;
      first_unit += plan.pieces > 1 ? plan.units : 0;
      if (table.count == 0 || (table.count < kMostLayers && l + 1 < count)) continue;
      const char* error = by_dtype(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        return kind == kMse ? launch<T, kMse>(table, rule, scratch, stream)
               : kind == kCosine ? launch<T, kCosine>(table, rule, scratch, stream)
                                 : launch<T, kRelative>(table, rule, scratch, stream);
      });
      if (error) return error;
      table = LossTable{};
    }
  }
  return total(layers, count, mean, out, scratch, stream);
}

}  // namespace bf::cuda
