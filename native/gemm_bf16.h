// Products of BF16 with sums in FP32, on processors that have them: a lane has two columns of a row.
#pragma once
#include "gemm.h"

namespace {

#if defined(__AVX512BF16__)

// 8 columns of 16 rows as pairs: columns (0, 2), (4, 6), (1, 3), (5, 7), as four shifts of the codes give them.
template <int TABLES>
struct TablePairs {
  const uint8_t* codes;
  const uint8_t* selectors;
  __m512i table;  // 32 BF16 values

  TablePairs(const hb_weight& w, const Panel& panel, int64_t unit)
      : codes(panel.codes + unit * 256), selectors(panel.scales + unit * 32) {
    uint16_t values[32];
    for (int i = 0; i < 32; ++i) {
      const float v = (float)w.tables[TABLES > 1 ? i / 16 : 0][i % 16];
      uint32_t word;
      memcpy(&word, &v, 4);
      values[i] = (uint16_t)(word >> 16);
    }
    table = _mm512_loadu_si512(values);
  }

  HB_MEMBER void eight(int u, int p, I* out) const {
    const U c = load<U>(codes + (u * 4 + p) * 64);
    I second = {};
    if (TABLES > 1) second = (row_bytes(selectors + (u * 2 + p / 2) * 16) >> 7) * 0x00100010;
    HB_UNROLL for (int j = 0; j < 4; ++j) {
      const I index = ((I)(c >> (4 * j)) & 0x000f000f) | second;
      out[j] = (I)_mm512_permutexvar_epi16((__m512i)index, table);
    }
  }
};

struct DecodedPairs {
  const int32_t* values;

  HB_MEMBER void eight(int u, int p, I* out) const {
    HB_UNROLL for (int j = 0; j < 4; ++j) out[j] = load<I>(values + ((u * 4 + p) * 4 + j) * 16);
  }
};

struct Bf16 {
  static constexpr int CHUNK = 16;

  static F dot2(F sum, I a, I b) { return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }

  template <int S, int T, class Pairs>
  static void chunk(const Pairs& pairs, const float* scales, const Tile<T>& tile, int64_t unit, int units,
                    float (*sums)[16]) {
    F total[T];
    HB_UNROLL for (int t = 0; t < T; ++t) total[t] = load<F>(sums[t]);
    for (int u = 0; u < units; ++u)
      HB_UNROLL for (int g = 0; g < S; ++g) {
        F first[T] = {}, second[T] = {};
        HB_UNROLL for (int p = g * 4 / S; p < (g + 1) * 4 / S; ++p) {
          I w[4];
          pairs.eight(u, p, w);
          HB_UNROLL for (int t = 0; t < T; ++t) {
            const char* const x = tile.x[t] + (unit + u) * 64 + 16 * p;
            first[t] = dot2(first[t], w[0], all(load<int32_t>(x)));
            second[t] = dot2(second[t], w[1], all(load<int32_t>(x + 4)));
            first[t] = dot2(first[t], w[2], all(load<int32_t>(x + 8)));
            second[t] = dot2(second[t], w[3], all(load<int32_t>(x + 12)));
          }
        }
        const F scale = load<F>(scales + (u * S + g) * 16);
        HB_UNROLL for (int t = 0; t < T; ++t) total[t] = fma(first[t] + second[t], scale, total[t]);
      }
    HB_UNROLL for (int t = 0; t < T; ++t) store(sums[t], total[t]);
  }

  template <int S, class Pairs>
  static void tiles(const Pairs& pairs, const float* scales, const hb_row_layout& layout, const void* const* rows,
                    int count, int64_t unit, int units, float (*sums)[16]) {
    int i = 0;
    for (; i + 8 <= count; i += 8) chunk<S, 8>(pairs, scales, Tile<8>(layout, rows + i), unit, units, sums + i);
    if (count - i >= 4) {
      chunk<S, 4>(pairs, scales, Tile<4>(layout, rows + i), unit, units, sums + i);
      i += 4;
    }
    if (count - i >= 2) {
      chunk<S, 2>(pairs, scales, Tile<2>(layout, rows + i), unit, units, sums + i);
      i += 2;
    }
    if (i < count) chunk<S, 1>(pairs, scales, Tile<1>(layout, rows + i), unit, units, sums + i);
  }

  template <class Pairs>
  static void run(const Pairs& pairs, int s, const float* scales, const hb_row_layout& layout, const void* const* rows,
                  int count, int64_t unit, int units, float (*sums)[16]) {
    if (count <= 8) {
      if (s == 2) return tiles<2>(pairs, scales, layout, rows, count, unit, units, sums);
      return tiles<1>(pairs, scales, layout, rows, count, unit, units, sums);
    }
    alignas(64) int32_t buffer[CHUNK * 256];
    for (int u = 0; u < units; ++u)
      HB_UNROLL for (int p = 0; p < 4; ++p) {
        I w[4];
        pairs.eight(u, p, w);
        HB_UNROLL for (int j = 0; j < 4; ++j) store(buffer + ((u * 4 + p) * 4 + j) * 16, w[j]);
      }
    const DecodedPairs decoded = {buffer};
    if (s == 2) return tiles<2>(decoded, scales, layout, rows, count, unit, units, sums);
    return tiles<1>(decoded, scales, layout, rows, count, unit, units, sums);
  }

  static void add(const hb_weight& w, const Panel& panel, const float* scales, const hb_row_layout& layout,
                  const void* const* rows, int count, int64_t unit, int units, float (*sums)[16]) {
    const int s = scales_per_unit(w);
    if (w.table_count == 1) run(TablePairs<1>(w, panel, unit), s, scales, layout, rows, count, unit, units, sums);
    else run(TablePairs<2>(w, panel, unit), s, scales, layout, rows, count, unit, units, sums);
  }
};

#endif

}  // namespace
