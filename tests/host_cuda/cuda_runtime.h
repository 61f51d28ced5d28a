// Enough of CUDA to run the kernels' own source on the host, one block at a time, a fiber a thread. Fibers switch at barriers and
// warp operations only, in an order that the caller picks: a missing barrier shows as a result that depends on it.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
};
struct uint4 {
  uint32_t x, y, z, w;
};
struct float4 {
  float x, y, z, w;
};
struct float2 {
  float x, y;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }

inline float __uint_as_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t __float_as_uint(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
template <class T> T max(T a, T b) { return a > b ? a : b; }
template <class T> T min(T a, T b) { return a < b ? a : b; }

namespace host_cuda {

struct Fiber {
  ucontext_t context;
  std::vector<char> stack;
  dim3 thread{};
  int waits = 0;   // barriers and warp operations passed, block's and warp's
  int warp_waits = 0;
  bool done = false;
  std::vector<std::vector<std::function<void()>>> copies;
  std::vector<std::function<void()>> open;
};
struct Machine {
  std::vector<Fiber> fibers;
  Fiber* now = nullptr;
  ucontext_t scheduler;
  std::function<void()> body;
  dim3 block{}, grid{}, block_size{};
  std::vector<unsigned char> shared;
  unsigned char* shared_base = nullptr;
  int order = 0;   // 0: warp after warp, 1: the same backwards, 2: all in turns, interleaved
};
inline Machine machine;

inline void yield() { swapcontext(&machine.now->context, &machine.scheduler); }
inline void barrier() {
  const int mine = ++machine.now->waits;
  for (;;) {
    bool all = true;
    for (Fiber& f : machine.fibers) all = all && (f.done || f.waits >= mine);
    if (all) return;
    yield();
  }
}
inline void warp_barrier() {
  const int mine = ++machine.now->warp_waits, warp = machine.now->thread.x / 32;
  for (;;) {
    bool all = true;
    for (int i = warp * 32; i < warp * 32 + 32; ++i) all = all && (machine.fibers[i].done || machine.fibers[i].warp_waits >= mine);
    if (all) return;
    yield();
  }
}
inline int lane() { return machine.now->thread.x % 32; }
struct WarpWords {
  uint32_t word[32][8];
};
inline WarpWords words[32];
// Shows `count` registers of every lane to the warp while use runs.
template <class F> void exchange(const uint32_t* give, int count, F&& use) {
  WarpWords& w = words[machine.now->thread.x / 32];
  warp_barrier();
  for (int i = 0; i < count; ++i) w.word[lane()][i] = give[i];
  warp_barrier();
  use(w);
  warp_barrier();
}
inline void entry() {
  machine.body();
  machine.now->done = true;
  swapcontext(&machine.now->context, &machine.scheduler);
}
template <class F> void launch(unsigned grid, int threads, int64_t shared, F&& kernel) {
  machine.grid = {grid, 1, 1};
  machine.block_size = {unsigned(threads), 1, 1};
  machine.shared.assign(shared + 1024, 0xff);
  machine.shared_base = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(machine.shared.data()) + 1023) / 1024 * 1024);
  machine.body = kernel;
  machine.fibers.resize(threads);
  for (unsigned b = 0; b < grid; ++b) {
    machine.block = {b, 0, 0};
    std::memset(machine.shared_base, 0xff, shared);
    for (int t = 0; t < threads; ++t) {
      Fiber& f = machine.fibers[t];
      if (f.stack.empty()) f.stack.resize(1 << 17);
      f.thread = {unsigned(t), 0, 0};
      f.waits = f.warp_waits = 0;
      f.done = false;
      f.copies.clear();
      f.open.clear();
      getcontext(&f.context);
      f.context.uc_stack.ss_sp = f.stack.data();
      f.context.uc_stack.ss_size = f.stack.size();
      f.context.uc_link = nullptr;
      makecontext(&f.context, entry, 0);
    }
    // A warp runs as far as it can before the next one does, or all take turns.
    const int width = machine.order == 2 ? threads : 32;
    for (bool left = true; left;) {
      left = false;
      for (int w = 0; w < threads; w += width) {
        const int base = machine.order == 1 ? threads - width - w : w;
        for (int64_t before = -1, after = 0; before != after;) {
          before = after;
          after = 0;
          for (int i = 0; i < width; ++i) {
            Fiber& f = machine.fibers[base + (machine.order == 0 ? i : machine.order == 1 ? width - 1 - i : (i * 97 + 13) % width)];
            if (!f.done) {
              left = true;
              machine.now = &f;
              swapcontext(&machine.scheduler, &f.context);
            }
            after += f.waits + f.warp_waits + f.done;
          }
        }
      }
    }
  }
}

}  // namespace host_cuda

#define threadIdx (host_cuda::machine.now->thread)
#define blockIdx (host_cuda::machine.block)
#define gridDim (host_cuda::machine.grid)

inline void __syncthreads() { host_cuda::barrier(); }
template <class T> T __shfl_xor_sync(uint32_t, T value, int mask) {
  uint32_t give[2] = {0, 0};
  std::memcpy(give, &value, sizeof(T));
  T got;
  host_cuda::exchange(give, 2, [&](host_cuda::WarpWords& w) {
    uint32_t take[2] = {uint32_t(w.word[host_cuda::lane() ^ mask][0]), uint32_t(w.word[host_cuda::lane() ^ mask][1])};
    std::memcpy(&got, take, sizeof(T));
  });
  return got;
}
inline uint32_t __reduce_max_sync(uint32_t, uint32_t value) {
  uint32_t top = 0;
  host_cuda::exchange(&value, 1, [&](host_cuda::WarpWords& w) {
    for (int i = 0; i < 32; ++i) top = max(top, uint32_t(w.word[i][0]));
  });
  return top;
}

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount, cudaFuncAttributeMaxDynamicSharedMemorySize };
namespace host_cuda {
inline int shared_limit = 232448, processors = 1;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int which, int) {
  *value = which == cudaDevAttrMultiProcessorCount ? host_cuda::processors : host_cuda::shared_limit;
  return cudaSuccess;
}
template <class K> cudaError_t cudaFuncSetAttribute(K, int, int bytes) { return bytes > host_cuda::shared_limit; }
