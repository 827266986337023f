// From codes back to values: table value times (scale times tensor scale), each product rounded once.
#pragma once
#include "encode.h"
#include "rows.h"

namespace {

// What is done with decoded values: `count` of them (at most W) at element `at`, and the range of their block.
struct Range {
  F low, high;
  Range(F a, F b) : low(minimum(a, b)), high(maximum(a, b)) {}
};

struct ToFloats {
  float* out;
  HB_MEMBER void operator()(int64_t at, F v, int64_t count, const Range&) {
    memcpy(out + at, &v, count < W ? (size_t)count * 4 : sizeof v);
  }
};

struct ToBF16 {
  uint16_t* out;
  HB_MEMBER void operator()(int64_t at, F v, int64_t count, const Range&) {
    // a NaN stays one
    const I r = select((I)(v == v), bf16_round(v), bits(v) | 0x400000);
    const HalfShorts narrow = __builtin_convertvector((U)r >> 16, HalfShorts);
    memcpy(out + at, &narrow, count < W ? (size_t)count * 2 : sizeof narrow);
  }
};

struct ToStats {
  const hb_task& task;
  Stats stats;
  Sums sums[LANES16 / W];
  I worst = {};

  explicit ToStats(const hb_task& t) : task(t), stats(t.stats) {
    for (int j = 0; j < LANES16 / W; ++j) sums[j] = Sums::begin(stats, j * W);
  }
  HB_MEMBER void operator()(int64_t at, F v, int64_t count, const Range& r) {
    const I used = (I)(lane_numbers() < (int32_t)(count < W ? count : W));
    const F x = load_row(task.x, task.type, at, count);
    v = keep(used, v);
    worst = maximum(worst, bits(v) & 0x7fffffff);
    Sums& s = sums[at % LANES16 / W];
    s.error(v - x);
    s.square(x);
    s.range(used, x, r.low, r.high);
  }
  void finish() {
    F largest = {};
    for (int j = 0; j < LANES16 / W; ++j) {
      sums[j].end(stats, j * W);
      largest = maximum(stats.largest, largest);
    }
    stats.largest = largest;
    stats.finish();
  }
};

// Codes of `count` elements (at most W) that begin at element `at`; 4-bit ones come in full vectors.
HB_INLINE I load_codes(const void* codes, int bits_of_code, int64_t at, int64_t count) {
  const uint8_t* p = (const uint8_t*)codes + at * bits_of_code / 8;
  if (bits_of_code == 8) {
    QuarterBytes bytes = {};
    memcpy(&bytes, p, count < W ? (size_t)count : sizeof bytes);
    return (I) __builtin_convertvector(bytes, U);
  }
#if HB_LANES == 16
  const I lanes = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
  const U shift = {0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28};
  const __m512i both = _mm512_castsi128_si512(_mm_loadl_epi64((const __m128i*)p));
  const U word = (U)_mm512_permutexvar_epi32((__m512i)lanes, both);
  return (I)(word >> shift) & 15;
#else
  U shift;
  for (int l = 0; l < W; ++l) shift[l] = (uint32_t)(4 * l);
  uint32_t word = 0;
  memcpy(&word, p, W / 2);
  return (I)((U{} + word) >> shift) & 15;
#endif
}

HB_INLINE F table_values(const hb_table& t, int bits_of_code, I codes) {
  if (bits_of_code == 4) return lookup16(t.values, codes);
  F v;
  for (int l = 0; l < W; ++l) v[l] = t.values[codes[l]];
  return v;
}

HB_INLINE float stored_scale(const hb_codec& c, const void* scales, int64_t at) {
  int32_t bits_of = 0;
  memcpy(&bits_of, (const char*)scales + at * scale_bytes(c), (size_t)scale_bytes(c));
  return scale_value(c.scale_kind, all(bits_of))[0];
}

template <class Sink>
struct Decoder {
  const hb_codec& c;
  const hb_task& task;
  Sink& sink;
  int64_t* blocks;  // counts per table, or null

  void decode() {
    switch (c.family) {
      case HB_AFFINE_BIAS:
        return affine<true>();
      case HB_AFFINE_ZERO_POINT:
        return affine<false>();
      case HB_HIF4:
        return hif4();
      default:
        return scale_bytes(c) == 1 ? byte_scales() : wide_scales();
    }
  }

  HB_MEMBER float with_tensor_scale(float scale, int64_t lead) const {
    if (task.divisor) return scale / task.divisor[lead];
    return task.tensor_scale ? scale * task.tensor_scale[lead] : scale;
  }

  // Blocks along a row whose scale is a byte: all scales of a matrix are known beforehand.
  void byte_scales() {
    const int64_t per_matrix = task.n * task.k / c.columns;
    const int mask = c.table_count > 1 ? (1 << c.scale_bits) - 1 : 255;
    float values[256];
    const uint8_t* scale = (const uint8_t*)task.scales;
    int64_t at = 0;
    for (int64_t lead = 0; lead < task.lead; ++lead) {
      for (int i = 0; i <= mask; ++i) {
        // where bit 7 of an E4M3 scale is no selector, it is a sign
        const bool negative = c.scale_kind == HB_SCALE_E4M3 && i > 127;
        const float scale_of = scale_value(c.scale_kind, all(negative ? i - 128 : i))[0];
        values[i] = with_tensor_scale(negative ? -scale_of : scale_of, lead);
      }
      for (int64_t b = 0; b < per_matrix; ++b) {
        const int byte = *scale++;
        const int selector = c.table_count > 1 ? (byte >> c.scale_bits) & 3 : 0;
        const hb_table& t = c.tables[selector];
        const F s = all(values[byte & mask]);
        const Range range(all(t.lowest) * s, all(t.highest) * s);
        if (blocks) ++blocks[selector];
        for (int i = 0; i < c.columns; i += W, at += W)
          sink(at, table_values(t, c.bits, load_codes(task.codes, c.bits, at, W)) * s, W, range);
      }
    }
  }

  // Calls use(first element, count, block number) for the part of each row that has one scale.
  template <class Use>
  HB_MEMBER void segments(Use use) {
    const int64_t tall = c.rows > 0 ? c.rows : task.n, wide = c.columns > 0 ? c.columns : task.k;
    const int64_t across = (task.k + wide - 1) / wide, down = (task.n + tall - 1) / tall;
    for (int64_t lead = 0; lead < task.lead; ++lead)
      for (int64_t r = 0; r < task.n; ++r)
        for (int64_t b = 0; b < across; ++b) {
          const int64_t begin = (lead * task.n + r) * task.k + b * wide;
          const int64_t rest = task.k - b * wide;
          if (blocks && r % tall == 0) ++blocks[0];
          use(lead, begin, rest < wide ? rest : wide, (lead * down + r / tall) * across + b);
        }
  }

  void wide_scales() {
    segments([&](int64_t lead, int64_t begin, int64_t count, int64_t block) {
      int32_t stored = 0;
      memcpy(&stored, (const char*)task.scales + block * scale_bytes(c), (size_t)scale_bytes(c));
      const F s = all(with_tensor_scale(scale_value(c.scale_kind, all(stored))[0], lead));
      const hb_table& t = c.tables[0];
      const Range range(all(t.lowest) * s, all(t.highest) * s);
      for (int64_t i = 0; i < count; i += W)
        sink(begin + i, table_values(t, c.bits, load_codes(task.codes, c.bits, begin + i, count - i)) * s, count - i,
             range);
    });
  }

  template <bool BIAS>
  void affine() {
    const uint16_t *scales = (const uint16_t*)task.scales, *biases = (const uint16_t*)task.offsets;
    const uint8_t* zeros = (const uint8_t*)task.offsets;
    segments([&](int64_t, int64_t begin, int64_t count, int64_t block) {
      const F s = floats(all((int32_t)((uint32_t)load<uint16_t>(scales + block) << 16)));
      const F o =
          BIAS ? floats(all((int32_t)((uint32_t)load<uint16_t>(biases + block) << 16))) : all((float)zeros[block]);
      const F most = all((float)c.levels);
      const F first = BIAS ? o : -o * s, last = BIAS ? most * s + o : (most - o) * s;
      const Range range(first, last);
      for (int64_t i = 0; i < count; i += W) {
        const F q = to_float(load_codes(task.codes, c.bits, begin + i, W));
        sink(begin + i, BIAS ? q * s + o : (q - o) * s, W, range);
      }
    });
  }

  void hif4() {
    const uint32_t* words = (const uint32_t*)task.scales;
    const I lane = lane_numbers();
    segments([&](int64_t, int64_t begin, int64_t, int64_t block) {
      const int32_t word = (int32_t)load<uint32_t>(words + block);
      const F step = scale_value(HB_SCALE_E6M2, all(word & 255));
      for (int i = 0; i < 64; i += W) {
        const I code = load_codes(task.codes, 4, begin + i, W);
        const F quarters = to_float(code & 7) * all(0.25f);
        const F value = floats(bits(quarters) | ((code & 8) << 28));
        const I e8 = ((I{} + word) >> (8 + ((i + lane) >> 3))) & 1,
                e16 = ((I{} + word) >> (16 + ((i + lane) >> 2))) & 1;
        const F scale = step * floats((127 + e8 + e16) << 23), top = all(1.75f) * scale;
        sink(begin + i, value * scale, W, Range(-top, top));
      }
    });
  }
};

}  // namespace
