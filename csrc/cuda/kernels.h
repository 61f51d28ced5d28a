// Torch-free launchers: device pointers and a stream in, an error text (null: none) out. Scratch memory is the caller's.
#pragma once
#include <cstdint>

#include "../core/run.h"
#include "plan.h"

namespace bf::cuda {

using Stream = void*;
inline int64_t size_of(Dtype dtype) { return dtype == kFloat32 ? 4 : 2; }

// Scratch: 8 bytes for each unit of plan_rows if a row has several pieces.
const char* distance(const Rows&, const float* weight, Norm, Reduction, float* out, void* scratch, Stream);
// Scratch: the same for the maximum, and 8 bytes a row.
const char* distance_backward(const Rows&, const float* weight, Norm, Reduction, const float* grad, const float* out, void* gx, int64_t gx_stride,
                              void* scratch, Stream);

struct LossLayer {
  Rows rows;
  void* g;            // null: no gradient
  int64_t g_stride;
  double weight, share;
};
// Bytes of scratch that feature_loss takes for these layers.
int64_t feature_loss_scratch(const LossLayer* layers, int64_t count);
const char* feature_loss(const LossLayer* layers, int64_t count, Kind, const double* margin, bool mean, float* out, void* scratch, Stream);

// g_i *= upstream[i * upstream_stride], nothing read or written where that is 1. Only x, n, d, x_stride, dtype of rows count.
const char* scale(const Rows* gradients, int64_t count, const float* upstream, int64_t upstream_stride, Stream);

struct StatsOut {
  float* linf;        // null: absent
  double* l1;
  double* sumsq;
};
int64_t stats_scratch(const StatsPlan&, const void* x, Dtype, bool per_sample);
const char* channel_stats(const StatsPlan&, const void* x, Dtype, bool per_sample, const StatsOut&, void* scratch, Stream);

struct VaeArgs {
  const void *x, *mean, *std, *enc_w, *enc_b, *mu_w, *mu_b, *dec_w, *dec_b, *out_w, *out_b;
  float* out;
  int64_t n, x_stride, w_dim, w_hidden;   // the last two: row lengths of enc_w, and of mu_w and out_w, padded with zeros
  int dim, hidden, latent;
};
// Row lengths of the streamed weights must be multiples of 16 bytes, and their addresses too.
const char* vae_distance(const VaeArgs&, Dtype, Stream);

}  // namespace bf::cuda
