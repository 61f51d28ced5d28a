// Per-channel max |x|, sum |x| and sum x^2 in one pass: along planes (NCHW) or across rows (channels_last, tokens, (N, C)).
#include "kernels.h"
#include "simd.h"

namespace {

using bf::StatsArgs;

BF_INLINE double larger_value(double a, double b) {
  // Both are magnitudes: their bits order like numbers and keep NaN.
  int64_t i, j;
  __builtin_memcpy(&i, &a, 8);
  __builtin_memcpy(&j, &b, 8);
  return i > j ? a : b;
}

template <class A> struct Sums {
  Lanes<Bits<A>> most;
  Lanes<A> l1, sumsq;
};
template <class A> BF_INLINE Sums<A> no_sums() { return {zeros<Bits<A>>(), zeros<A>(), zeros<A>()}; }
template <class A, bool ALL> BF_INLINE void add(Sums<A>& s, const Lanes<A>& x) {
  Lanes<Bits<A>> size = magnitude(x);
  s.most = larger(s.most, size);
  if constexpr (ALL) {
    s.l1 = s.l1 + from_bits<A>(size);
    s.sumsq = s.sumsq + x * x;
  }
}

template <class S, bool ALL>
BF_INLINE void stretch(const S* x, int64_t n, double* linf, double* l1, double* sumsq) {
  using A = Acc<S>;
  Lanes<Bits<A>> most = zeros<Bits<A>>();
  Lanes<double> total = zeros<double>(), square = total;
  int64_t j = 0;
  while (j < n) {
    int64_t stop = n - j > 1024 ? j + 1024 : n;
    Sums<A> s0 = no_sums<A>(), s1 = s0;
    for (; j + 32 <= stop; j += 32) {
      add<A, ALL>(s0, load(x + j));
      add<A, ALL>(s1, load(x + j + 16));
    }
    if (j + 16 <= stop) {
      add<A, ALL>(s0, load(x + j));
      j += 16;
    }
    if (j < stop) {
      add<A, ALL>(s1, load_tail(x + j, stop - j));
      j = stop;
    }
    most = larger(most, larger(s0.most, s1.most));
    if constexpr (ALL) {
      total = total + widen(s0.l1 + s1.l1);
      square = square + widen(s0.sumsq + s1.sumsq);
    }
  }
  *linf = larger_value(*linf, value_of<A>(tree_max(most)));
  if constexpr (ALL) {
    *l1 += tree_sum(total);
    *sumsq += tree_sum(square);
  }
}

template <class S, bool ALL>
void plane(const StatsArgs& a, int64_t begin, int64_t end) {
  const int64_t per_block = a.channels * a.pieces;
  while (begin < end) {
    // Samples outside, channels inside: memory is read in order even where a plane is short.
    int64_t block = begin / per_block, stop = (block + 1) * per_block < end ? (block + 1) * per_block : end;
    int64_t last = (block + 1) * a.block < a.samples ? (block + 1) * a.block : a.samples;
    for (int64_t u = begin; u < stop; ++u) a.linf[u] = a.l1[u] = a.sumsq[u] = 0;
    for (int64_t n = block * a.block; n < last; ++n) {
      for (int64_t u = begin; u < stop; ++u) {
        int64_t inside = u - block * per_block, c = a.pieces == 1 ? inside : inside / a.pieces, start = (inside - c * a.pieces) * bf::kChunk;
        int64_t count = a.pieces == 1 || a.inner - start < bf::kChunk ? a.inner - start : bf::kChunk;
        stretch<S, ALL>(static_cast<const S*>(a.x) + n * a.sample_stride + c * a.channel_stride + start, count, a.linf + u, a.l1 + u, a.sumsq + u);
      }
    }
    begin = stop;
  }
}

// As many groups of sixteen channels as the registers hold.
#if BF_ISA == 2
constexpr int kGroups = 8;
#elif BF_ISA == 1
constexpr int kGroups = 2;
#else
constexpr int kGroups = 1;
#endif

template <class A> struct Totals {
  alignas(64) Bits<A> most[bf::kTile];
  alignas(64) double l1[bf::kTile];
  alignas(64) double sumsq[bf::kTile];
};

template <class A, bool ALL>
BF_INLINE void fold(Totals<A>& t, int64_t c, const Sums<A>& s) {
  Lanes<Bits<A>> most;
  __builtin_memcpy(&most, t.most + c, sizeof(most));
  most = larger(most, s.most);
  __builtin_memcpy(t.most + c, &most, sizeof(most));
  if constexpr (ALL) {
    store(t.l1 + c, load(t.l1 + c) + widen(s.l1));
    store(t.sumsq + c, load(t.sumsq + c) + widen(s.sumsq));
  }
}

template <class S, bool ALL, int G>
BF_INLINE void columns(const S* x, int64_t stride, int64_t rows, int64_t c, Totals<Acc<S>>& t) {
  using A = Acc<S>;
  Sums<A> s[G];
#pragma GCC unroll 8
  for (int i = 0; i < G; ++i) s[i] = no_sums<A>();
  for (int64_t r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) add<A, ALL>(s[i], load(x + r * stride + c + 16 * i));
  }
#pragma GCC unroll 8
  for (int i = 0; i < G; ++i) fold<A, ALL>(t, c + 16 * i, s[i]);
}

template <class S, bool ALL>
void rows(const StatsArgs& a, int64_t begin, int64_t end) {
  using A = Acc<S>;
  const int64_t tiles = (a.channels + bf::kTile - 1) / bf::kTile;
  Totals<A> t;
  for (int64_t u = begin; u < end; ++u) {
    int64_t outer = u / tiles, tile = u - outer * tiles, sample = outer / a.pieces, first = (outer - sample * a.pieces) * a.block;
    int64_t width = a.channels - tile * bf::kTile < bf::kTile ? a.channels - tile * bf::kTile : bf::kTile;
    int64_t last = first + a.block < a.inner ? first + a.block : a.inner;
    const S* base = static_cast<const S*>(a.x) + sample * a.sample_stride + tile * bf::kTile;
    for (int64_t c = 0; c < width; c += 16) {
      for (int i = 0; i < 16; ++i) {
        t.most[c + i] = 0;
        t.l1[c + i] = t.sumsq[c + i] = 0;
      }
    }
    for (int64_t r = first; r < last; r += bf::kRowBlock) {
      int64_t count = last - r < bf::kRowBlock ? last - r : bf::kRowBlock, c = 0;
      const S* x = base + r * a.row_stride;
      for (; c + 16 * kGroups <= width; c += 16 * kGroups) columns<S, ALL, kGroups>(x, a.row_stride, count, c, t);
      for (; c + 16 <= width; c += 16) columns<S, ALL, 1>(x, a.row_stride, count, c, t);
      if (c < width) {
        Sums<A> s = no_sums<A>();
        for (int64_t i = 0; i < count; ++i) add<A, ALL>(s, load_tail(x + i * a.row_stride + c, width - c));
        fold<A, ALL>(t, c, s);
      }
    }
    int64_t to = outer * a.channels + tile * bf::kTile;
    for (int64_t c = 0; c < width; ++c) {
      a.linf[to + c] = value_of<A>(t.most[c]);
      a.l1[to + c] = t.l1[c];
      a.sumsq[to + c] = t.sumsq[c];
    }
  }
}

}  // namespace

#define BF_BOTH(fn, S) {fn<S, false>, fn<S, true>}

namespace bf {
extern const StatsKernels BF_TABLE(stats) = {
    {BF_BOTH(plane, float), BF_BOTH(plane, double), BF_BOTH(plane, bfloat16), BF_BOTH(plane, float16)},
    {BF_BOTH(rows, float), BF_BOTH(rows, double), BF_BOTH(rows, bfloat16), BF_BOTH(rows, float16)},
};
}  // namespace bf
