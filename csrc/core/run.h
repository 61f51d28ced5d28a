// The ops on raw memory: cut the work into units by shape alone, run the kernels over them, combine partials in order.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bf {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);
// Calls fn on ranges that cover [0, units), none of them shorter than grain but for the last.
struct Parallel {
  void (*run)(int64_t units, int64_t grain, RangeFn fn, void* context, int threads);
  int threads;   // 0: as many as there are
};

// n rows of d elements, dense inside, any row strides (in elements).
struct Rows {
  const void* x;
  const void* y;
  int64_t n, d, x_stride, y_stride;
  Dtype dtype;
};

int norm_of(double p);   // kOne, kTwo, kMax, or -1
void distance(const Parallel&, const Rows&, const void* weight, Norm, Reduction, void* out);
void distance_backward(const Parallel&, const Rows&, const void* weight, Norm, Reduction, const void* grad, const void* out, void* gx, int64_t gx_stride);

// One layer: the loss of each sample into values; if g, constant * its slope. margin may be null.
void feature_loss(const Parallel&, const Rows&, Kind, const double* margin, double constant, void* g, int64_t g_stride, double* values);

// True if the dims from `first` on are one dense block of memory, in any order.
bool dense(int64_t first, int64_t dims, const int64_t* sizes, const int64_t* strides);
// True if both walk the dims from `first` on in the same way.
bool same_walk(int64_t first, int64_t dims, const int64_t* sizes, const int64_t* a, const int64_t* b);

struct StatsPlan {
  bool ok;          // false: no kernel walks this layout, copy it
  bool by_rows;
  int64_t samples, channels, inner, sample_stride, channel_stride, row_stride;
};
StatsPlan plan_stats(int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t dim, bool per_sample);
// norms is the bit set of the op; linf in the result's dtype; absent outputs may be null.
void channel_stats(const Parallel&, const StatsPlan&, const void* x, Dtype, bool per_sample, int64_t norms, void* linf, double* l1, double* sumsq);

}  // namespace bf
