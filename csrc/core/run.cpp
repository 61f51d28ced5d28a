#include "run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "isa.h"

namespace bf {

namespace {

constexpr int64_t kAlone = 65536;   // below this many elements waking threads costs more than it brings
constexpr int64_t kGrain = 32768;

template <class F>
void split(const Parallel& parallel, int64_t units, int64_t elements, const F& f) {
  if (units <= 0) return;
  if (units == 1 || units <= kAlone / std::max<int64_t>(elements, 1)) return f(0, units);
  auto call = [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); };
  parallel.run(units, std::max<int64_t>(1, kGrain / std::max<int64_t>(elements, 1)), call, const_cast<F*>(&f), parallel.threads);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t chunks_of(int64_t d) { return ceil_div(d, kChunk); }

// Not std::vector: it would write zeros first.
template <class T> std::unique_ptr<T[]> scratch(int64_t n) { return std::unique_ptr<T[]>(new T[std::max<int64_t>(n, 1)]); }

uint64_t bits_of(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

void put(Dtype dtype, void* out, int64_t i, double value) {
  if (dtype == kFloat64) static_cast<double*>(out)[i] = value;
  else static_cast<float*>(out)[i] = static_cast<float>(value);
}

DistanceArgs distance_args(const Rows& r, const void* weight, Reduction reduction) {
  DistanceArgs a{};
  a.x = r.x;
  a.y = r.y;
  a.w = weight;
  a.d = r.d;
  a.x_stride = r.x_stride;
  a.y_stride = r.y_stride;
  a.chunks = chunks_of(r.d);
  a.divisor = reduction == kMean ? double(r.d) : 1.0;
  a.reduction = reduction;
  return a;
}

}  // namespace

int norm_of(double p) { return p == 1 ? kOne : p == 2 ? kTwo : p == std::numeric_limits<double>::infinity() ? kMax : -1; }

void distance(const Parallel& parallel, const Rows& r, const void* weight, Norm norm, Reduction reduction, void* out) {
  DistanceFn forward = distance_kernels().forward[r.dtype][norm][weight != nullptr];
  DistanceArgs a = distance_args(r, weight, reduction);
  a.out = out;
  std::unique_ptr<double[]> partial;
  if (a.chunks > 1) {
    partial = scratch<double>(r.n * a.chunks);
    a.partial = partial.get();
  }
  split(parallel, r.n * a.chunks, std::min(r.d, kChunk), [&](int64_t begin, int64_t end) { forward(a, begin, end); });
  if (a.chunks == 1) return;
  for (int64_t i = 0; i < r.n; ++i) {
    const double* p = a.partial + i * a.chunks;
    double value = p[0];
    for (int64_t k = 1; k < a.chunks; ++k) value = norm != kMax ? value + p[k] : bits_of(p[k]) > bits_of(value) ? p[k] : value;
    if (norm != kMax) value = reduction == kRoot && norm == kTwo ? std::sqrt(value) : value / a.divisor;
    put(r.dtype, out, i, value);
  }
}

void distance_backward(const Parallel& parallel, const Rows& r, const void* weight, Norm norm, Reduction reduction, const void* grad, const void* out,
                       void* gx, int64_t gx_stride) {
  const DistanceKernels& kernels = distance_kernels();
  DistanceArgs a = distance_args(r, weight, reduction);
  a.grad = grad;
  a.out = const_cast<void*>(out);
  a.gx = gx;
  a.gx_stride = gx_stride;
  const int64_t units = r.n * a.chunks, elements = std::min(r.d, kChunk);
  std::unique_ptr<int64_t[]> unit_ties, ties;
  if (norm == kMax) {
    unit_ties = scratch<int64_t>(units);
    ties = scratch<int64_t>(r.n);
    a.unit_ties = unit_ties.get();
    a.ties = ties.get();
    DistanceFn count = kernels.ties[r.dtype][weight != nullptr];
    split(parallel, units, elements, [&](int64_t begin, int64_t end) { count(a, begin, end); });
    for (int64_t i = 0; i < r.n; ++i) {
      ties[i] = 0;
      for (int64_t k = 0; k < a.chunks; ++k) ties[i] += unit_ties[i * a.chunks + k];
    }
  }
  DistanceFn backward = kernels.backward[r.dtype][norm][weight != nullptr];
  split(parallel, units, elements, [&](int64_t begin, int64_t end) { backward(a, begin, end); });
}

namespace {

constexpr double kEpsilon = 1e-8;

// NaN passes, as in clamp_min.
double at_least(double value, double least) { return value < least ? least : value; }

// A row's loss from its sums, and the coefficients of its slope (times constant).
double finish_loss(const double* s, Kind kind, int64_t d, const double* margin, double constant, double* coef) {
  double value, of_f, of_t = 0;
  if (kind == kMse) {
    value = s[0] / double(d);
    of_f = 2 / double(d);
  } else if (kind == kCosine) {
    double length = std::sqrt(s[1]), f = at_least(length, kEpsilon), t = at_least(std::sqrt(s[2]), kEpsilon), similarity = s[0] / (f * t);
    value = 1 - similarity;
    of_f = length >= kEpsilon ? similarity / (f * f) : 0;
    of_t = -1 / (f * t);
  } else {
    double length = std::sqrt(s[0]), t = at_least(std::sqrt(s[1]), kEpsilon);
    value = length / t;
    of_f = length == 0 ? 0 : 1 / (length * t);
  }
  // Past the margin the slope is 0 even where the input is infinite.
  coef[2] = margin && value >= *margin;
  if (margin) {
    const double sign = value < *margin ? -1 : value;   // the latter is NaN, and stays so
    of_f *= sign;
    of_t *= sign;
    value = coef[2] ? 0 : *margin - value;
  }
  coef[0] = of_f * constant;
  coef[1] = of_t * constant;
  return value;
}

}  // namespace

void feature_loss(const Parallel& parallel, const Rows& r, Kind kind, const double* margin, double constant, void* g, int64_t g_stride, double* values) {
  const LossKernels& kernels = loss_kernels();
  LossArgs a{};
  a.f = r.x;
  a.t = r.y;
  a.g = g;
  a.d = r.d;
  a.f_stride = r.x_stride;
  a.t_stride = r.y_stride;
  a.g_stride = g_stride;
  a.chunks = chunks_of(r.d);
  const int64_t units = r.n * a.chunks, elements = std::min(r.d, kChunk);
  const bool fused = g && kind == kMse && !margin;
  LossFn sums = fused ? kernels.fused[r.dtype] : kernels.sums[r.dtype][kind];
  LossFn slope = g && !fused ? kernels.slope[r.dtype][kind == kCosine] : nullptr;
  a.constant = fused ? constant * 2 / double(r.d) : 0;
  auto unit_sums = scratch<double>(3 * units);
  auto coef = scratch<double>(3 * r.n);
  a.sums = unit_sums.get();
  a.coef = coef.get();
  if (a.chunks == 1) {
    split(parallel, units, elements, [&](int64_t begin, int64_t end) {
      // Row by row: the slope reads the row again while it is in cache.
      for (int64_t i = begin; i < end; ++i) {
        sums(a, i, i + 1);
        values[i] = finish_loss(a.sums + 3 * i, kind, r.d, margin, constant, coef.get() + 3 * i);
        if (slope) slope(a, i, i + 1);
      }
    });
    return;
  }
  split(parallel, units, elements, [&](int64_t begin, int64_t end) { sums(a, begin, end); });
  for (int64_t i = 0; i < r.n; ++i) {
    double total[3] = {0, 0, 0};
    for (int64_t u = i * a.chunks; u < (i + 1) * a.chunks; ++u) {
      for (int k = 0; k < (kind == kMse ? 1 : kind == kCosine ? 3 : 2); ++k) total[k] += a.sums[3 * u + k];
    }
    values[i] = finish_loss(total, kind, r.d, margin, constant, coef.get() + 3 * i);
  }
  if (slope) split(parallel, units, elements, [&](int64_t begin, int64_t end) { slope(a, begin, end); });
}

namespace {

struct Dim { int64_t size, stride; };

// The dims as one walk of a single stride, or false. None: one element.
bool collapse(std::vector<Dim>& dims, Dim* whole) {
  std::sort(dims.begin(), dims.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  *whole = {1, dims.empty() ? 1 : dims[0].stride};
  for (const Dim& dim : dims) {
    if (dim.stride != whole->size * whole->stride || dim.stride <= 0) return false;
    whole->size *= dim.size;
  }
  return true;
}

}  // namespace

bool dense(int64_t first, int64_t dims, const int64_t* sizes, const int64_t* strides) {
  int64_t expected = 1, d = dims - 1;
  for (; d >= first; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] != expected) break;
    expected *= sizes[d];
  }
  if (d < first) return true;   // contiguous, the usual case, without touching the heap
  std::vector<Dim> rest;
  for (d = first; d < dims; ++d) {
    if (sizes[d] != 1) rest.push_back({sizes[d], strides[d]});
  }
  Dim whole;
  return collapse(rest, &whole) && whole.stride == 1;
}

bool same_walk(int64_t first, int64_t dims, const int64_t* sizes, const int64_t* a, const int64_t* b) {
  for (int64_t d = first; d < dims; ++d) {
    if (sizes[d] != 1 && a[d] != b[d]) return false;
  }
  return true;
}

StatsPlan plan_stats(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t dim, bool per_sample) {
  StatsPlan plan{true, false, dim == 0 ? 1 : sizes[0], sizes[dim], 0, dim == 0 ? 0 : strides[0], strides[dim], 0};
  std::vector<Dim> inner;
  bool empty = false;
  for (int64_t d = 0; d < dims; ++d) {
    empty = empty || sizes[d] == 0;
    if (d != dim && d != 0 && sizes[d] != 1) inner.push_back({sizes[d], strides[d]});
  }
  if (empty) return plan;   // inner = 0: nothing to read
  Dim walk;
  if (!collapse(inner, &walk)) return plan.ok = false, plan;
  if (!per_sample && walk.size == 1) {
    walk = {plan.samples, plan.sample_stride};   // (N, C): the samples are the rows
    plan.samples = 1;
  } else if (!per_sample && plan.sample_stride == walk.size * walk.stride) {
    walk.size *= plan.samples;
    plan.samples = 1;
  }
  plan.inner = walk.size;
  plan.row_stride = walk.stride;
  if (walk.size > 1 && walk.stride == 1) return plan;
  if (plan.channel_stride == 1 || plan.channels == 1) plan.by_rows = true;
  else if (walk.size > 1) plan.ok = false;
  return plan;
}

void channel_stats(const Parallel& parallel, const StatsPlan& plan, const void* x, Dtype dtype, bool per_sample, int64_t norms, void* linf, double* l1,
                   double* sumsq) {
  const int64_t channels = plan.channels, results = per_sample ? plan.samples : 1;
  StatsArgs a{};
  a.x = x;
  a.samples = plan.samples;
  a.channels = channels;
  a.inner = plan.inner;
  a.sample_stride = plan.sample_stride;
  a.channel_stride = plan.channel_stride;
  a.row_stride = plan.row_stride;
  // outer partials a result, each of `pieces` next to each other a channel.
  int64_t outer, units, elements, pieces;
  if (plan.by_rows) {
    const int64_t width = std::min(channels, kTile);
    a.block = std::max<int64_t>(2 * kRowBlock, 65536 / width / kRowBlock * kRowBlock);
    a.pieces = ceil_div(a.inner, a.block);
    outer = a.samples * a.pieces;
    units = outer * ceil_div(channels, kTile);
    elements = std::min(a.block, a.inner) * width;
    pieces = 1;
  } else {
    a.pieces = pieces = chunks_of(a.inner);
    a.block = per_sample || a.inner == 0 ? 1 : ceil_div(1024, a.inner);
    outer = a.inner == 0 ? 0 : ceil_div(a.samples, a.block);
    units = outer * channels * pieces;
    elements = pieces > 1 ? kChunk : std::min(a.block, std::max<int64_t>(a.samples, 1)) * a.inner;
  }
  const int64_t partials = outer * channels * pieces;
  auto memory = scratch<double>(3 * partials + 3 * results * channels);
  a.linf = memory.get();
  a.l1 = a.linf + partials;
  a.sumsq = a.l1 + partials;
  const bool all = (norms & 6) != 0;
  StatsFn kernel = (plan.by_rows ? stats_kernels().rows : stats_kernels().plane)[dtype][all];
  split(parallel, units, elements, [&](int64_t begin, int64_t end) { kernel(a, begin, end); });

  double* total = a.sumsq + partials;
  double* most = total + results * channels;
  double* square = most + results * channels;
  std::fill(total, total + 3 * results * channels, 0.0);
  const int64_t each = results ? outer / results : 0;
  split(parallel, results * channels, each * pieces, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      int64_t sample = begin / channels, stop = std::min(end, (sample + 1) * channels), shift = sample * channels;
      for (int64_t o = sample * each; o < (sample + 1) * each; ++o) {
        for (int64_t i = begin; i < stop; ++i) {
          for (int64_t k = 0; k < pieces; ++k) {
            int64_t from = (o * channels + i - shift) * pieces + k;
            if (bits_of(a.linf[from]) > bits_of(most[i])) most[i] = a.linf[from];
            if (all) {
              total[i] += a.l1[from];
              square[i] += a.sumsq[from];
            }
          }
        }
      }
      for (int64_t i = begin; i < stop; ++i) {
        if (norms & 1) put(dtype, linf, i, most[i]);
        if (norms & 2) l1[i] = total[i];
        if (norms & 4) sumsq[i] = square[i];
      }
      begin = stop;
    }
  });
}

}  // namespace bf
