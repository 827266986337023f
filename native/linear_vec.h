// What products need beyond vec.h: lookups of bytes, dot products of bytes, FP16; a panel's 16 rows are R vectors.
#pragma once
#include "rotate.h"

#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AVX2__) || defined(__aarch64__)
#define HB_UNROLL _Pragma("GCC unroll 16")
#define HB_LOOKUP HB_INLINE
#else
// each lookup is a loop here: unrolled and inlined they would be endless
#define HB_UNROLL
#define HB_LOOKUP static __attribute__((noinline))
#endif

namespace {

constexpr int R = 16 / W;

typedef uint8_t RowBytes __attribute__((vector_size(W)));
typedef int8_t SignedRowBytes __attribute__((vector_size(W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

HB_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
  return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (F)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// FP16 to FP32, infinities and NaN included.
HB_INLINE F widen(Halves h) {
#if defined(__AVX512F__)
  return (F)_mm512_cvtph_ps((__m256i)h);
#elif defined(__F16C__)
  return (F)_mm256_cvtph_ps((__m128i)h);
#elif defined(__aarch64__)
  return (F)vcvt_f32_f16((float16x4_t)h);
#else
  const I wide = __builtin_convertvector(h, I);
  const F magnitude = floats((wide & 0x7fff) << 13) * all(0x1p112f);
  const I special = (wide & 0x7c00) == 0x7c00;
  return floats(bits(magnitude) | ((wide & 0x8000) << 16) | (special & 0x7f800000));
#endif
}

// table[index] for bytes 0..15; the 16 bytes of the table are repeated.
HB_LOOKUP Bytes lookup_bytes(Bytes table, Bytes index) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_shuffle_epi8((__m512i)table, (__m512i)index);
#elif defined(__AVX2__)
  return (Bytes)_mm256_shuffle_epi8((__m256i)table, (__m256i)index);
#elif defined(__aarch64__)
  return (Bytes)vqtbl1q_u8((uint8x16_t)table, (uint8x16_t)index);
#else
  Bytes found;
  for (int i = 0; i < 4 * W; ++i) found[i] = table[index[i]];
  return found;
#endif
}

HB_INLINE Bytes repeat16(const void* table) {
  Bytes v;
  for (int i = 0; i < 4 * W; i += 16) memcpy((char*)&v + i, table, 16);
  return v;
}

// b where the lane's sign bit is set, else a.
HB_INLINE Bytes pick(I sign, Bytes a, Bytes b) {
#if defined(__AVX512F__)
  return (Bytes)_mm512_mask_blend_epi32(_mm512_movepi32_mask((__m512i)sign), (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Bytes)_mm256_blendv_ps((__m256)a, (__m256)b, (__m256)sign);
#else
  return (Bytes)((sign < 0) ? (I)b : (I)a);
#endif
}

HB_INLINE F pick(I sign, F a, F b) { return (F)pick(sign, (Bytes)a, (Bytes)b); }

// W bytes, a lane each; GCC converts short vectors byte by byte.
HB_INLINE I row_bytes(const void* p) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load<RowBytes>(p), I);
#endif
}

// The same with their sign.
HB_INLINE I signed_row_bytes(const void* p) {
#if defined(__AVX512F__)
  return (I)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__AVX2__)
  return (I)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  return __builtin_convertvector(load<SignedRowBytes>(p), I);
#endif
}

// W BF16 as FP32; GCC converts these vectors in five instructions.
HB_INLINE F widen_bf16(const void* p) {
#if defined(__AVX512F__)
  return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__)
  return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return floats(__builtin_convertvector(load<Halves>(p), I) << 16);
#endif
}

// The even and the odd elements of 2 W.
HB_INLINE void split_even_odd(const float* p, F& even, F& odd) {
#if defined(__AVX512F__)
  const I index = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
  even = (F)_mm512_permutex2var_ps(_mm512_loadu_ps(p), (__m512i)index, _mm512_loadu_ps(p + 16));
  odd = (F)_mm512_permutex2var_ps(_mm512_loadu_ps(p), (__m512i)(index + 1), _mm512_loadu_ps(p + 16));
#elif defined(__AVX2__)
  const __m256 a = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 8), 1);
  const __m256 b = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + 4)), _mm_loadu_ps(p + 12), 1);
  even = (F)_mm256_shuffle_ps(a, b, 0x88);
  odd = (F)_mm256_shuffle_ps(a, b, 0xdd);
#else
  for (int i = 0; i < W; ++i) {
    even[i] = p[2 * i];
    odd[i] = p[2 * i + 1];
  }
#endif
}

// Byte j of each lane as the lane's top byte, zeros below.
template <int J>
HB_INLINE I spread(Bytes v) {
  if (J == 3) return (I)v & (int32_t)0xff000000;
  if (J == 0) return (I)v << 24;
#if defined(__AVX2__) && !defined(__AVX512F__)
  constexpr char Z = -128;
  const __m256i index = _mm256_setr_epi8(Z, Z, Z, J, Z, Z, Z, 4 + J, Z, Z, Z, 8 + J, Z, Z, Z, 12 + J, Z, Z, Z, J, Z, Z, Z,
                                         4 + J, Z, Z, Z, 8 + J, Z, Z, Z, 12 + J);
  return (I)_mm256_shuffle_epi8((__m256i)v, index);
#else
  return ((I)v << (24 - 8 * J)) & (int32_t)0xff000000;
#endif
}

// How many products of 16 columns fit into 16 bits where the processor multiplies bytes that way.
enum { NARROW = 0, MEDIUM = 1, WIDE = 2 };

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define HB_VNNI 1
#endif

// Whether a product of this style takes integers plus their bias, so that they are not negative.
constexpr bool is_biased(int style) {
#if defined(HB_VNNI)
  return style >= 0;
#elif defined(__AVX2__)
  return style != WIDE;
#else
  return style > WIDE;
#endif
}

#if defined(__AVX512F__) && !defined(HB_VNNI)
HB_INLINE I pairs16(Bytes w, I x) { return (I)_mm512_maddubs_epi16((__m512i)w, (__m512i)x); }
HB_INLINE I add16(I a, I b) { return (I)_mm512_add_epi16((__m512i)a, (__m512i)b); }
HB_INLINE I pairs32(I a) { return (I)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
HB_INLINE I signed_pairs(Bytes w, I x) {
  const __mmask64 negative = _mm512_movepi8_mask((__m512i)w);
  const I turned = (I)_mm512_mask_sub_epi8((__m512i)x, negative, _mm512_setzero_si512(), (__m512i)x);
  return pairs16((Bytes)_mm512_abs_epi8((__m512i)w), turned);
}
#elif defined(__AVX2__) && !defined(HB_VNNI)
HB_INLINE I pairs16(Bytes w, I x) { return (I)_mm256_maddubs_epi16((__m256i)w, (__m256i)x); }
HB_INLINE I add16(I a, I b) { return (I)_mm256_add_epi16((__m256i)a, (__m256i)b); }
HB_INLINE I pairs32(I a) { return (I)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
HB_INLINE I signed_pairs(Bytes w, I x) {
  return pairs16((Bytes)_mm256_abs_epi8((__m256i)w), (I)_mm256_sign_epi8((__m256i)x, (__m256i)w));
}
#endif

#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(HB_VNNI)
// Keeps the compiler from moving the step that gives v.
#define HB_STAGES 1
#define HB_KEEP(v) __asm__ volatile("" : "+x"(v))
#endif

// start + the products of 16 columns: a lane of w[i] has 4 columns of a row, x[i] the activations of these in each lane.
template <int STYLE>
HB_INLINE I dot16(Bytes w0, Bytes w1, Bytes w2, Bytes w3, const I* x, I start) {
#if defined(__AVX512VNNI__)
  start = (I)_mm512_dpbusd_epi32((__m512i)start, (__m512i)w0, (__m512i)x[0]);
  start = (I)_mm512_dpbusd_epi32((__m512i)start, (__m512i)w1, (__m512i)x[1]);
  start = (I)_mm512_dpbusd_epi32((__m512i)start, (__m512i)w2, (__m512i)x[2]);
  return (I)_mm512_dpbusd_epi32((__m512i)start, (__m512i)w3, (__m512i)x[3]);
#elif defined(__AVXVNNI__)
  start = (I)_mm256_dpbusd_avx_epi32((__m256i)start, (__m256i)w0, (__m256i)x[0]);
  start = (I)_mm256_dpbusd_avx_epi32((__m256i)start, (__m256i)w1, (__m256i)x[1]);
  start = (I)_mm256_dpbusd_avx_epi32((__m256i)start, (__m256i)w2, (__m256i)x[2]);
  return (I)_mm256_dpbusd_avx_epi32((__m256i)start, (__m256i)w3, (__m256i)x[3]);
#elif defined(__AVX2__)
  if (STYLE == WIDE) {
    const I a = pairs32(signed_pairs(w0, x[0])) + pairs32(signed_pairs(w1, x[1]));
    return start + a + (pairs32(signed_pairs(w2, x[2])) + pairs32(signed_pairs(w3, x[3])));
  }
  const I a = add16(pairs16(w0, x[0]), pairs16(w1, x[1])), b = add16(pairs16(w2, x[2]), pairs16(w3, x[3]));
  return STYLE == NARROW ? start + pairs32(add16(a, b)) : start + pairs32(a) + pairs32(b);
#elif defined(__ARM_FEATURE_DOTPROD)
  int32x4_t sum = (int32x4_t)start;
  sum = vdotq_s32(sum, (int8x16_t)w0, (int8x16_t)x[0]);
  sum = vdotq_s32(sum, (int8x16_t)w1, (int8x16_t)x[1]);
  sum = vdotq_s32(sum, (int8x16_t)w2, (int8x16_t)x[2]);
  return (I)vdotq_s32(sum, (int8x16_t)w3, (int8x16_t)x[3]);
#else
  const Bytes w[4] = {w0, w1, w2, w3};
  for (int i = 0; i < 4; ++i) {
#if defined(__aarch64__)
    const int16x8_t low = vmull_s8(vget_low_s8((int8x16_t)w[i]), vget_low_s8((int8x16_t)x[i]));
    const int16x8_t high = vmull_s8(vget_high_s8((int8x16_t)w[i]), vget_high_s8((int8x16_t)x[i]));
    start += (I)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
#else
    for (int j = 0; j < 4; ++j) {
      // products of bytes are exact in FP32, for which there is a multiplication everywhere
      const F a = to_float((I)w[i] << (24 - 8 * j) >> 24), b = to_float(x[i] << (24 - 8 * j) >> 24);
      start += to_int(a * b);
    }
#endif
  }
  return start;
#endif
}

}  // namespace
