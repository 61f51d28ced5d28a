// The tables that the loss kernels get as parameters, by value: no copy to the device, so graphs capture them as they are.
#pragma once
#include <cstdint>

namespace bf::cuda {

constexpr int kMostLayers = 24;           // of one launch: its parameters may take 4 KB
constexpr int64_t kMostTotals = 96;
constexpr int64_t kValueBlock = 16384;    // rows whose losses one block adds

struct LossRow {
  const void *f, *t;
  void* g;
  int64_t n, d, f_stride, t_stride, g_stride, pieces, units, first_block, first_unit, first_row;
  double share;
  int lanes;
};
struct LossTable {
  LossRow layer[kMostLayers];
  int64_t blocks;
  int count;
};
struct LossRule {
  double margin;
  bool hinged;
};
struct LossSlope {
  float of_f, of_t;
  bool zero;
};
struct LossScratch {
  double* sums;         // three a unit, of rows in several pieces
  double* values;       // one a row
  double* value_sums;
  LossSlope* slopes;    // one a row
};
struct LossTotal {
  const double* values;
  int64_t count, n;
  double weight;
};
struct LossTotals {
  LossTotal layer[kMostTotals];
  int count;
};

}  // namespace bf::cuda
