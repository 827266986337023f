// Products of integers: activations are int8 with a scale for each 32 columns.
#pragma once
#include "gemm.h"

namespace {

struct Int8 {
  static constexpr int CHUNK = 32;  // units that are decoded at a time

  static int style(const hb_weight& w) { return w.highest <= 32 ? NARROW : w.highest <= 64 ? MEDIUM : WIDE; }
  static int bias(const hb_weight& w) { return is_biased(style(w)) ? w.bias : 0; }

  // accumulators [T, 16] += `units` units; the first is `unit` of the activations and the decoder's own.
  template <int STYLE, int S, int T, class Codes>
  static void chunk(const Codes& codes, const float* scales, const Tile<T>& tile, int64_t unit, int units,
                    float (*sums)[16]) {
    F total[T][R];
    HB_UNROLL for (int t = 0; t < T; ++t)
      HB_UNROLL for (int r = 0; r < R; ++r) total[t][r] = load<F>(sums[t] + r * W);
    for (int u = 0; u < units; ++u) {
      F part[T][R];
      I whole[T][R];
      HB_UNROLL for (int g = 0; g < 2; ++g) {
        Bytes q[R][4];
        HB_UNROLL for (int r = 0; r < R; ++r) {
          codes.four(u, 2 * g, r, q[r][0], q[r][1]);
          codes.four(u, 2 * g + 1, r, q[r][2], q[r][3]);
        }
        HB_UNROLL for (int t = 0; t < T; ++t) {
          const char* const x = tile.x[t] + (unit + u) * 32 + 16 * g;
          const I four[4] = {all(load<int32_t>(x)), all(load<int32_t>(x + 4)), all(load<int32_t>(x + 8)),
                             all(load<int32_t>(x + 12))};
          const I start = is_biased(STYLE) ? all(tile.counts[t][2 * (unit + u) + g]) : I{};
          HB_UNROLL for (int r = 0; r < R; ++r) {
            const I dot = dot16<STYLE>(q[r][0], q[r][1], q[r][2], q[r][3], four, start);
            if (S == 2) {
              const F scale = load<F>(scales + (u * 2 + g) * 16 + r * W);
              part[t][r] = g == 0 ? to_float(dot) * scale : fma(to_float(dot), scale, part[t][r]);
            } else {
              whole[t][r] = g == 0 ? dot : whole[t][r] + dot;
            }
          }
        }
      }
      HB_UNROLL for (int t = 0; t < T; ++t) {
        const F scale = all(tile.scales[t][unit + u]);
        HB_UNROLL for (int r = 0; r < R; ++r) {
          if (S == 1) part[t][r] = to_float(whole[t][r]) * load<F>(scales + u * 16 + r * W);
          total[t][r] = fma(part[t][r], scale, total[t][r]);
        }
      }
    }
    HB_UNROLL for (int t = 0; t < T; ++t)
      HB_UNROLL for (int r = 0; r < R; ++r) store(sums[t] + r * W, total[t][r]);
  }

#if defined(HB_STAGES)
#define HB_EACH                               \
  HB_UNROLL for (int t = 0; t < T; ++t)       \
    HB_UNROLL for (int r = 0; r < R; ++r)
  // The same operations for codes that were decoded and fit into 16 bits, in an order that has neither spilled
  // registers nor instructions that wait for each other: one step for all vectors, then the next.
  template <int S, int T>
  static void stages(const uint8_t* codes, const float* scales, const Tile<T>& tile, int64_t unit, int units,
                     float (*sums)[16]) {
    const int64_t to_scales = (const char*)tile.scales[0] - tile.x[0], to_counts = (const char*)tile.counts[0] - tile.x[0];
    int64_t at = unit * 32, at_scale = to_scales + unit * 4, at_count = to_counts + unit * 8;
    const char* x[T];
    for (int t = 0; t < T; ++t) x[t] = tile.x[t];
    alignas(64) float parts[T][16];
    for (int u = 0; u < units; ++u, codes += 512, scales += 16 * S, at += 32, at_scale += 4, at_count += 8)
      HB_UNROLL for (int g = 0; g < 2; ++g) {
        I dot[T][R];
        HB_UNROLL for (int i = 0; i < 4; ++i) {
          Bytes w[R];
          HB_UNROLL for (int r = 0; r < R; ++r) w[r] = load<Bytes>(codes + 256 * g + 64 * i + r * 4 * W);
          HB_UNROLL for (int t = 0; t < T; ++t) {
            const I four = all(load<int32_t>(x[t] + at + 16 * g + 4 * i));
            I pairs[R];
            HB_UNROLL for (int r = 0; r < R; ++r) {
              pairs[r] = pairs16(w[r], four);
              HB_KEEP(pairs[r]);
            }
            HB_UNROLL for (int r = 0; r < R; ++r) {
              dot[t][r] = i == 0 ? pairs[r] : add16(dot[t][r], pairs[r]);
              HB_KEEP(dot[t][r]);
            }
          }
        }
        HB_EACH {
          dot[t][r] = pairs32(dot[t][r]);
          HB_KEEP(dot[t][r]);
        }
        HB_UNROLL for (int t = 0; t < T; ++t) {
          I start = all(load<int32_t>(x[t] + at_count + 4 * g));
          HB_KEEP(start);
          HB_UNROLL for (int r = 0; r < R; ++r) {
            dot[t][r] += start;
            HB_KEEP(dot[t][r]);
          }
        }
        if (S == 1 && g == 0) {
          HB_EACH store(parts[t] + r * W, dot[t][r]);
          continue;
        }
        if (S == 1) HB_EACH dot[t][r] += load<I>(parts[t] + r * W);
        F part[T][R];
        HB_EACH {
          part[t][r] = to_float(dot[t][r]);
          HB_KEEP(part[t][r]);
        }
        const float* const scale = scales + (S == 2 ? 16 * g : 0);
        HB_EACH {
          const F s = load<F>(scale + r * W);
          part[t][r] = S == 1 || g == 0 ? part[t][r] * s : fma(part[t][r], s, load<F>(parts[t] + r * W));
          HB_KEEP(part[t][r]);
        }
        if (g == 0) {
          HB_EACH store(parts[t] + r * W, part[t][r]);
          continue;
        }
        HB_UNROLL for (int t = 0; t < T; ++t) {
          const F scale_of_x = all(load<float>(x[t] + at_scale));
          HB_UNROLL for (int r = 0; r < R; ++r) {
            part[t][r] = fma(part[t][r], scale_of_x, load<F>(sums[t] + r * W));
            HB_KEEP(part[t][r]);
          }
        }
        HB_EACH store(sums[t] + r * W, part[t][r]);
      }
  }
#undef HB_EACH
#endif

  template <class Codes>
  static void decode(const Codes& codes, int units, uint8_t* out) {
    for (int u = 0; u < units; ++u)
      HB_UNROLL for (int p = 0; p < 4; ++p)
        HB_UNROLL for (int r = 0; r < R; ++r) {
          Bytes low, high;
          codes.four(u, p, r, low, high);
          store(out + (u * 8 + 2 * p) * 64 + r * 4 * W, low);
          store(out + (u * 8 + 2 * p + 1) * 64 + r * 4 * W, high);
        }
  }

  // All rows of activations, in tiles.
  template <int STYLE, int S, class Codes>
  static void tiles(const Codes& codes, const float* scales, const hb_row_layout& layout, const void* const* rows,
                    int count, int64_t unit, int units, float (*sums)[16]) {
    int i = 0;
#if defined(HB_STAGES)
    if constexpr (STYLE == NARROW && Codes::DECODED)
      for (; i + 4 <= count; i += 4)
        stages<S, 4>(codes.codes, scales, Tile<4>(layout, rows + i), unit, units, sums + i);
#endif
    for (; i + 4 <= count; i += 4) chunk<STYLE, S, 4>(codes, scales, Tile<4>(layout, rows + i), unit, units, sums + i);
    if (count - i >= 2) {
      chunk<STYLE, S, 2>(codes, scales, Tile<2>(layout, rows + i), unit, units, sums + i);
      i += 2;
    }
    if (i < count) chunk<STYLE, S, 1>(codes, scales, Tile<1>(layout, rows + i), unit, units, sums + i);
  }

  template <int S>
  static void decoded(int style, const uint8_t* codes, const float* scales, const hb_row_layout& layout,
                      const void* const* rows, int count, int64_t unit, int units, float (*sums)[16]) {
    const DecodedCodes d = {codes};
    if (style == NARROW) return tiles<NARROW, S>(d, scales, layout, rows, count, unit, units, sums);
    if (style == MEDIUM) return tiles<MEDIUM, S>(d, scales, layout, rows, count, unit, units, sums);
    return tiles<WIDE, S>(d, scales, layout, rows, count, unit, units, sums);
  }

  static void add(const hb_weight& w, const Panel& panel, const float* scales, const hb_row_layout& layout,
                  const void* const* rows, int count, int64_t unit, int units, float (*sums)[16]) {
    const int s = scales_per_unit(w), b = bias(w);
    // one or a few rows: decoded in registers; more: once for all of them
    if (count <= 4) {
#define HB_TILES(STYLE, S, CODES) \
  return tiles<STYLE, S>(CODES(w, panel, unit, b), scales, layout, rows, count, unit, units, sums)
      if (w.code_kind == HB_CODE_TABLE && style(w) == NARROW && w.table_count == 1) {
        if (s == 2) HB_TILES(NARROW, 2, TableCodes<1>);
        HB_TILES(NARROW, 1, TableCodes<1>);
      }
      if (w.code_kind == HB_CODE_TABLE && style(w) == NARROW && w.table_count == 2) HB_TILES(NARROW, 2, TableCodes<2>);
      if (w.code_kind == HB_CODE_INT8 || w.code_kind == HB_CODE_UINT8) HB_TILES(WIDE, 1, ByteCodes);
#undef HB_TILES
    }
    alignas(64) uint8_t buffer[CHUNK * 512];
    if (w.code_kind == HB_CODE_HIF4) decode(HiF4Codes(w, panel, unit, b), units, buffer);
    else if (w.code_kind != HB_CODE_TABLE) decode(ByteCodes(w, panel, unit, b), units, buffer);
    else if (w.table_count == 1) decode(TableCodes<1>(w, panel, unit, b), units, buffer);
    else if (w.table_count == 2) decode(TableCodes<2>(w, panel, unit, b), units, buffer);
    else decode(TableCodes<4>(w, panel, unit, b), units, buffer);
    if (s == 2) decoded<2>(style(w), buffer, scales, layout, rows, count, unit, units, sums);
    else decoded<1>(style(w), buffer, scales, layout, rows, count, unit, units, sums);
  }
};

}  // namespace
