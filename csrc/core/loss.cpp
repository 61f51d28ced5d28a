// Feature losses: the sums a row's loss needs, and the slope written where the row is still in cache.
#include "kernels.h"
#include "simd.h"

namespace {

using bf::LossArgs;

// Three sums over one unit. mse: (f - t)^2. cosine: f t, f f, t t. relative: (f - t)^2, t t. WRITE also stores the mse slope.
template <class S, int K, bool WRITE>
BF_INLINE void accumulate(const S* f, const S* t, S* g, Acc<S> constant, int64_t n, double* sums) {
  using A = Acc<S>;
  constexpr int kSums = K == bf::kMse ? 1 : K == bf::kCosine ? 3 : 2;
  struct Set { Lanes<A> s[kSums]; };
  const Lanes<A> c = splat<A>(constant);
  auto clear = [](Set& set) {
    for (int i = 0; i < kSums; ++i) set.s[i] = zeros<A>();
  };
  auto add = [](Set& set, const Lanes<A>& a, const Lanes<A>& b) {
    if constexpr (K == bf::kCosine) {
      set.s[0] = set.s[0] + a * b;
      set.s[1] = set.s[1] + a * a;
      set.s[2] = set.s[2] + b * b;
    } else {
      Lanes<A> d = a - b;
      set.s[0] = set.s[0] + d * d;
      if constexpr (K == bf::kRelative) set.s[1] = set.s[1] + b * b;
    }
  };
  auto full = [&](Set& set, int64_t j) {
    Lanes<A> a = load(f + j), b = load(t + j);
    add(set, a, b);
    if constexpr (WRITE) store(g + j, c * (a - b));
  };
  Lanes<double> total[kSums];
  for (int i = 0; i < kSums; ++i) total[i] = zeros<double>();
  int64_t j = 0;
  while (j < n) {
    int64_t stop = n - j > 1024 ? j + 1024 : n;
    Set s0, s1;
    clear(s0);
    clear(s1);
    for (; j + 32 <= stop; j += 32) {
      full(s0, j);
      full(s1, j + 16);
    }
    if (j + 16 <= stop) {
      full(s0, j);
      j += 16;
    }
    if (j < stop) {
      Lanes<A> a = load_tail(f + j, stop - j), b = load_tail(t + j, stop - j);
      add(s1, a, b);
      if constexpr (WRITE) store_tail(g + j, c * (a - b), stop - j);
      j = stop;
    }
    for (int i = 0; i < kSums; ++i) total[i] = total[i] + widen(s0.s[i] + s1.s[i]);
  }
  for (int i = 0; i < kSums; ++i) sums[i] = tree_sum(total[i]);
}

struct Unit { int64_t row, start, n; };
BF_INLINE Unit unit_of(const LossArgs& a, int64_t u) {
  int64_t row = a.chunks == 1 ? u : u / a.chunks, start = (u - row * a.chunks) * bf::kChunk;
  return {row, start, a.d - start < bf::kChunk ? a.d - start : bf::kChunk};
}

template <class S, int K, bool WRITE>
void sums(const LossArgs& a, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    Unit at = unit_of(a, u);
    accumulate<S, K, WRITE>(static_cast<const S*>(a.f) + at.row * a.f_stride + at.start, static_cast<const S*>(a.t) + at.row * a.t_stride + at.start,
                            WRITE ? static_cast<S*>(a.g) + at.row * a.g_stride + at.start : nullptr, Acc<S>(a.constant), at.n, a.sums + 3 * u);
  }
}

template <class S, bool BOTH>
void slope(const LossArgs& a, int64_t begin, int64_t end) {
  using A = Acc<S>;
  for (int64_t u = begin; u < end; ++u) {
    Unit at = unit_of(a, u);
    const S* f = static_cast<const S*>(a.f) + at.row * a.f_stride + at.start;
    const S* t = static_cast<const S*>(a.t) + at.row * a.t_stride + at.start;
    S* g = static_cast<S*>(a.g) + at.row * a.g_stride + at.start;
    const Lanes<A> cf = splat<A>(A(a.coef[3 * at.row])), ct = splat<A>(A(a.coef[3 * at.row + 1]));
    auto of = [&](const Lanes<A>& x, const Lanes<A>& y) { return BOTH ? cf * x + ct * y : cf * (x - y); };
    if (a.coef[3 * at.row + 2] != 0) {
      __builtin_memset(g, 0, at.n * sizeof(S));
      continue;
    }
    int64_t j = 0;
    for (; j + 16 <= at.n; j += 16) store(g + j, of(load(f + j), load(t + j)));
    if (j < at.n) store_tail(g + j, of(load_tail(f + j, at.n - j), load_tail(t + j, at.n - j)), at.n - j);
  }
}

}  // namespace

#define BF_SUMS(S) {sums<S, bf::kMse, false>, sums<S, bf::kCosine, false>, sums<S, bf::kRelative, false>}
#define BF_SLOPES(S) {slope<S, false>, slope<S, true>}

namespace bf {
extern const LossKernels BF_TABLE(loss) = {
    {BF_SUMS(float), BF_SUMS(double), BF_SUMS(bfloat16), BF_SUMS(float16)},
    {BF_SLOPES(float), BF_SLOPES(double), BF_SLOPES(bfloat16), BF_SLOPES(float16)},
    {sums<float, bf::kMse, true>, sums<double, bf::kMse, true>, sums<bfloat16, bf::kMse, true>, sums<float16, bf::kMse, true>},
};
}  // namespace bf
