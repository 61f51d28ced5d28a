// Fused VAE scoring: standardise, encode, decode and distance for a tile of rows. Activations stay in registers and shared memory;
// x is read once for the encoder and once more, from L2, for the distance; weights stream from L2 through cp.async stages.
//
// Eight warps, two along the rows and four along 256 columns. Products:
//   1  h  = relu(t enc_w^T + enc_b)    A: x, standardised on its way into the stage       B: enc_w through the stages
//   2  mu = h mu_w^T + mu_b            A: h in shared memory                             B: mu_w, blocks of k in the stages' memory
//   3  g  = relu(mu dec_w^T + dec_b)   A: mu in the stages' memory                       B: dec_w, 256 rows at a time
//   4  sum (t - g out_w^T - out_b)^2   A: g, where h was                                 B: out_w through the stages
// Which tile a row falls into changes no bit of its result.
#pragma once
#include "mma.cuh"

namespace bf::cuda {

template <class T, int ROWS> struct VaeKernel {
  static constexpr int kStepElements = 128 / sizeof(T);   // of k in a stage
  static constexpr int kWarpRows = ROWS / 2, kTiles = kWarpRows / 16;
  static constexpr int kLoads = ROWS * 8 / kThreads;      // 16-byte units of x a thread brings a stage
  static constexpr uint32_t kStageA = ROWS * 128;
  static constexpr uint32_t kMuBytes = sizeof(T) * kVaeMostLatent, kMu = ROWS * kMuBytes;

  const VaeArgs& a;
  const int64_t first;      // row of the tile
  const int stages, hidden_blocks, dim_blocks, latent_blocks;
  unsigned char* const memory;   // h or g, then the stages
  const uint32_t hidden, hidden_stride, area, stage;
  const int warp, lane, warp_row, warp_column;

  BF_DEVICE VaeKernel(const VaeArgs& args, const VaePlan& plan, unsigned char* shared)
      : a(args), first(int64_t(blockIdx.x) * ROWS), stages(plan.stages), hidden_blocks(int(plan.hidden_bytes / 128)),
        dim_blocks((args.dim + kStepElements - 1) / kStepElements), latent_blocks((args.latent + kStepElements - 1) / kStepElements), memory(shared),
        hidden(shared_address(shared)), hidden_stride(uint32_t(plan.hidden_bytes)), area(hidden + ROWS * hidden_stride), stage(uint32_t(plan.stage_bytes)),
        warp(threadIdx.x / 32), lane(threadIdx.x % 32), warp_row(warp / 4 * kWarpRows), warp_column(warp % 4 * 64) {}

  static BF_DEVICE float parameter(const void* p, int i, int n) { return i < n ? to_float(static_cast<const T*>(p)[i]) : 0.0f; }

  // x, standardised: this thread's 16-byte unit of a block of k, of rows threadIdx.x / 8 + 32 i.
  struct Part { uint4 v[kLoads]; };
  BF_DEVICE void fetch(Part& part, int block) const {
    const int k = block * kStepElements + int(threadIdx.x % 8) * kWide<T>;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int64_t row = first + threadIdx.x / 8 + 32 * i;
      const T* from = static_cast<const T*>(a.x) + row * a.x_stride + k;
      if (row < a.n && k + kWide<T> <= a.dim && (address(a.x) | uintptr_t(a.x_stride * sizeof(T))) % 16 == 0) part.v[i] = load<T, 16>(from);
      else part.v[i] = pack<T>(load_some<T>(from, row < a.n ? a.dim - k : 0));
    }
  }
  BF_DEVICE void put(const Part& part, int block, uint32_t to) const {
    const int unit = threadIdx.x % 8, k = block * kStepElements + unit * kWide<T>;
    float mean[kWide<T>], scale[kWide<T>];
#pragma unroll
    for (int i = 0; i < kWide<T>; ++i) {
      mean[i] = parameter(a.mean, k + i, a.dim);
      scale[i] = k + i < a.dim ? reciprocal(parameter(a.std, k + i, a.dim)) : 0.0f;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      Floats<T> f = unpack<T>(part.v[i]);
#pragma unroll
      for (int j = 0; j < kWide<T>; ++j) f.at[j] = (f.at[j] - mean[j]) * scale[j];
      const uint32_t row = threadIdx.x / 8 + 32 * i;
      *reinterpret_cast<uint4*>(memory + (to - hidden) + row * 128 + swizzled(row, unit)) = pack<T>(f);
    }
  }

  // 16-byte copies of `rows` rows of a weight matrix, one block of k, zeros outside of it. `to` has 128 bytes a row.
  BF_DEVICE void copy_weights(const void* w, int64_t w_stride, int row0, int limit, int k_limit, int block, uint32_t to, int rows) const {
    const int unit = threadIdx.x % 8, k = block * kStepElements + unit * kWide<T>;
#pragma unroll 2
    for (int row = threadIdx.x / 8; row < rows; row += kThreads / 8) {
      const bool there = row0 + row < limit && k < k_limit;
      const T* from = static_cast<const T*>(w) + (there ? int64_t(row0 + row) * w_stride + k : 0);
      copy_async(to + row * 128 + swizzled(row, unit), from, there);
    }
  }

  // acc = A B^T for one pass of 256 columns; FROM_X: A is x, through the stages; else h or g.
  template <bool FROM_X> BF_DEVICE void product(float (&acc)[kTiles][8][4], int column0) const {
    const void* w = FROM_X ? a.enc_w : a.out_w;
    const int64_t w_stride = FROM_X ? a.w_dim : a.w_hidden;
    const int blocks = FROM_X ? dim_blocks : hidden_blocks, limit = FROM_X ? a.hidden : a.dim;
    const int k_limit = static_cast<int>(w_stride);
    const bool busy = column0 + warp_column < (FROM_X ? hidden_blocks * kStepElements : a.dim);
    __syncthreads();   // nobody reads the stages any more
    Part part;
    if (FROM_X) fetch(part, 0);
    for (int s = 0; s < stages - 1; ++s) {
      if (s < blocks) copy_weights(w, w_stride, column0, limit, k_limit, s, area + s * stage + kStageA, kVaeColumns);
      commit_copies();
    }
    if (FROM_X) put(part, 0, area);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
      }
    }
    int now = 0, ahead = stages - 1;   // stages of this block, and of the one to bring
    for (int block = 0; block < blocks; ++block) {
      if (stages == 2) wait_copies<0>();
      else wait_copies<1>();
      __syncthreads();   // this block is there for all, and the stage to refill is free
      if (block + stages - 1 < blocks) copy_weights(w, w_stride, column0, limit, k_limit, block + stages - 1, area + ahead * stage + kStageA, kVaeColumns);
      commit_copies();
      if (FROM_X && block + 1 < blocks) fetch(part, block + 1);
      if (busy) {
        const uint32_t at = area + now * stage, b = at + kStageA + (warp_column + lane_row_b()) * 128;
        const uint32_t from = FROM_X ? at : hidden + block * 128, stride = FROM_X ? 128 : hidden_stride;
        multiply_block<T>(acc, from + (warp_row + lane_row_a()) * stride, stride, b, 128, 4);
      }
      const int next = now + 1 == stages ? 0 : now + 1;
      if (FROM_X && block + 1 < blocks) put(part, block + 1, area + next * stage);
      now = next;
      ahead = ahead + 1 == stages ? 0 : ahead + 1;
    }
  }

  // relu(acc + bias) to rows of h or g; columns past the hidden size get zeros, whatever an infinite row made of them.
  BF_DEVICE void put_hidden(const float (&acc)[kTiles][8][4], const void* bias, int column0) const {
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = column0 + warp_column + n * 8 + lane % 4 * 2;
      if (column >= hidden_blocks * kStepElements) continue;
      const bool left = column < a.hidden, right = column + 1 < a.hidden;
      const float b0 = parameter(bias, column, a.hidden), b1 = parameter(bias, column + 1, a.hidden);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const float(&h)[4] = acc[m][n];
        put_pair(hidden, hidden_stride, warp_row + m * 16 + lane / 4, column, left ? relu(h[0] + b0) : 0, right ? relu(h[1] + b1) : 0);
        put_pair(hidden, hidden_stride, warp_row + m * 16 + lane / 4 + 8, column, left ? relu(h[2] + b0) : 0, right ? relu(h[3] + b1) : 0);
      }
    }
  }
  static BF_DEVICE float relu(float x) { return x < 0 ? 0.0f : x; }   // keeps NaN
  BF_DEVICE void put_pair(uint32_t base, uint32_t stride, uint32_t row, uint32_t column, float p, float q) const {
    const uint32_t byte = column * sizeof(T);
    unsigned char* to = memory + (base - hidden) + row * stride + byte / 128 * 128 + swizzled(row, byte % 128 / 16) + byte % 16;
    if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(to) = make_float2(p, q);
    else *reinterpret_cast<uint32_t*>(to) = two_halves(p, q, T());
  }

  // mu into the first kMu bytes of the stages' memory. Each warp takes 16 codes of its rows.
  BF_DEVICE void product_mu() const {
    const int codes = (a.latent + 15) / 16 * 16;
    const uint32_t weights = area + kMu;
    const int room = static_cast<int>((stages * stage - kMu) / (codes * 128));   // blocks of k at a time
    const int mine = warp % 4 * 16;
    float acc[kTiles][2][4] = {};
    for (int block0 = 0; block0 < hidden_blocks; block0 += room) {
      const int end = min(block0 + room, hidden_blocks);
      __syncthreads();   // h is written; nobody reads the stages any more
      for (int block = block0; block < end; ++block) copy_weights(a.mu_w, a.w_hidden, 0, a.latent, int(a.w_hidden), block, weights + (block - block0) * codes * 128, codes);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      if (mine >= codes) continue;
      for (int block = block0; block < end; ++block) {
        const uint32_t b = weights + ((block - block0) * codes + mine + lane_row_b()) * 128;
        multiply_block<T>(acc, hidden + block * 128 + (warp_row + lane_row_a()) * hidden_stride, hidden_stride, b, 128, 4);
      }
    }
#pragma unroll
    for (int n = 0; n < 2; ++n) {
      // Codes past the latent size are zero, whatever an infinite row made of their zero weights.
      const int code = mine + n * 8 + lane % 4 * 2;
      const bool left = code < a.latent, right = code + 1 < a.latent;
      const float b0 = parameter(a.mu_b, code, a.latent), b1 = parameter(a.mu_b, code + 1, a.latent);
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
        const float(&mu)[4] = acc[m][n];
        put_pair(area, kMuBytes, warp_row + m * 16 + lane / 4, code, left ? mu[0] + b0 : 0, right ? mu[1] + b1 : 0);
        put_pair(area, kMuBytes, warp_row + m * 16 + lane / 4 + 8, code, left ? mu[2] + b0 : 0, right ? mu[3] + b1 : 0);
      }
    }
  }

  // 256 columns of g before its bias. dec_w has short rows of any alignment, so plain loads bring it.
  BF_DEVICE void product_g(float (&acc)[kTiles][8][4], int column0) const {
    const uint32_t weights = area + kMu;
    const int units = latent_blocks * 8;
    __syncthreads();   // mu is written; nobody reads the last columns any more
    for (int i = threadIdx.x; i < kVaeColumns * units; i += kThreads) {
      const uint32_t row = i / units, unit = i % units;
      const int k = unit * kWide<T>;
      const bool there = column0 + int(row) < a.hidden;
      const Floats<T> f = load_some<T>(static_cast<const T*>(a.dec_w) + (there ? int64_t(column0 + row) * a.latent + k : 0), there ? a.latent - k : 0);
      *reinterpret_cast<uint4*>(memory + (weights - hidden) + row * kMuBytes + unit / 8 * 128 + swizzled(row, unit % 8)) = pack<T>(f);
    }
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) acc[m][n][i] = 0;
      }
    }
    // k-steps of 32 bytes; mu and dec_w hold zeros up to a whole one.
    const int steps = (a.latent * int(sizeof(T)) + 31) / 32;
    for (int block = 0; block < latent_blocks; ++block) {
      multiply_block<T>(acc, area + block * 128 + (warp_row + lane_row_a()) * kMuBytes, kMuBytes, weights + block * 128 + (warp_column + lane_row_b()) * kMuBytes,
                        kMuBytes, min(4, steps - 4 * block));
    }
  }

  static BF_DEVICE float2 pair_at(const void* p, int64_t i, bool both, bool aligned) {
    const T* q = static_cast<const T*>(p) + i;
    if (both && aligned) {
      if constexpr (sizeof(T) == 4) return *reinterpret_cast<const float2*>(q);
      else return two_floats(*reinterpret_cast<const uint32_t*>(q), T());
    }
    return make_float2(to_float(q[0]), both ? to_float(q[1]) : 0.0f);
  }

  // Adds (t - acc - bias)^2 of 256 columns to this thread's rows.
  BF_DEVICE void add_distances(const float (&acc)[kTiles][8][4], int column0, float (&sums)[kTiles][2]) const {
    const bool aligned = (address(a.x) | uintptr_t(a.x_stride * sizeof(T))) % (2 * sizeof(T)) == 0;
    const bool aligned_p = (address(a.mean) | address(a.std) | address(a.out_b)) % (2 * sizeof(T)) == 0;
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int column = column0 + warp_column + n * 8 + lane % 4 * 2;
      if (column >= a.dim) continue;
      const bool both = column + 1 < a.dim;
      const float2 mean = pair_at(a.mean, column, both, aligned_p), std = pair_at(a.std, column, both, aligned_p), bias = pair_at(a.out_b, column, both, aligned_p);
      const float s0 = reciprocal(std.x), s1 = both ? reciprocal(std.y) : 0.0f;
      float2 x[kTiles][2];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const int64_t row = first + warp_row + m * 16 + lane / 4 + 8 * h;
          x[m][h] = row < a.n ? pair_at(a.x, row * a.x_stride + column, both, aligned) : make_float2(0, 0);
        }
      }
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float d0 = (x[m][h].x - mean.x) * s0 - (acc[m][n][2 * h] + bias.x);
          const float d1 = both ? (x[m][h].y - mean.y) * s1 - (acc[m][n][2 * h + 1] + bias.y) : 0.0f;
          sums[m][h] += d0 * d0;
          sums[m][h] += d1 * d1;
        }
      }
    }
  }

  BF_DEVICE void finish(float (&sums)[kTiles][2]) const {
    float* parts = reinterpret_cast<float*>(memory + (area - hidden));   // four a row, one a warp column
    __syncthreads();
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = sums[m][h];
        sum += __shfl_xor_sync(0xffffffffu, sum, 1);
        sum += __shfl_xor_sync(0xffffffffu, sum, 2);
        if (lane % 4 == 0) parts[(warp_row + m * 16 + lane / 4 + 8 * h) * 4 + warp % 4] = sum;
      }
    }
    __syncthreads();
    if (threadIdx.x < ROWS && first + threadIdx.x < a.n) {
      const float* p = parts + threadIdx.x * 4;
      a.out[first + threadIdx.x] = ((p[0] + p[1]) + (p[2] + p[3])) / float(a.dim);
    }
  }

  BF_DEVICE void run() const {
    float acc[kTiles][8][4];
    for (int column = 0; column < hidden_blocks * kStepElements; column += kVaeColumns) {
      product<true>(acc, column);
      put_hidden(acc, a.enc_b, column);
    }
    product_mu();
    for (int column = 0; column < hidden_blocks * kStepElements; column += kVaeColumns) {
      product_g(acc, column);
      put_hidden(acc, a.dec_b, column);
    }
    float sums[kTiles][2] = {};
    for (int column = 0; column < a.dim; column += kVaeColumns) {
      product<false>(acc, column);
      add_distances(acc, column, sums);
    }
    finish(sums);
  }
};

template <class T, int ROWS> __global__ void __launch_bounds__(kThreads, 1) vae(const __grid_constant__ VaeArgs args, const __grid_constant__ VaePlan plan) {
  extern __shared__ __align__(1024) unsigned char shared[];
  VaeKernel<T, ROWS>(args, plan, shared).run();
}

template <class T, int ROWS> const char* launch_vae(const VaeArgs& args, const VaePlan& plan, int most_shared, Stream stream) {
  // No stream operation, so a graph may be under capture. The attribute is the current device's, for all threads and graphs: always
  // what the device allows, because a call that lowered it could come between another's setting and launch.
  const cudaError_t error = cudaFuncSetAttribute(vae<T, ROWS>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared);
  if (error != cudaSuccess) return failed(error);
  vae<T, ROWS><<<grid_of(ceil_div(args.n, ROWS)), kThreads, plan.shared_bytes, native(stream)>>>(args, plan);
  return launch_error();
}

// One file a dtype, so that they compile apart.
const char* vae_bfloat16(const VaeArgs&, const VaePlan&, int most_shared, Stream);
const char* vae_float16(const VaeArgs&, const VaePlan&, int most_shared, Stream);
const char* vae_float32(const VaeArgs&, const VaePlan&, int most_shared, Stream);

}  // namespace bf::cuda
