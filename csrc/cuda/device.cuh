// What the kernels share: 16-byte loads with a fallback, conversions, sums over groups of threads in a fixed order.
#pragma once
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "ptx.cuh"

namespace bf::cuda {

template <class T> constexpr int kWide = 16 / sizeof(T);   // elements of 16 bytes
template <int N> struct Int { static constexpr int value = N; };

BF_DEVICE uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }   // orders like |x|, NaN on top
BF_DEVICE float2 two_floats(uint32_t u, bfloat16) { return make_float2(__uint_as_float(u << 16), __uint_as_float(u & 0xffff0000u)); }
BF_DEVICE float2 two_floats(uint32_t u, float16) { return __half22float2(*reinterpret_cast<const __half2*>(&u)); }
BF_DEVICE uint32_t two_halves(float a, float b, bfloat16) {
  __nv_bfloat162 h = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
BF_DEVICE uint32_t two_halves(float a, float b, float16) {
  __half2 h = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&h);
}
BF_DEVICE float to_float(float x) { return x; }
BF_DEVICE float to_float(bfloat16 x) { return __bfloat162float(x); }
BF_DEVICE float to_float(float16 x) { return __half2float(x); }
template <class T> BF_DEVICE T from_float(float x);
template <> BF_DEVICE float from_float<float>(float x) { return x; }
template <> BF_DEVICE bfloat16 from_float<bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <> BF_DEVICE float16 from_float<float16>(float x) { return __float2half_rn(x); }

template <class T> struct Floats { float at[kWide<T>]; };
template <class T> BF_DEVICE Floats<T> unpack(const uint4& v) {
  if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
  } else {
    const float2 a = two_floats(v.x, T()), b = two_floats(v.y, T()), c = two_floats(v.z, T()), d = two_floats(v.w, T());
    return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
  }
}
template <class T> BF_DEVICE uint4 pack(const Floats<T>& f) {
  if constexpr (sizeof(T) == 4) {
    return make_uint4(__float_as_uint(f.at[0]), __float_as_uint(f.at[1]), __float_as_uint(f.at[2]), __float_as_uint(f.at[3]));
  } else {
    return make_uint4(two_halves(f.at[0], f.at[1], T()), two_halves(f.at[2], f.at[3], T()), two_halves(f.at[4], f.at[5], T()),
                      two_halves(f.at[6], f.at[7], T()));
  }
}

// 16 bytes in loads of WIDTH bytes. Which thread gets which element never depends on the alignment, so neither do the bits.
// FIXED: nothing writes there while the kernel runs.
template <class T, int WIDTH, bool FIXED = true> BF_DEVICE uint4 load(const T* p) {
  if constexpr (WIDTH == 16) {
    return FIXED ? load_fixed(p) : load_words(p);
  } else if constexpr (WIDTH == 4) {
    const uint32_t* q = reinterpret_cast<const uint32_t*>(p);
    return make_uint4(q[0], q[1], q[2], q[3]);
  } else {
    const uint16_t* q = reinterpret_cast<const uint16_t*>(p);
    return make_uint4(q[0] | uint32_t(q[1]) << 16, q[2] | uint32_t(q[3]) << 16, q[4] | uint32_t(q[5]) << 16, q[6] | uint32_t(q[7]) << 16);
  }
}
// The first `count` elements, then zeros.
template <class T> BF_DEVICE Floats<T> load_some(const T* p, int64_t count) {
  Floats<T> f;
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) f.at[i] = i < count ? to_float(p[i]) : 0.0f;
  return f;
}
template <class T, int WIDTH> BF_DEVICE void store(T* p, const Floats<T>& f) {
  const uint4 v = pack<T>(f);
  if constexpr (WIDTH == 16) {
    store_words(p, v);
  } else if constexpr (WIDTH == 4) {
    uint32_t* q = reinterpret_cast<uint32_t*>(p);
    q[0] = v.x, q[1] = v.y, q[2] = v.z, q[3] = v.w;
  } else {
    uint16_t* q = reinterpret_cast<uint16_t*>(p);
    q[0] = v.x, q[1] = v.x >> 16, q[2] = v.y, q[3] = v.y >> 16, q[4] = v.z, q[5] = v.z >> 16, q[6] = v.w, q[7] = v.w >> 16;
  }
}
template <class T> BF_DEVICE void store_some(T* p, const Floats<T>& f, int64_t count) {
#pragma unroll
  for (int i = 0; i < kWide<T>; ++i) {
    if (i < count) p[i] = from_float<T>(f.at[i]);
  }
}
// The widest load that these addresses (or'ed) admit; a lambda is compiled once a width.
template <class T, class F> BF_DEVICE void by_width(uintptr_t address, F&& f) {
  if (address % 16 == 0) f(Int<16>());
  else if (sizeof(T) == 4 || address % 4 == 0) f(Int<4>());
  else f(Int<2>());
}
template <class P> BF_DEVICE uintptr_t address(P* p) { return reinterpret_cast<uintptr_t>(p); }

// Sums over the group of `lanes` threads (a power of two up to 32, or the block): the same tree every time, every thread gets them.
template <int N> BF_DEVICE void sum_over(double (&value)[N], int lanes) {
#pragma unroll
  for (int half = 16; half; half /= 2) {
    if (half < lanes) {
#pragma unroll
      for (int i = 0; i < N; ++i) value[i] += __shfl_xor_sync(0xffffffffu, value[i], half);
    }
  }
  if (lanes > 32) {
    __shared__ double sums[N][kThreads / 32];
    __syncthreads();   // the last round's readers are done
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i][threadIdx.x / 32] = value[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      value[i] = sums[i][0];
      for (int w = 1; w < kThreads / 32; ++w) value[i] += sums[i][w];
    }
  }
}
BF_DEVICE uint32_t max_over(uint32_t value, int lanes) {
  if (lanes >= 32) {
    value = __reduce_max_sync(0xffffffffu, value);
  } else {
    for (int half = lanes / 2; half; half /= 2) value = max(value, __shfl_xor_sync(0xffffffffu, value, half));
  }
  if (lanes > 32) {
    __shared__ uint32_t tops[kThreads / 32];
    __syncthreads();
    if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = value;
    __syncthreads();
    for (int w = 0; w < kThreads / 32; ++w) value = max(value, tops[w]);
  }
  return value;
}

inline unsigned grid_of(int64_t blocks) { return static_cast<unsigned>(least(most(blocks, 1), kMostBlocks)); }
inline cudaStream_t native(Stream stream) { return static_cast<cudaStream_t>(stream); }
inline const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
// Of a call of the runtime, which also keeps its error: taken here, or the next launch would report it.
inline const char* failed(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

// Calls f with a null pointer of the element type.
template <class F> const char* by_dtype(Dtype dtype, F&& f) {
  switch (dtype) {
    case kFloat32: return f(static_cast<float*>(nullptr));
    case kBFloat16: return f(static_cast<bfloat16*>(nullptr));
    case kFloat16: return f(static_cast<float16*>(nullptr));
    default: return "the CUDA kernels take float32, bfloat16 and float16";
  }
}

}  // namespace bf::cuda
