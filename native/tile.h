// A tile: W blocks side by side, lane l holding block l, so that no operation crosses lanes.
#pragma once
#include "halfbyte.h"
#include "vec.h"

namespace {

constexpr int LARGEST_BLOCK = 128;

struct alignas(64) Tile {
  F x[LARGEST_BLOCK];  // the weights
  F y[LARGEST_BLOCK];  // the weights as the search sees them: times one over the tensor scale
  F a[LARGEST_BLOCK];  // |y|
  F w[LARGEST_BLOCK];  // importance
  int size;
  bool weighted;
};

// Lane l of the result: l & H ? b[l - H] : a[l] (low), or a[l + H] : b[l] (high).
template <int H, bool HIGH>
HB_INLINE I butterfly(I a, I b) {
#if HB_LANES == 16
  I index;
  for (int l = 0; l < 16; ++l) index[l] = HIGH ? (l & H ? 16 + l : l + H) : (l & H ? 16 + l - H : l);
  return (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)index, (__m512i)b);
#elif HB_LANES == 8
#define HB_LOW(l) ((l) & H ? 8 + (l) - H : (l))
#define HB_HIGH(l) ((l) & H ? 8 + (l) : (l) + H)
  if (HIGH)
    return HB_SHUFFLE(a, b, HB_HIGH(0), HB_HIGH(1), HB_HIGH(2), HB_HIGH(3), HB_HIGH(4), HB_HIGH(5), HB_HIGH(6),
                      HB_HIGH(7));
  return HB_SHUFFLE(a, b, HB_LOW(0), HB_LOW(1), HB_LOW(2), HB_LOW(3), HB_LOW(4), HB_LOW(5), HB_LOW(6), HB_LOW(7));
#else
#define HB_LOW(l) ((l) & H ? 4 + (l) - H : (l))
#define HB_HIGH(l) ((l) & H ? 4 + (l) : (l) + H)
  if (HIGH) return HB_SHUFFLE(a, b, HB_HIGH(0), HB_HIGH(1), HB_HIGH(2), HB_HIGH(3));
  return HB_SHUFFLE(a, b, HB_LOW(0), HB_LOW(1), HB_LOW(2), HB_LOW(3));
#endif
#undef HB_LOW
#undef HB_HIGH
}

template <int R, int H>
HB_INLINE void butterflies(I* rows) {
  for (int i = 0; i < R; ++i)
    if (!(i & H)) {
      const I a = rows[i], b = rows[i + H];
      rows[i] = butterfly<H, false>(a, b);
      rows[i + H] = butterfly<H, true>(a, b);
    }
}

// Exchanges the row number with the lowest bits of the lane number.
template <int R>
HB_INLINE void transpose(I* rows) {
  if constexpr (R > 8) butterflies<R, 8>(rows);
  if constexpr (R > 4) butterflies<R, 4>(rows);
  if constexpr (R > 2) butterflies<R, 2>(rows);
  butterflies<R, 1>(rows);
}

// 32 bytes of each lane's row as 8 vectors of 32-bit words; at(l) points to the row of lane l.
template <class At>
HB_INLINE void gather_words(At at, I* words) {
#if HB_LANES == 16
  for (int i = 0; i < 8; ++i) {
    const __m256i low = _mm256_loadu_si256((const __m256i*)at(i));
    const __m256i high = _mm256_loadu_si256((const __m256i*)at(i + 8));
    words[i] = (I)_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  transpose<8>(words);
#elif HB_LANES == 8
  for (int i = 0; i < 8; ++i) words[i] = load<I>(at(i));
  transpose<8>(words);
#else
  for (int half = 0; half < 2; ++half) {
    I* part = words + 4 * half;
    for (int i = 0; i < 4; ++i) part[i] = load<I>((const char*)at(i) + 16 * half);
    transpose<4>(part);
  }
#endif
}

// FP16 in the low 16 bits of each lane to FP32; exact, subnormals included. Infinity becomes 65536.
HB_INLINE F widen_half(I h) {
  const F magnitude = floats((h & 0x7fff) << 13) * all(0x1p112f);
  return floats(bits(magnitude) | ((h & 0x8000) << 16));
}

// Whether magnitudes (as bits) of elements of a type are among them that stand for NaN or infinity.
HB_INLINE bool has_no_number(I magnitudes, int type) {
  return any((I)(magnitudes >= (type == HB_FP16 ? 0x47800000 : 0x7f800000)));
}

// `count` elements (a multiple of 16) of W rows; at(l) points to the row of lane l.
template <class At>
HB_INLINE void load_floats(At at, int64_t count, F* out) {
  for (int64_t i = 0; i < count; i += 8) {
    I words[8];
    gather_words([&](int l) { return at(l) + i; }, words);
    for (int k = 0; k < 8; ++k) out[i + k] = floats(words[k]);
  }
}

// The same of any type; first(l) is the number of the element that lane l begins with.
template <class First>
HB_INLINE void load_rows(const void* x, int type, First first, int64_t count, F* out) {
  if (type == HB_FP32) {
    const float* p = (const float*)x;
    load_floats([&](int l) { return p + first(l); }, count, out);
    return;
  }
  const uint16_t* p = (const uint16_t*)x;
  for (int64_t i = 0; i < count; i += 16) {
    I words[8];
    gather_words([&](int l) { return p + first(l) + i; }, words);
    if (type == HB_BF16) {
      for (int k = 0; k < 8; ++k) {
        out[i + 2 * k] = floats(words[k] << 16);
        out[i + 2 * k + 1] = floats(words[k] & (int32_t)0xffff0000);
      }
    } else {
      for (int k = 0; k < 8; ++k) {
        out[i + 2 * k] = widen_half(words[k] & 0xffff);
        out[i + 2 * k + 1] = widen_half((I)((U)words[k] >> 16));
      }
    }
  }
}

HB_INLINE void load_blocks(const void* x, int type, int64_t first, int64_t stride, int count, F* out) {
  load_rows(x, type, [&](int l) { return first + l * stride; }, count, out);
}

// The importance of each lane's elements; lane l is block `first + l` of rows of `columns` elements.
HB_INLINE void load_weights(const float* weights, int64_t first, int64_t columns, int size, F* out) {
  const int64_t in_row = columns / size;
  const float* rows[W];
  for (int l = 0; l < W; ++l) rows[l] = weights + (first + l) % in_row * size;
  load_floats([&](int l) { return rows[l]; }, size, out);
}

template <int H>
HB_INLINE void interleave(I a, I b, I* out) {
#if HB_LANES == 16
  I low, high;
  for (int l = 0; l < 16; ++l) {
    low[l] = (l & 1 ? 16 : 0) + l / 2;
    high[l] = low[l] + 8;
  }
  out[0] = (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)low, (__m512i)b);
  out[1] = (I)_mm512_permutex2var_epi32((__m512i)a, (__m512i)high, (__m512i)b);
#elif HB_LANES == 8
  out[0] = HB_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  out[1] = HB_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  out[0] = HB_SHUFFLE(a, b, 0, 4, 1, 5);
  out[1] = HB_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// From one vector per word (lane = block) to the words of block 0, of block 1, ...; count is a power of two.
HB_INLINE void words_to_blocks(I* words, int count) {
  I other[32];
  I *from = words, *to = other;
  for (int stage = 1; stage < count; stage *= 2) {
    for (int i = 0; i < count / 2; ++i) interleave<0>(from[i], from[i + count / 2], to + 2 * i);
    I* swap = from;
    from = to;
    to = swap;
  }
  if (from != words) memcpy(words, from, (size_t)count * sizeof(I));
}

}  // namespace
