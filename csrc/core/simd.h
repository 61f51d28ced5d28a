// Sixteen lanes on every instruction set, so that all of them add in the same order and give the same bits.
// Everything is in an anonymous namespace: a shared symbol would carry AVX code into the baseline.
#pragma once
#include <cstdint>
#if BF_ISA > 0
#include <immintrin.h>
#endif

#if BF_ISA == 2
#define BF_BYTES 64
#elif BF_ISA == 1
#define BF_BYTES 32
#else
#define BF_BYTES 16
#endif
#define BF_INLINE inline __attribute__((always_inline))

namespace {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class S> struct AccOf { using type = float; };
template <> struct AccOf<double> { using type = double; };
template <class S> using Acc = typename AccOf<S>::type;
template <class A> struct BitsOf { using type = int32_t; };
template <> struct BitsOf<double> { using type = int64_t; };
template <class A> using Bits = typename BitsOf<A>::type;

template <class T> struct Lanes {
  typedef T Native __attribute__((vector_size(BF_BYTES)));
  static constexpr int kParts = 16 * sizeof(T) / BF_BYTES;
  static constexpr int kPer = BF_BYTES / sizeof(T);
  Native v[kParts];
};

#define BF_EACH(T) _Pragma("GCC unroll 8") for (int k = 0; k < Lanes<T>::kParts; ++k)

template <class T> BF_INLINE Lanes<T> splat(T value) {
  Lanes<T> r;
  BF_EACH(T) r.v[k] = value - typename Lanes<T>::Native{};
  return r;
}
template <class T> BF_INLINE Lanes<T> zeros() {
  Lanes<T> r;
  BF_EACH(T) r.v[k] = typename Lanes<T>::Native{};
  return r;
}
template <class T> BF_INLINE Lanes<T> operator+(Lanes<T> a, const Lanes<T>& b) { BF_EACH(T) a.v[k] += b.v[k]; return a; }
template <class T> BF_INLINE Lanes<T> operator-(Lanes<T> a, const Lanes<T>& b) { BF_EACH(T) a.v[k] -= b.v[k]; return a; }
template <class T> BF_INLINE Lanes<T> operator*(Lanes<T> a, const Lanes<T>& b) { BF_EACH(T) a.v[k] *= b.v[k]; return a; }
template <class T> BF_INLINE Lanes<T> operator&(Lanes<T> a, const Lanes<T>& b) { BF_EACH(T) a.v[k] &= b.v[k]; return a; }
template <class T> BF_INLINE Lanes<T> operator|(Lanes<T> a, const Lanes<T>& b) { BF_EACH(T) a.v[k] |= b.v[k]; return a; }

template <class A> BF_INLINE Lanes<Bits<A>> to_bits(const Lanes<A>& a) {
  Lanes<Bits<A>> r;
  BF_EACH(A) r.v[k] = (typename Lanes<Bits<A>>::Native)a.v[k];
  return r;
}
template <class A> BF_INLINE Lanes<A> from_bits(const Lanes<Bits<A>>& a) {
  Lanes<A> r;
  BF_EACH(A) r.v[k] = (typename Lanes<A>::Native)a.v[k];
  return r;
}
// -1 in the lanes where it holds.
template <class A> BF_INLINE Lanes<Bits<A>> greater(const Lanes<A>& a, const Lanes<A>& b) {
  Lanes<Bits<A>> r;
  BF_EACH(A) r.v[k] = (typename Lanes<Bits<A>>::Native)(a.v[k] > b.v[k]);
  return r;
}
template <class B> BF_INLINE Lanes<B> equal(const Lanes<B>& a, const Lanes<B>& b) {
  Lanes<B> r;
  BF_EACH(B) r.v[k] = (typename Lanes<B>::Native)(a.v[k] == b.v[k]);
  return r;
}
template <class A> constexpr Bits<A> kAbsMask = sizeof(A) == 4 ? Bits<A>(0x7fffffff) : Bits<A>(0x7fffffffffffffffLL);

// |x| as an integer: it orders like the number, with NaN above infinity.
template <class A> BF_INLINE Lanes<Bits<A>> magnitude(const Lanes<A>& a) { return to_bits(a) & splat<Bits<A>>(kAbsMask<A>); }
template <class A> BF_INLINE Lanes<A> absolute(const Lanes<A>& a) { return from_bits<A>(magnitude(a)); }

BF_INLINE Lanes<int32_t> larger(Lanes<int32_t> a, const Lanes<int32_t>& b) {
  BF_EACH(int32_t) {
#if BF_ISA == 2
    a.v[k] = (Lanes<int32_t>::Native)_mm512_max_epi32((__m512i)a.v[k], (__m512i)b.v[k]);
#elif BF_ISA == 1
    a.v[k] = (Lanes<int32_t>::Native)_mm256_max_epi32((__m256i)a.v[k], (__m256i)b.v[k]);
#else
    a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
#endif
  }
  return a;
}
BF_INLINE Lanes<int64_t> larger(Lanes<int64_t> a, const Lanes<int64_t>& b) {
  BF_EACH(int64_t) {
#if BF_ISA == 2
    a.v[k] = (Lanes<int64_t>::Native)_mm512_max_epi64((__m512i)a.v[k], (__m512i)b.v[k]);
#else
    a.v[k] = a.v[k] > b.v[k] ? a.v[k] : b.v[k];
#endif
  }
  return a;
}

BF_INLINE Lanes<double> widen(const Lanes<double>& a) { return a; }
BF_INLINE Lanes<double> widen(const Lanes<float>& a) {
  Lanes<double> r;
#if BF_ISA == 2
  r.v[0] = (Lanes<double>::Native)_mm512_cvtps_pd(_mm512_castps512_ps256((__m512)a.v[0]));
  r.v[1] = (Lanes<double>::Native)_mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)a.v[0], 1));
#elif BF_ISA == 1
  for (int k = 0; k < 2; ++k) {
    r.v[2 * k] = (Lanes<double>::Native)_mm256_cvtps_pd(_mm256_castps256_ps128((__m256)a.v[k]));
    r.v[2 * k + 1] = (Lanes<double>::Native)_mm256_cvtps_pd(_mm256_extractf128_ps((__m256)a.v[k], 1));
  }
#else
  float in[16];
  double wide[16];
  __builtin_memcpy(in, &a, sizeof(in));
  for (int i = 0; i < 16; ++i) wide[i] = in[i];
  __builtin_memcpy(&r, wide, sizeof(wide));
#endif
  return r;
}

// One fixed tree: lane i takes lane i + 8, then + 4, + 2, + 1.
BF_INLINE double tree_sum(const Lanes<double>& a) {
#if BF_ISA > 0
#if BF_ISA == 2
  __m512d eight = (__m512d)(a.v[0] + a.v[1]);
  __m256d four = _mm512_castpd512_pd256(eight) + _mm512_extractf64x4_pd(eight, 1);
#else
  __m256d four = (__m256d)((a.v[0] + a.v[2]) + (a.v[1] + a.v[3]));
#endif
  __m128d two = _mm256_castpd256_pd128(four) + _mm256_extractf128_pd(four, 1);
  return two[0] + two[1];
#else
  double t[16];
  __builtin_memcpy(t, &a, sizeof(t));
  for (int i = 0; i < 8; ++i) t[i] += t[i + 8];
  for (int i = 0; i < 4; ++i) t[i] += t[i + 4];
  return (t[0] + t[2]) + (t[1] + t[3]);
#endif
}
BF_INLINE int32_t tree_max(const Lanes<int32_t>& a) {
#if BF_ISA > 0
#if BF_ISA == 2
  __m256i eight = _mm256_max_epi32(_mm512_castsi512_si256((__m512i)a.v[0]), _mm512_extracti64x4_epi64((__m512i)a.v[0], 1));
#else
  __m256i eight = _mm256_max_epi32((__m256i)a.v[0], (__m256i)a.v[1]);
#endif
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
#else
  int32_t t[16];
  __builtin_memcpy(t, &a, sizeof(t));
  for (int i = 1; i < 16; ++i) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
#endif
}
BF_INLINE int64_t tree_max(const Lanes<int64_t>& a) {
  int64_t t[16];
  __builtin_memcpy(t, &a, sizeof(t));
  for (int i = 1; i < 16; ++i) t[0] = t[i] > t[0] ? t[i] : t[0];
  return t[0];
}
template <class A> BF_INLINE double value_of(Bits<A> bits) {
  A value;
  __builtin_memcpy(&value, &bits, sizeof(value));
  return value;
}

// --- exact loads ---
template <class T> BF_INLINE Lanes<T> load_same(const T* p) {
  Lanes<T> r;
  BF_EACH(T) __builtin_memcpy(&r.v[k], p + k * Lanes<T>::kPer, BF_BYTES);
  return r;
}
BF_INLINE Lanes<float> load(const float* p) { return load_same(p); }
BF_INLINE Lanes<double> load(const double* p) { return load_same(p); }

BF_INLINE Lanes<float> load(const bfloat16* p) {
  Lanes<float> r;
#if BF_ISA == 2
  __m256i h;
  __builtin_memcpy(&h, p, 32);
  r.v[0] = (Lanes<float>::Native)_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16);
#elif BF_ISA == 1
  for (int k = 0; k < 2; ++k) {
    __m128i h;
    __builtin_memcpy(&h, p + 8 * k, 16);
    r.v[k] = (Lanes<float>::Native)_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16);
  }
#else
  uint32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = uint32_t(p[i].bits) << 16;
  __builtin_memcpy(&r, wide, sizeof(wide));
#endif
  return r;
}

#if BF_ISA == 0
// Integer steps and normal floats only, so denormals-are-zero cannot touch it.
BF_INLINE uint32_t half_to_float(uint32_t h) {
  uint32_t sign = (h & 0x8000u) << 16, rest = h & 0x7fffu, bits;
  if (rest < 0x400u) {
    float value = float(int32_t(rest)) * 5.9604644775390625e-8f;
    __builtin_memcpy(&bits, &value, 4);
  } else if (rest < 0x7c00u) {
    bits = (rest << 13) + 0x38000000u;
  } else {
    bits = (rest << 13) | 0x7f800000u | (rest > 0x7c00u ? 0x400000u : 0u);
  }
  return sign | bits;
}
BF_INLINE uint32_t float_to_half(uint32_t f) {
  uint32_t sign = (f >> 16) & 0x8000u, rest = f & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u | ((rest >> 13) & 0x3ffu);
  if (rest >= 0x47800000u) return sign | 0x7c00u;
  if (rest < 0x38800000u) {
    // Adding 0.5 lets the float adder round at the last place of a half denormal.
    float value;
    __builtin_memcpy(&value, &rest, 4);
    value += 0.5f;
    __builtin_memcpy(&rest, &value, 4);
    return sign | (rest - 0x3f000000u);
  }
  return sign | ((rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13);
}
#endif

BF_INLINE Lanes<float> load(const float16* p) {
  Lanes<float> r;
#if BF_ISA == 2
  __m256i h;
  __builtin_memcpy(&h, p, 32);
  r.v[0] = (Lanes<float>::Native)_mm512_cvtph_ps(h);
#elif BF_ISA == 1
  for (int k = 0; k < 2; ++k) {
    __m128i h;
    __builtin_memcpy(&h, p + 8 * k, 16);
    r.v[k] = (Lanes<float>::Native)_mm256_cvtph_ps(h);
  }
#else
  uint32_t wide[16];
  for (int i = 0; i < 16; ++i) wide[i] = half_to_float(p[i].bits);
  __builtin_memcpy(&r, wide, sizeof(wide));
#endif
  return r;
}

// The first n < 16 elements, zeros behind them.
template <class S> BF_INLINE auto load_tail(const S* p, int64_t n) {
#if BF_ISA == 2
  if constexpr (sizeof(S) == 4) {
    Lanes<float> r;
    r.v[0] = (Lanes<float>::Native)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p);
    return r;
  } else if constexpr (sizeof(S) == 8) {
    Lanes<double> r;
    unsigned mask = (1u << n) - 1;
    r.v[0] = (Lanes<double>::Native)_mm512_maskz_loadu_pd(__mmask8(mask), p);
    r.v[1] = (Lanes<double>::Native)_mm512_maskz_loadu_pd(__mmask8(mask >> 8), p + 8);
    return r;
  } else {
    S copy[16];
    __m256i h = _mm256_maskz_loadu_epi16(__mmask16((1u << n) - 1), p);
    __builtin_memcpy(copy, &h, 32);
    return load(copy);
  }
#else
  S copy[16] = {};
  for (int64_t i = 0; i < n; ++i) copy[i] = p[i];
  return load(copy);
#endif
}

// --- stores, rounding to nearest even ---
BF_INLINE void store(float* p, const Lanes<float>& a) { __builtin_memcpy(p, &a, 64); }
BF_INLINE void store(double* p, const Lanes<double>& a) { __builtin_memcpy(p, &a, 128); }
BF_INLINE void store(bfloat16* p, const Lanes<float>& a) {
  uint32_t wide[16];
  __builtin_memcpy(wide, &a, 64);
  for (int i = 0; i < 16; ++i) {
    uint32_t rounded = (wide[i] + 0x7fffu + ((wide[i] >> 16) & 1u)) >> 16;
    p[i].bits = uint16_t((wide[i] & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}
BF_INLINE void store(float16* p, const Lanes<float>& a) {
#if BF_ISA == 2
  __m256i h = _mm512_cvtps_ph((__m512)a.v[0], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(p, &h, 32);
#elif BF_ISA == 1
  for (int k = 0; k < 2; ++k) {
    __m128i h = _mm256_cvtps_ph((__m256)a.v[k], _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __builtin_memcpy(p + 8 * k, &h, 16);
  }
#else
  uint32_t wide[16];
  __builtin_memcpy(wide, &a, 64);
  for (int i = 0; i < 16; ++i) p[i].bits = uint16_t(float_to_half(wide[i]));
#endif
}
template <class S> BF_INLINE void store_tail(S* p, const Lanes<Acc<S>>& a, int64_t n) {
  S copy[16];
  store(copy, a);
  for (int64_t i = 0; i < n; ++i) p[i] = copy[i];
}

#undef BF_EACH
}  // namespace
