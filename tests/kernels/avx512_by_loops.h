// Instructions of AVX-512 (F, BW, VNNI, BF16) and AVX-VNNI that the products use, as loops after Intel's descriptions,
// so that their code runs on processors without them. Included before a source (-include), with the macros that the
// compiler would define: HB_EMULATE_AVX512, _AVX512VNNI, _AVX512BF16, _AVXVNNI.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace by_loops {

template <class To, class From>
inline To as(From v) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To r;
  memcpy(&r, &v, sizeof r);
  return r;
}

template <class T, int BYTES = 64>
struct Lanes {
  static constexpr int N = BYTES / (int)sizeof(T);
  T v[N];
};

template <class T, class V>
inline Lanes<T, sizeof(V)> lanes(V v) {
  return as<Lanes<T, sizeof(V)>>(v);
}

// one result per lane
template <class To, class T, class Run>
inline To each(int count, Run run) {
  Lanes<T, sizeof(To)> r;
  for (int i = 0; i < count; ++i) r.v[i] = run(i);
  return as<To>(r);
}

inline int16_t saturated(int v) { return (int16_t)(v > 32767 ? 32767 : v < -32768 ? -32768 : v); }

inline __m512 min_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>(16, [&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; });
}
inline __m512 max_ps(__m512 a, __m512 b) {
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>(16, [&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; });
}
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  const auto x = lanes<float>(a), y = lanes<float>(b), z = lanes<float>(c);
  return each<__m512, float>(16, [&](int i) { return __builtin_fmaf(x.v[i], y.v[i], z.v[i]); });
}
inline __m512 cvtph_ps(__m256i a) {
  const auto h = lanes<uint16_t>(a);
  return each<__m512, float>(16, [&](int i) { return _cvtsh_ss(h.v[i]); });
}
inline __m512 permutexvar_ps(__m512i index, __m512 a) {
  const auto n = lanes<int32_t>(index);
  const auto x = lanes<float>(a);
  return each<__m512, float>(16, [&](int i) { return x.v[n.v[i] & 15]; });
}
inline __m512i permutexvar_epi16(__m512i index, __m512i a) {
  const auto n = lanes<uint16_t>(index), x = lanes<uint16_t>(a);
  return each<__m512i, uint16_t>(32, [&](int i) { return x.v[n.v[i] & 31]; });
}
// each 16 bytes have a table of their own
inline __m512i shuffle_epi8(__m512i a, __m512i index) {
  const auto x = lanes<uint8_t>(a), n = lanes<uint8_t>(index);
  return each<__m512i, uint8_t>(64, [&](int i) -> uint8_t { return n.v[i] & 128 ? 0 : x.v[i / 16 * 16 + (n.v[i] & 15)]; });
}
inline __mmask16 movepi32_mask(__m512i a) {
  const auto x = lanes<int32_t>(a);
  unsigned mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (unsigned)(x.v[i] < 0) << i;
  return (__mmask16)mask;
}
inline __mmask64 movepi8_mask(__m512i a) {
  const auto x = lanes<int8_t>(a);
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= (uint64_t)(x.v[i] < 0) << i;
  return mask;
}
inline __m512i mask_blend_epi32(__mmask16 mask, __m512i a, __m512i b) {
  const auto x = lanes<int32_t>(a), y = lanes<int32_t>(b);
  return each<__m512i, int32_t>(16, [&](int i) { return mask >> i & 1 ? y.v[i] : x.v[i]; });
}
inline __m512i mask_sub_epi8(__m512i from, __mmask64 mask, __m512i a, __m512i b) {
  const auto f = lanes<uint8_t>(from), x = lanes<uint8_t>(a), y = lanes<uint8_t>(b);
  return each<__m512i, uint8_t>(64, [&](int i) { return (uint8_t)(mask >> i & 1 ? x.v[i] - y.v[i] : f.v[i]); });
}
inline __m512i abs_epi8(__m512i a) {
  const auto x = lanes<int8_t>(a);
  return each<__m512i, uint8_t>(64, [&](int i) { return (uint8_t)(x.v[i] < 0 ? -x.v[i] : x.v[i]); });
}
inline __m512 permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  const auto n = lanes<int32_t>(index);
  const auto x = lanes<float>(a), y = lanes<float>(b);
  return each<__m512, float>(16, [&](int i) { return n.v[i] & 16 ? y.v[n.v[i] & 15] : x.v[n.v[i] & 15]; });
}
inline __m512i cvtepu16_epi32(__m256i a) {
  const auto x = lanes<uint16_t>(a);
  return each<__m512i, int32_t>(16, [&](int i) { return (int32_t)x.v[i]; });
}
inline __m512i slli_epi32(__m512i a, int count) {
  const auto x = lanes<uint32_t>(a);
  return each<__m512i, uint32_t>(16, [&](int i) { return x.v[i] << count; });
}
inline __m512i cvtepu8_epi32(__m128i a) {
  const auto x = lanes<uint8_t>(a);
  return each<__m512i, int32_t>(16, [&](int i) { return (int32_t)x.v[i]; });
}
inline __m512i cvtepi8_epi32(__m128i a) {
  const auto x = lanes<int8_t>(a);
  return each<__m512i, int32_t>(16, [&](int i) { return (int32_t)x.v[i]; });
}
inline __m512i maddubs_epi16(__m512i a, __m512i b) {
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return each<__m512i, int16_t>(
      32, [&](int i) { return saturated(x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]); });
}
inline __m512i madd_epi16(__m512i a, __m512i b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return each<__m512i, int32_t>(16,
                                [&](int i) { return x.v[2 * i] * y.v[2 * i] + x.v[2 * i + 1] * y.v[2 * i + 1]; });
}
inline __m512i add_epi16(__m512i a, __m512i b) {
  const auto x = lanes<int16_t>(a), y = lanes<int16_t>(b);
  return each<__m512i, int16_t>(32, [&](int i) { return (int16_t)(x.v[i] + y.v[i]); });
}
inline __m512i set1_epi16(int16_t v) {
  return each<__m512i, int16_t>(32, [&](int) { return v; });
}
inline __m512i zero() {
  return each<__m512i, int32_t>(16, [](int) { return 0; });
}
template <class V>
inline V dpbusd(V sum, V a, V b) {
  const auto s = lanes<int32_t>(sum);
  const auto x = lanes<uint8_t>(a);
  const auto y = lanes<int8_t>(b);
  return each<V, int32_t>((int)sizeof(V) / 4, [&](int i) {
    int32_t total = s.v[i];
    for (int j = 0; j < 4; ++j) total += x.v[4 * i + j] * y.v[4 * i + j];
    return total;
  });
}
inline float flushed(float v) { return __builtin_fabsf(v) < 0x1p-126f ? __builtin_copysignf(0.0f, v) : v; }
inline float widened(uint16_t v) { return flushed(as<float>((uint32_t)v << 16)); }
// the odd elements first, as fused operations; subnormal numbers are zeros
inline __m512 dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const auto s = lanes<float>(sum);
  const auto x = lanes<uint16_t>(a), y = lanes<uint16_t>(b);
  return each<__m512, float>(16, [&](int i) {
    const float odd = flushed(__builtin_fmaf(widened(x.v[2 * i + 1]), widened(y.v[2 * i + 1]), flushed(s.v[i])));
    return flushed(__builtin_fmaf(widened(x.v[2 * i]), widened(y.v[2 * i]), odd));
  });
}
template <class V>
inline V load(const void* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}

}  // namespace by_loops

#if defined(HB_EMULATE_AVX512)
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#define _mm512_min_ps by_loops::min_ps
#define _mm512_max_ps by_loops::max_ps
#define _mm512_fmadd_ps by_loops::fmadd_ps
#define _mm512_cvtph_ps by_loops::cvtph_ps
#define _mm512_permutexvar_ps by_loops::permutexvar_ps
#define _mm512_permutexvar_epi16 by_loops::permutexvar_epi16
#define _mm512_shuffle_epi8 by_loops::shuffle_epi8
#define _mm512_movepi32_mask by_loops::movepi32_mask
#define _mm512_movepi8_mask by_loops::movepi8_mask
#define _mm512_mask_blend_epi32 by_loops::mask_blend_epi32
#define _mm512_mask_sub_epi8 by_loops::mask_sub_epi8
#define _mm512_abs_epi8 by_loops::abs_epi8
#define _mm512_cvtepu8_epi32 by_loops::cvtepu8_epi32
#undef _mm512_slli_epi32
#define _mm512_cvtepu16_epi32 by_loops::cvtepu16_epi32
#define _mm512_permutex2var_ps by_loops::permutex2var_ps
#define _mm512_slli_epi32 by_loops::slli_epi32
#define _mm512_cvtepi8_epi32 by_loops::cvtepi8_epi32
#define _mm512_maddubs_epi16 by_loops::maddubs_epi16
#define _mm512_madd_epi16 by_loops::madd_epi16
#define _mm512_add_epi16 by_loops::add_epi16
#define _mm512_set1_epi16 by_loops::set1_epi16
#define _mm512_setzero_si512 by_loops::zero
#define _mm512_loadu_ps by_loops::load<__m512>
#define _mm512_loadu_si512 by_loops::load<__m512i>
#endif
#if defined(HB_EMULATE_AVX512VNNI)
#define __AVX512VNNI__ 1
#define _mm512_dpbusd_epi32 by_loops::dpbusd<__m512i>
#endif
#if defined(HB_EMULATE_AVX512BF16)
#define __AVX512BF16__ 1
#define _mm512_dpbf16_ps by_loops::dpbf16_ps
#endif
#if defined(HB_EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#define _mm256_dpbusd_avx_epi32 by_loops::dpbusd<__m256i>
#endif
