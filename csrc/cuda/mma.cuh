// Tensor-core building blocks in bytes: an A or B fragment of one k-step is 32 bytes of k, 16 half or 8 float elements alike.
#pragma once
#include "device.cuh"

namespace bf::cuda {

BF_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Rows of 128-byte blocks; the 16-byte units of a block are permuted by the row so that ldmatrix meets no bank twice.
BF_DEVICE uint32_t swizzled(uint32_t row, uint32_t unit) { return (unit ^ (row & 7)) * 16; }

BF_DEVICE void copy_async(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}
BF_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
template <int LEFT> BF_DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;\n" ::"n"(LEFT) : "memory"); }

BF_DEVICE void load_matrices(uint32_t (&r)[4], uint32_t from) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
}

BF_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, bfloat16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BF_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, float16) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
BF_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, float) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// float = high + low, each a tf32: one tf32 product is off by 2^-11, the three products of the halves by about 2^-21.
template <int N> BF_DEVICE void halve(uint32_t (&high)[N], uint32_t (&low)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float value = __uint_as_float(high[i]);
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(high[i]) : "f"(value));
    asm("cvt.rna.tf32.f32 %0, %1;\n" : "=r"(low[i]) : "f"(value - __uint_as_float(high[i])));
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
