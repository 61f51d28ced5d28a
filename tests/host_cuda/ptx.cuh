// The instructions of csrc/cuda/ptx.cuh, lane by lane as the PTX manual lays their fragments out.
#pragma once
#include <cstdint>
#include <functional>

#include "cuda_bf16.h"
#include "cuda_fp16.h"
#include "cuda_runtime.h"

#define BF_DEVICE inline

namespace bf::cuda {

using bfloat16 = __nv_bfloat16;
using float16 = __half;

// The hardware faults on an address that is no multiple of 16.
inline uint4 load_fixed(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 16) std::abort();
  uint4 v;
  std::memcpy(&v, p, 16);
  return v;
}
inline uint4 load_words(const void* p) { return load_fixed(p); }
inline void store_words(void* p, const uint4& v) {
  if (reinterpret_cast<uintptr_t>(p) % 16) std::abort();
  std::memcpy(p, &v, 16);
}

inline unsigned char* shared_at(uint32_t address) { return host_cuda::machine.shared_base + address; }
inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - host_cuda::machine.shared_base); }

// Copies land as late as they may: when their group is waited for.
inline void copy_async(uint32_t to, const void* from, bool there) {
  if (to % 16 || (there && reinterpret_cast<uintptr_t>(from) % 16)) std::abort();
  host_cuda::machine.now->open.push_back([=] {
    if (there) std::memcpy(shared_at(to), from, 16);
    else std::memset(shared_at(to), 0, 16);
  });
}
inline void commit_copies() {
  host_cuda::machine.now->copies.push_back(std::move(host_cuda::machine.now->open));
  host_cuda::machine.now->open.clear();
}
template <int LEFT> void wait_copies() {
  auto& copies = host_cuda::machine.now->copies;
  while (copies.size() > LEFT) {
    for (auto& copy : copies.front()) copy();
    copies.erase(copies.begin());
  }
}

inline void load_matrices(uint32_t (&r)[4], uint32_t from) {
  if (from % 16) std::abort();
  host_cuda::exchange(&from, 1, [&](host_cuda::WarpWords& w) {
    for (int m = 0; m < 4; ++m) std::memcpy(&r[m], shared_at(uint32_t(w.word[8 * m + host_cuda::lane() / 4][0])) + host_cuda::lane() % 4 * 4, 4);
  });
}

inline float as_float(float x) { return x; }
inline float as_float(bfloat16 x) { return __bfloat162float(x); }
inline float as_float(float16 x) { return __half2float(x); }
template <class T> float element(uint32_t u, int half) {
  T value;
  std::memcpy(&value, reinterpret_cast<const char*>(&u) + half * sizeof(T), sizeof(T));
  return as_float(value);
}
// d = a b^T + c; a lane gives a[4] and b[2], and owns (lane / 4, 2 (lane % 4) + {0, 1}) and the same eight rows further down.
template <class T> void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t* b, T) {
  const uint32_t give[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  host_cuda::exchange(give, 6, [&](host_cuda::WarpWords& w) {
    constexpr int per = 4 / sizeof(T);
    const int lane = host_cuda::lane();
    for (int i = 0; i < 4; ++i) {
      const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
      double sum = 0;
      for (int word = 0; word < 8; ++word) {   // words of k
        for (int half = 0; half < per; ++half) {
          const uint32_t p = uint32_t(w.word[row % 8 * 4 + word % 4][row / 8 + word / 4 * 2]), q = uint32_t(w.word[column * 4 + word % 4][4 + word / 4]);
          sum += double(element<T>(p, half)) * element<T>(q, half);
        }
      }
      c[i] = float(c[i] + sum);
    }
  });
}

inline uint32_t to_tf32(float x) {
  const uint32_t u = __float_as_uint(x);
  return (u & 0x7f800000u) == 0x7f800000u ? u : (u + 0x1000u) & ~0x1fffu;
}
inline float reciprocal(float x) { return 1 / x; }

}  // namespace bf::cuda
