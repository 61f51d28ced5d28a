// What the per-instruction-set files export: one table of function pointers an op family. Plain structs only, so that
// nothing compiled with AVX flags can leak into the baseline.
#pragma once
#include <cstdint>

namespace bf {

enum Dtype { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3, kDtypes = 4 };
enum Norm { kOne = 0, kTwo = 1, kMax = 2 };
enum Reduction { kMean = 0, kSum = 1, kRoot = 2 };
enum Kind { kMse = 0, kCosine = 1, kRelative = 2 };

// A row is cut into chunks of this many elements; the cut depends on the shape alone, so bits don't depend on threads.
constexpr int64_t kChunk = 65536;

// Units are (row, chunk) pairs in row-major order. Strides are in elements.
struct DistanceArgs {
  const void* x;
  const void* y;
  const void* w;         // (d,) or null, in the result's dtype
  void* out;             // forward: result when chunks == 1; backward: the forward's result
  double* partial;       // forward: one a unit when chunks > 1
  const void* grad;      // backward: (n,)
  void* gx;              // backward: gradient of x
  const int64_t* ties;   // backward of the maximum: elements that reach it, one a row
  int64_t* unit_ties;    // the same counts, one a unit
  int64_t d, x_stride, y_stride, gx_stride, chunks;
  double divisor;        // mean: d, else 1
  int64_t reduction;
};
using DistanceFn = void (*)(const DistanceArgs&, int64_t begin, int64_t end);
struct DistanceKernels {
  DistanceFn forward[kDtypes][3][2];   // [dtype][norm][weighted]
  DistanceFn backward[kDtypes][3][2];
  DistanceFn ties[kDtypes][2];
};

struct LossArgs {
  const void* f;
  const void* t;
  void* g;
  double* sums;          // three a unit
  const double* coef;    // three a row: slope = coef[0] * f + coef[1] * t, or coef[0] * (f - t); all 0 if coef[2]
  int64_t d, f_stride, t_stride, g_stride, chunks;
  double constant;       // fused mse: slope = constant * (f - t)
};
using LossFn = void (*)(const LossArgs&, int64_t begin, int64_t end);
struct LossKernels {
  LossFn sums[kDtypes][3];    // [dtype][kind]
  LossFn slope[kDtypes][2];   // [dtype][0: of f - t, 1: of f and t]
  LossFn fused[kDtypes];      // mse: sums and slope in one pass
};

// Partials lie at (outer * channels + channel) * pieces + piece, in three arrays.
struct StatsArgs {
  const void* x;
  double* linf;
  double* l1;
  double* sumsq;
  int64_t samples, channels, inner;               // inner: elements a plane, or rows a sample
  int64_t sample_stride, channel_stride, row_stride;
  int64_t block;                                  // plane: samples a partial; rows: rows a partial
  int64_t pieces;                                 // plane: pieces of one plane; rows: groups of rows a sample
};
using StatsFn = void (*)(const StatsArgs&, int64_t begin, int64_t end);
struct StatsKernels {
  StatsFn plane[kDtypes][2];   // [dtype][0: linf only, 1: all norms]; units are (block of samples, channel, piece)
  StatsFn rows[kDtypes][2];    // units are (sample, group of rows, tile of channels)
};
constexpr int64_t kTile = 512;      // channels a unit of the rows kernel
constexpr int64_t kRowBlock = 64;   // rows summed in float before they are added to the double totals

#define BF_DECLARE(isa)                          \
  extern const DistanceKernels distance_##isa;   \
  extern const LossKernels loss_##isa;           \
  extern const StatsKernels stats_##isa;
BF_DECLARE(scalar)
BF_DECLARE(avx2)
BF_DECLARE(avx512)
#undef BF_DECLARE

}  // namespace bf

#if BF_ISA == 2
#define BF_TABLE(family) family##_avx512
#elif BF_ISA == 1
#define BF_TABLE(family) family##_avx2
#else
#define BF_TABLE(family) family##_scalar
#endif
