// Products in FP32: weights are exact multiples of their scale, sums of 16 (or 32) columns are scaled and added.
#pragma once
#include "gemm.h"

namespace {

// Elements as FP32: eight() gives columns 8p .. 8p + 7 of rows r * W ... of a unit. Integers come times 2**24.
template <class Codes>
struct IntegerFloats {
  static constexpr bool DECODED = false;
  Codes codes;

  HB_MEMBER void eight(int u, int p, int r, F* out) const {
    Bytes low, high;
    codes.four(u, p, r, low, high);
    out[0] = to_float(spread<0>(low)), out[1] = to_float(spread<1>(low));
    out[2] = to_float(spread<2>(low)), out[3] = to_float(spread<3>(low));
    out[4] = to_float(spread<0>(high)), out[5] = to_float(spread<1>(high));
    out[6] = to_float(spread<2>(high)), out[7] = to_float(spread<3>(high));
  }
};

struct E4M3Floats {
  static constexpr bool DECODED = false;
  ByteCodes codes;

  template <int J>
  HB_MEMBER static F value(Bytes v) {
    const I top = spread<J>(v);
    const F normal = floats(((top >> 4) & 0x07f00000) + 0x3c000000);
    // below the smallest normal number the other one is smaller, and right
    const F magnitude = minimum(normal, normal + normal - all(0x1p-6f));
    return floats(bits(magnitude) | (top & (int32_t)0x80000000));
  }

  HB_MEMBER void eight(int u, int p, int r, F* out) const {
    Bytes low, high;
    codes.four(u, p, r, low, high);
    out[0] = value<0>(low), out[1] = value<1>(low), out[2] = value<2>(low), out[3] = value<3>(low);
    out[4] = value<0>(high), out[5] = value<1>(high), out[6] = value<2>(high), out[7] = value<3>(high);
  }
};

struct TableFloats {
  static constexpr bool DECODED = false;
  const uint8_t* codes;
  const float* values;

  TableFloats(const hb_weight& w, const Panel& panel, int64_t unit)
      : codes(panel.codes + unit * 256), values(w.values) {}

  HB_MEMBER void eight(int u, int p, int r, F* out) const {
    const I c = load<I>(codes + (u * 4 + p) * 64 + r * 4 * W);
    HB_UNROLL for (int j = 0; j < 4; ++j) {
      out[j] = lookup16(values, (c >> (8 * j)) & 15);
      out[4 + j] = lookup16(values, (c >> (8 * j + 4)) & 15);
    }
  }
};

struct DecodedFloats {
  static constexpr bool DECODED = true;
  const float* values;

};

struct Exact {
  static constexpr int CHUNK = 8;

  template <int S, int T, class Floats>
  static void chunk(const Floats& floats, const float* scales, const Tile<T>& tile, int64_t unit, int units,
                    float (*sums)[16]) {
    for (int u = 0; u < units; ++u)
      HB_UNROLL for (int g = 0; g < S; ++g)
        HB_UNROLL for (int r = 0; r < R; ++r) {
          F first[T] = {}, second[T] = {};
          HB_UNROLL for (int p = g * 4 / S; p < (g + 1) * 4 / S; ++p) {
            F w[8];
            floats.eight(u, p, r, w);
            HB_UNROLL for (int j = 0; j < 4; ++j)
              HB_UNROLL for (int t = 0; t < T; ++t) {
                const float* const x = (const float*)tile.x[t] + (unit + u) * 32 + 8 * p + j;
                first[t] = fma(w[j], all(x[0]), first[t]);
                second[t] = fma(w[4 + j], all(x[4]), second[t]);
              }
          }
          const F scale = load<F>(scales + (u * S + g) * 16 + r * W);
          HB_UNROLL for (int t = 0; t < T; ++t)
            store(sums[t] + r * W, fma(first[t] + second[t], scale, load<F>(sums[t] + r * W)));
        }
  }

  // The same sums of the same products, in an order that keeps more of them in registers.
  template <int S, int T>
  static void chunk(const DecodedFloats& floats, const float* scales, const Tile<T>& tile, int64_t unit, int units,
                    float (*sums)[16]) {
    for (int u = 0; u < units; ++u)
      for (int g = 0; g < S; ++g) {
        F both[2][T][R];
        HB_UNROLL for (int half = 0; half < 2; ++half) {
          F sum[T][R] = {};
          for (int p = g * 4 / S; p < (g + 1) * 4 / S; ++p)
            HB_UNROLL for (int j = 4 * half; j < 4 * half + 4; ++j) {
              F w[R];
              HB_UNROLL for (int r = 0; r < R; ++r) w[r] = load<F>(floats.values + ((u * 4 + p) * 8 + j) * 16 + r * W);
              HB_UNROLL for (int t = 0; t < T; ++t) {
                const F x = all(((const float*)tile.x[t])[(unit + u) * 32 + 8 * p + j]);
                HB_UNROLL for (int r = 0; r < R; ++r) sum[t][r] = fma(w[r], x, sum[t][r]);
              }
            }
          HB_UNROLL for (int t = 0; t < T; ++t)
            HB_UNROLL for (int r = 0; r < R; ++r) both[half][t][r] = sum[t][r];
        }
        HB_UNROLL for (int r = 0; r < R; ++r) {
          const F scale = load<F>(scales + (u * S + g) * 16 + r * W);
          HB_UNROLL for (int t = 0; t < T; ++t)
            store(sums[t] + r * W, fma(both[0][t][r] + both[1][t][r], scale, load<F>(sums[t] + r * W)));
        }
      }
  }

  template <class Floats>
  static void decode(const Floats& floats, int units, float* out) {
    for (int u = 0; u < units; ++u)
      HB_UNROLL for (int p = 0; p < 4; ++p)
        HB_UNROLL for (int r = 0; r < R; ++r) {
          F w[8];
          floats.eight(u, p, r, w);
          HB_UNROLL for (int j = 0; j < 8; ++j) store(out + ((u * 4 + p) * 8 + j) * 16 + r * W, w[j]);
        }
  }

  template <int S, class Floats>
  static void tiles(const Floats& floats, const float* scales, const hb_row_layout& layout, const void* const* rows,
                    int count, int64_t unit, int units, float (*sums)[16]) {
    int i = 0;
    if constexpr (R <= 2 && Floats::DECODED)
      for (; i + 6 <= count; i += 6) chunk<S, 6>(floats, scales, Tile<6>(layout, rows + i), unit, units, sums + i);
    for (; i + 4 <= count; i += 4) chunk<S, 4>(floats, scales, Tile<4>(layout, rows + i), unit, units, sums + i);
    if (count - i >= 2) {
      chunk<S, 2>(floats, scales, Tile<2>(layout, rows + i), unit, units, sums + i);
      i += 2;
    }
    if (i < count) chunk<S, 1>(floats, scales, Tile<1>(layout, rows + i), unit, units, sums + i);
  }

  template <class Floats>
  static void run(const Floats& floats, int s, const float* scales, const hb_row_layout& layout,
                  const void* const* rows, int count, int64_t unit, int units, float (*sums)[16]) {
    if (count <= 4) {
      if (s == 2) return tiles<2>(floats, scales, layout, rows, count, unit, units, sums);
      return tiles<1>(floats, scales, layout, rows, count, unit, units, sums);
    }
    alignas(64) float buffer[CHUNK * 512];
    decode(floats, units, buffer);
    const DecodedFloats decoded = {buffer};
    if (s == 2) return tiles<2>(decoded, scales, layout, rows, count, unit, units, sums);
    return tiles<1>(decoded, scales, layout, rows, count, unit, units, sums);
  }

  static void add(const hb_weight& w, const Panel& panel, const float* scales, const hb_row_layout& layout,
                  const void* const* rows, int count, int64_t unit, int units, float (*sums)[16]) {
    const int s = scales_per_unit(w);
    const auto go = [&](const auto& floats) { run(floats, s, scales, layout, rows, count, unit, units, sums); };
    switch (w.code_kind) {
      case HB_CODE_FLOAT: return go(TableFloats(w, panel, unit));
      case HB_CODE_E4M3: return go(E4M3Floats{ByteCodes(w, panel, unit, 0)});
      case HB_CODE_HIF4: return go(IntegerFloats<HiF4Codes>{HiF4Codes(w, panel, unit, 0)});
      case HB_CODE_TABLE: break;
      default: return go(IntegerFloats<ByteCodes>{ByteCodes(w, panel, unit, 0)});
    }
    if (w.table_count == 1) return go(IntegerFloats<TableCodes<1>>{TableCodes<1>(w, panel, unit, 0)});
    if (w.table_count == 2) return go(IntegerFloats<TableCodes<2>>{TableCodes<2>(w, panel, unit, 0)});
    return go(IntegerFloats<TableCodes<4>>{TableCodes<4>(w, panel, unit, 0)});
  }
};

}  // namespace
