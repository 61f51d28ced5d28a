// How work is cut into units: by shape alone, so that bits depend neither on the device nor on the run. Plain C++, tested on the host.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define BF_BOTH __host__ __device__ __forceinline__
#else
#define BF_BOTH inline
#endif

namespace bf::cuda {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 16384;            // longest stretch that one block sums: 64 terms a thread in float
constexpr int64_t kMostBlocks = 2147483647;  // a grid's limit; kernels stride over the rest

BF_BOTH int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
BF_BOTH int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
BF_BOTH int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
BF_BOTH int64_t power_of_two(int64_t n) {
  int64_t p = 1;
  while (p < n) p *= 2;
  return p;
}

// Threads that share one stretch of `length` elements: about four 16-byte loads each, whole 128-byte lines, a warp or a block at most.
BF_BOTH int lanes_for(int64_t length, int64_t wide) {
  const int64_t vectors = ceil_div(length, wide);
  if (vectors > 512) return kThreads;
  return static_cast<int>(least(32, most(power_of_two(ceil_div(vectors, 4)), least(8, power_of_two(vectors)))));
}

// Rows cut into pieces: unit u is piece u % pieces of row u / pieces. The cut of a row knows nothing of the other rows.
struct RowPlan {
  int64_t n, d, pieces, units, blocks;
  int lanes;
};
BF_BOTH RowPlan plan_rows(int64_t n, int64_t d, int64_t element_size) {
  RowPlan plan{n, d, most(1, ceil_div(d, kPiece)), 0, 0, 0};
  plan.units = n * plan.pieces;
  plan.lanes = lanes_for(least(d, kPiece), 16 / element_size);
  plan.blocks = ceil_div(plan.units, kThreads / plan.lanes);
  return plan;
}
struct Place {
  int64_t row, start, count;
};
BF_BOTH Place place_of(int64_t unit, int64_t pieces, int64_t d) {
  const int64_t row = pieces == 1 ? unit : unit / pieces, start = (unit - row * pieces) * kPiece;
  return {row, start, least(d - start, kPiece)};
}

// Channel statistics; partials lie at (outer * channels + channel) * pieces + piece.
constexpr int64_t kTargetThreads = 262144;   // enough to fill every GPU we know, few enough that partials stay small
constexpr int64_t kTerms = 256;              // most terms a thread adds in float
struct StatsCut {
  int64_t block;    // planes: samples a unit; rows: rows a unit
  int64_t pieces;   // planes: pieces of a plane; rows: 1
  int64_t outer, units, blocks;
  int64_t row_blocks, tiles;   // rows: units along a sample's rows and across channels
  int lanes;        // planes: threads a unit; rows: threads across channels
  int each;         // rows: channels a thread
};
BF_BOTH StatsCut cut_planes(int64_t samples, int64_t channels, int64_t inner, int64_t element_size, bool per_sample) {
  StatsCut cut{1, most(1, ceil_div(inner, kPiece)), 0, 0, 0, 0, 0, 0, 0};
  const int64_t length = least(inner, kPiece), wide = 16 / element_size;
  cut.lanes = lanes_for(length, wide);
  const int64_t terms = most(1, ceil_div(length, cut.lanes * wide) * wide);
  if (!per_sample && inner > 0) {
    const int64_t wanted = samples * channels * cut.pieces / most(1, kTargetThreads / cut.lanes);
    cut.block = most(1, least(least(wanted, kTerms / terms), samples));
  }
  cut.outer = inner == 0 ? 0 : ceil_div(samples, cut.block);
  cut.units = cut.outer * channels * cut.pieces;
  cut.blocks = ceil_div(cut.units, kThreads / cut.lanes);
  return cut;
}
// `width` is how many bytes one load may take: 16, 4 or an element.
BF_BOTH StatsCut cut_rows(int64_t samples, int64_t channels, int64_t inner, int64_t element_size, int64_t width) {
  StatsCut cut{0, 1, 0, 0, 0, 0, 0, 0, static_cast<int>(most(1, width / element_size))};
  cut.lanes = static_cast<int>(least(32, power_of_two(ceil_div(channels, cut.each))));
  const int64_t along = kThreads / cut.lanes;
  cut.tiles = ceil_div(channels, int64_t(cut.lanes) * cut.each);
  cut.block = most(4 * along, least(128 * along, ceil_div(samples * inner * cut.tiles, kTargetThreads / kThreads)));
  cut.row_blocks = ceil_div(inner, cut.block);
  cut.outer = samples * cut.row_blocks;
  cut.units = cut.blocks = cut.outer * cut.tiles;
  return cut;
}

// The fused VAE: rows of one tile kept in shared memory, weights streamed through stages of 128 bytes of k.
constexpr int64_t kVaeMostDim = 1024, kVaeMostHidden = 512, kVaeMostLatent = 64;
constexpr int64_t kVaeColumns = 256;   // columns of one pass of the eight warps
struct VaePlan {
  int rows;     // of a tile; 0: the device has too little shared memory
  int stages;
  int64_t hidden_bytes, stage_bytes, shared_bytes;
};
BF_BOTH VaePlan plan_vae_rows(int rows, int stages, int64_t hidden, int64_t element_size) {
  VaePlan plan{rows, stages, ceil_div(hidden * element_size, 128) * 128, (rows + kVaeColumns) * 128, 0};
  plan.shared_bytes = rows * plan.hidden_bytes + stages * plan.stage_bytes;
  return plan;
}
// Large tiles read the weights less often; small ones fill the device when there are few rows.
BF_BOTH VaePlan plan_vae(int64_t n, int64_t hidden, int64_t latent, int64_t element_size, int64_t shared_limit, int64_t processors) {
  if (hidden < 1 || hidden > kVaeMostHidden || latent < 1 || latent > kVaeMostLatent) return {0, 0, 0, 0, 0};
  const int largest = element_size == 2 ? 128 : 64;
  const bool few = ceil_div(n, largest) < processors;
  for (int rows = few ? largest / 2 : largest; rows >= largest / 2; rows /= 2) {
    for (int stages = 3; stages >= 2; --stages) {
      VaePlan plan = plan_vae_rows(rows, stages, hidden, element_size);
      if (plan.shared_bytes <= shared_limit) return plan;
    }
  }
  return {0, 0, 0, 0, 0};
}

}  // namespace bf::cuda
