// Tensor-core building blocks in bytes: an A or B fragment of one k-step is 32 bytes of k, 16 half or 8 float elements alike.
#pragma once
#include "device.cuh"

namespace bf::cuda {

// Rows of 128-byte blocks; the 16-byte units of a block are permuted by the row so that ldmatrix meets no bank twice.
BF_DEVICE uint32_t swizzled(uint32_t row, uint32_t unit) { return (unit ^ (row & 7)) * 16; }

// float = high + low, each a tf32: one tf32 product is off by 2^-11, the three products of the halves by about 2^-21.
template <int N> BF_DEVICE void halve(uint32_t (&high)[N], uint32_t (&low)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = __uint_as_float(high[i]);
    high[i] = to_tf32(value);
    low[i] = to_tf32(value - __uint_as_float(high[i]));
  }
}

// acc[m][n] += A B over one 128-byte block of k: A rows from `a` on (ROWS tiles of 16), B rows from `b` on (COLUMNS tiles of 8).
// Both addresses are those of this lane's row, as lane_row_a and lane_row_b give them.
BF_DEVICE uint32_t lane_row_a() { return threadIdx.x % 16; }
BF_DEVICE uint32_t lane_row_b() { return threadIdx.x % 8 + (threadIdx.x % 32 / 16) * 8; }
template <class T, int ROWS, int COLUMNS>
BF_DEVICE void multiply_block(float (&acc)[ROWS][COLUMNS][4], uint32_t a, uint32_t a_stride, uint32_t b, uint32_t b_stride, int steps) {
  const uint32_t lane = threadIdx.x % 32, a_half = lane / 16, b_half = lane / 8 % 2, row = lane % 8;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    if (step >= steps) break;
    uint32_t fa[ROWS][4];
    [[maybe_unused]] uint32_t low_a[ROWS][4];
    const uint32_t at_a = a + swizzled(row, 2 * step + a_half), at_b = b + swizzled(row, 2 * step + b_half);
#pragma unroll
    for (int m = 0; m < ROWS; ++m) {
      load_matrices(fa[m], at_a + m * 16 * a_stride);
      if constexpr (sizeof(T) == 4) halve(fa[m], low_a[m]);
    }
#pragma unroll
    for (int n = 0; n < COLUMNS; n += 2) {
      uint32_t fb[4];
      load_matrices(fb, at_b + n * 8 * b_stride);
      [[maybe_unused]] uint32_t low_b[4];
      if constexpr (sizeof(T) == 4) halve(fb, low_b);
#pragma unroll
      for (int k = 0; k < 2; ++k) {
#pragma unroll
        for (int m = 0; m < ROWS; ++m) {
          if constexpr (sizeof(T) == 4) {
            // Small terms first.
            multiply(acc[m][n + k], low_a[m], fb + 2 * k, T());
            multiply(acc[m][n + k], fa[m], low_b + 2 * k, T());
          }
          multiply(acc[m][n + k], fa[m], fb + 2 * k, T());
        }
      }
    }
  }
}

}  // namespace bf::cuda
