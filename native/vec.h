// Vectors of one instruction set: the compiler's vector extensions, with intrinsics where they lack an operation.
#pragma once
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define HB_LANES 16
#elif defined(__AVX2__)
#define HB_LANES 8
#else
#define HB_LANES 4
#endif
#if defined(__clang__) || __GNUC__ >= 12
#define HB_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define HB_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (I){__VA_ARGS__})
#endif
#define HB_INLINE static inline __attribute__((always_inline))

// everything has internal linkage: code of one instruction set must never stand in for another's
namespace {

constexpr int W = HB_LANES;

typedef float F __attribute__((vector_size(4 * W)));
typedef int32_t I __attribute__((vector_size(4 * W)));
typedef uint32_t U __attribute__((vector_size(4 * W)));
typedef float HalfF __attribute__((vector_size(2 * W)));
typedef double D __attribute__((vector_size(4 * W)));
typedef uint8_t Bytes __attribute__((vector_size(4 * W)));
typedef int16_t Shorts __attribute__((vector_size(4 * W)));

template <class V>
HB_INLINE V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
HB_INLINE void store(void* p, V v) {
  memcpy(p, &v, sizeof v);
}
HB_INLINE F all(float v) { return v - F{}; }  // minus: a negative zero stays one
HB_INLINE I all(int32_t v) { return I{} + v; }
HB_INLINE I bits(F v) { return (I)v; }
HB_INLINE F floats(I v) { return (F)v; }
HB_INLINE F to_float(I v) { return __builtin_convertvector(v, F); }
HB_INLINE I to_int(F v) { return __builtin_convertvector(v, I); }
HB_INLINE F absolute(F v) { return floats(bits(v) & 0x7fffffff); }
HB_INLINE I sign_of(F v) { return bits(v) & (int32_t)0x80000000; }

// a < b ? a : b
HB_INLINE F minimum(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_min_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_min_ps((__m128)a, (__m128)b);
#else
  return a < b ? a : b;
#endif
}
// a > b ? a : b
HB_INLINE F maximum(F a, F b) {
#if defined(__AVX512F__)
  return (F)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (F)_mm256_max_ps((__m256)a, (__m256)b);
#elif defined(__SSE2__)
  return (F)_mm_max_ps((__m128)a, (__m128)b);
#else
  return a > b ? a : b;
#endif
}
HB_INLINE I minimum(I a, I b) { return a < b ? a : b; }
HB_INLINE I maximum(I a, I b) { return a > b ? a : b; }
HB_INLINE F clip(F v, float low, float high) { return minimum(maximum(v, all(low)), all(high)); }
HB_INLINE I clip(I v, int32_t low, int32_t high) { return minimum(maximum(v, all(low)), all(high)); }

HB_INLINE F select(I mask, F a, F b) { return mask ? a : b; }
HB_INLINE I select(I mask, I a, I b) { return mask ? a : b; }
HB_INLINE F keep(I mask, F v) { return floats(mask & bits(v)); }

HB_INLINE bool any(I mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps((__m128)mask) != 0;
#else
  int32_t found = 0;
  for (int l = 0; l < W; ++l) found |= mask[l];
  return found < 0;
#endif
}
HB_INLINE bool every(I mask) { return !any(~mask); }

// Lane numbers 0, 1, 2, ...
HB_INLINE I lane_numbers() {
  I v;
  for (int l = 0; l < W; ++l) v[l] = l;
  return v;
}

// v[index] of 16 floats in memory
HB_INLINE F lookup16(const float* v, I index) {
#if defined(__AVX512F__)
  return (F)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(v));
#elif defined(__AVX2__)
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v), (__m256i)index);
  const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(v + 8), (__m256i)index);
  return (F)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
  F r;
  for (int l = 0; l < W; ++l) r[l] = v[index[l]];
  return r;
#endif
}
HB_INLINE I lookup16(const int32_t* v, I index) { return bits(lookup16((const float*)v, index)); }

// Round half to even, of magnitudes up to 2**22: the sum has no room for a fraction.
HB_INLINE F rint_small(F v) {
  const F magic = all(12582912.0f);
  return (v + magic) - magic;
}
// The same for any finite value.
HB_INLINE F rint_any(F v) { return select(absolute(v) < all(4194304.0f), floats(bits(rint_small(v)) | sign_of(v)), v); }
// Round half to even to BF16, as bits of the FP32 value.
HB_INLINE I bf16_round(F v) {
  const U u = (U)bits(v);
  return (I)((u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u);
}
// Multiplied with a scale v this gives a value in [0.5, 1): a power of two.
HB_INLINE F unit_of(F v) {
  const I field = (I{} + 253) - (I)((U)bits(v) >> 23);
  const I bits_of =
      select(field > 0, field << 23, select(field == 0, all((int32_t)0x00400000), all((int32_t)0x00200000)));
  return floats(bits_of);
}

HB_INLINE D low_half(F v) {
  HalfF h;
  memcpy(&h, &v, sizeof h);
  return __builtin_convertvector(h, D);
}
HB_INLINE D high_half(F v) {
  HalfF h;
  memcpy(&h, (const char*)&v + sizeof h, sizeof h);
  return __builtin_convertvector(h, D);
}

}  // namespace
