// Packed weights as products read them: scales of a panel, codes of 8 columns of W rows.
#pragma once
#include "linear_kernels.h"
#include "linear_vec.h"

namespace {

constexpr int64_t layout_end = (int64_t)1 << 40;  // units of a block that is the whole row
constexpr int TOKENS = 64;  // rows of activations that share one decoding of a panel's codes

HB_MEMBER int64_t units_of(const hb_weight& w) { return (w.k + 31) / 32; }
HB_MEMBER int64_t panels_of(const hb_weight& w) { return (w.n + 15) / 16; }
HB_MEMBER int scales_per_unit(const hb_weight& w) { return w.block == 16 ? 2 : 1; }
HB_MEMBER int code_bits(const hb_weight& w) {
  return w.code_kind == HB_CODE_INT8 || w.code_kind == HB_CODE_UINT8 || w.code_kind == HB_CODE_E4M3 ? 8 : 4;
}
HB_MEMBER int scale_size(const hb_weight& w) {
  switch (w.scale_kind) {
    case HB_SCALE_BF16:
    case HB_SCALE_FP16: return 2;
    case HB_SCALE_FP32:
    case HB_SCALE_E6M2: return 4;
    default: return 1;
  }
}
// Blocks of a packed row; two for each unit of 32 columns where blocks have 16.
HB_MEMBER int64_t blocks_of(const hb_weight& w) {
  return w.block == 0 ? 1 : w.block == 16 ? 2 * units_of(w) : (w.k + w.block - 1) / w.block;
}
HB_MEMBER bool has_row_scales(const hb_weight& w) { return w.block_rows == 1; }

// One panel of one matrix.
struct Panel {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* offsets;

  HB_MEMBER Panel(const hb_weight& w, int64_t lead, int64_t panel) {
    const int64_t at = lead * panels_of(w) + panel;
    const int64_t blocks = blocks_of(w) * (has_row_scales(w) ? 16 : 1);
    codes = (const uint8_t*)w.codes + at * units_of(w) * 64 * code_bits(w);
    scales = (const uint8_t*)w.scales + at * blocks * scale_size(w);
    offsets = (const uint8_t*)w.offsets + at * blocks * (w.offset_kind == HB_BIAS ? 2 : 1);
  }
};

// Scales of W rows from their stored form.
template <int KIND>
HB_INLINE F scale_at(const uint8_t* p) {
  if (KIND == HB_SCALE_E8M0) {
    const I c = row_bytes(p), end = (c == 0) | (c == 255);
    return floats(c << 23 | (end & 0x00400000));
  }
  if (KIND == HB_SCALE_BF16) return widen_bf16(p);
  if (KIND == HB_SCALE_FP16) return widen(load<Halves>(p));
  if (KIND == HB_SCALE_E6M2) return floats(((load<I>(p) & 0xff) + (79 << 2)) << 21);
  return load<F>(p);
}

typedef uint8_t TwoRowBytes __attribute__((vector_size(2 * W)));
typedef uint16_t TwoHalves __attribute__((vector_size(4 * W)));

// The same of 2 W rows in FP8, by way of FP16: without the powers of two of `scale_unit`.
template <int KIND>
HB_INLINE void small_scales(const uint8_t* p, bool negate, float* out) {
  const TwoHalves stored = __builtin_convertvector(load<TwoRowBytes>(p), TwoHalves);
  TwoHalves half = (stored & (uint16_t)(KIND == HB_SCALE_E3M3 ? 0x3f : 0x7f)) << 7;
  if (KIND == HB_SCALE_E4M3) {
    half |= (TwoHalves)(half == 0x3f80) & 0x7e00;  // NaN
    if (negate) half |= (stored & 0x80) << 8;
  }
  Halves parts[2];
  memcpy(parts, &half, sizeof parts);
  store(out, widen(parts[0]));
  store(out + W, widen(parts[1]));
}

HB_MEMBER float scale_unit(const hb_weight& w) {
  return w.scale_kind == HB_SCALE_E4M3 ? 0x1p8f : w.scale_kind == HB_SCALE_E3M3 ? 0x1p12f : 1.0f;
}
HB_MEMBER bool has_steps(const hb_weight& w) {
  for (int i = 1; i < w.table_count; ++i)
    if (w.steps[i] != w.steps[0]) return true;
  return false;
}

// `count` scales from their stored form.
template <int KIND>
HB_INLINE void convert_scales(const hb_weight& w, const uint8_t* p, int count, float* out) {
  if (KIND == HB_SCALE_E4M3 || KIND == HB_SCALE_E3M3) {
    int i = 0;
    if (w.negate)
      for (; i + 2 * W <= count; i += 2 * W) small_scales<KIND>(p + i, true, out + i);
    for (; i + 2 * W <= count; i += 2 * W) small_scales<KIND>(p + i, false, out + i);
    if (i == count) return;
    alignas(64) float both[2 * W];  // 16 scales are half of the widest vectors
    uint8_t bytes[2 * W] = {};
    memcpy(bytes, p + i, W);
    small_scales<KIND>(bytes, w.negate, both);
    memcpy(out + i, both, 4 * W);
  } else {
    const int size = scale_size(w);
    for (int i = 0; i < count; i += W) store(out + i, scale_at<KIND>(p + i * size));
  }
}

void multiply_steps(const hb_weight& w, const uint8_t* p, int count, float* out) {
  for (int i = 0; i < count; i += W) {
    const I chosen = row_bytes(p + i) >> w.scale_bits;
    F step = all(w.steps[0]);
    for (int t = 1; t < w.table_count; ++t) step = select((I)(chosen == t), all(w.steps[t]), step);
    store(out + i, load<F>(out + i) * step);
  }
}

template <int KIND>
void scales_of(const hb_weight& w, const Panel& panel, int64_t unit, int units, float* out) {
  const int per_unit = scales_per_unit(w), size = scale_size(w), count = units * per_unit;
  if (has_row_scales(w) && (w.block == 16 || w.block == 32)) {
    const uint8_t* const p = panel.scales + unit * per_unit * 16 * size;
    convert_scales<KIND>(w, p, count * 16, out);
    if (has_steps(w)) multiply_steps(w, p, count * 16, out);
    return;
  }
  // wider blocks: one scale for some units
  const int64_t per_block = w.block == 0 ? layout_end : w.block / 32;
  for (int i = 0; i < units;) {
    const int64_t block = (unit + i) / per_block, rest = (block + 1) * per_block - unit - i;
    const int same = rest < units - i ? (int)rest : units - i;
    if (has_row_scales(w)) convert_scales<KIND>(w, panel.scales + block * 16 * size, 16, out);
    else
      for (int r = 0; r < R; ++r) store(out + r * W, all(load<float>(panel.scales + block * 4)));
    for (int j = 1; j < same; ++j) memcpy(out + 16 * j, out, 64);
    i += same;
    out += 16 * same;
  }
}

// The scales of `units` units of a panel: out [units * scales_per_unit, 16].
void decode_scales(const hb_weight& w, const Panel& panel, int64_t unit, int units, float* out) {
  switch (w.scale_kind) {
    case HB_SCALE_E4M3: return scales_of<HB_SCALE_E4M3>(w, panel, unit, units, out);
    case HB_SCALE_E8M0: return scales_of<HB_SCALE_E8M0>(w, panel, unit, units, out);
    case HB_SCALE_E3M3: return scales_of<HB_SCALE_E3M3>(w, panel, unit, units, out);
    case HB_SCALE_BF16: return scales_of<HB_SCALE_BF16>(w, panel, unit, units, out);
    case HB_SCALE_FP16: return scales_of<HB_SCALE_FP16>(w, panel, unit, units, out);
    case HB_SCALE_E6M2: return scales_of<HB_SCALE_E6M2>(w, panel, unit, units, out);
    default: return scales_of<HB_SCALE_FP32>(w, panel, unit, units, out);
  }
}

// What is added to each element besides its integer times the scale: out as of decode_scales, times `unit_of_sum`.
void decode_offsets(const hb_weight& w, const Panel& panel, int64_t unit, int units, const float* scales,
                    float unit_of_sum, float* out) {
  const int per_unit = scales_per_unit(w);
  for (int i = 0; i < units * per_unit; ++i, out += 16, scales += 16) {
    const int64_t block = (unit * per_unit + i) * (32 / per_unit) / w.block;
    for (int r = 0; r < R; ++r) {
      const int64_t at = block * 16 + r * W;
      const F scale = load<F>(scales + r * W), center = all((float)w.center);
      F offset;
      if (w.offset_kind == HB_BIAS)
        offset = fma(center, scale, widen_bf16(panel.offsets + 2 * at));
      else
        offset = (center - to_float(row_bytes(panel.offsets + at))) * scale;
      store(out + r * W, offset * all(unit_of_sum));
    }
  }
}

// Codes as integers: four() gives columns 8p .. 8p + 3 and the next four of rows r * W ... of a unit, a row per lane.
template <int TABLES>
struct TableCodes {
  static constexpr bool DECODED = false;
  const uint8_t* codes;
  const uint8_t* selectors;  // scale bytes
  Bytes tables[TABLES];

  TableCodes(const hb_weight& w, const Panel& panel, int64_t unit, int bias)
      : codes(panel.codes + unit * 256), selectors(panel.scales + unit * 32) {
    for (int t = 0; t < TABLES; ++t) {
      int8_t table[16];
      for (int i = 0; i < 16; ++i) table[i] = (int8_t)(uint8_t)(w.tables[t][i] + bias);
      tables[t] = repeat16(table);
    }
  }

  HB_MEMBER Bytes value(Bytes index, I selector) const {
    if (TABLES == 1) return lookup_bytes(tables[0], index);
    const Bytes low = pick(selector << (TABLES == 4), lookup_bytes(tables[0], index),
                           lookup_bytes(tables[TABLES > 1], index));
    if (TABLES < 4) return low;
    const Bytes high = pick(selector << 1, lookup_bytes(tables[TABLES > 2 ? 2 : 0], index),
                            lookup_bytes(tables[TABLES > 3 ? 3 : 0], index));
    return pick(selector, low, high);
  }

  HB_MEMBER void four(int u, int p, int r, Bytes& low, Bytes& high) const {
    const Bytes c = load<Bytes>(codes + (u * 4 + p) * 64 + r * 4 * W);
    const uint8_t* const chosen = selectors + (u * 2 + p / 2) * 16 + r * W;
    const I selector = TABLES == 1   ? I{}
                       : TABLES == 2 ? signed_row_bytes(chosen)
                                     : row_bytes(chosen) << 24;
    low = value(c & 15, selector);
    high = value((Bytes)((U)c >> 4) & 15, selector);
  }
};

struct HiF4Codes {
  static constexpr bool DECODED = false;
  const uint8_t* codes;
  const uint8_t* words;
  int first;  // 1 where the first unit is the second half of a block
  int bias;

  HiF4Codes(const hb_weight&, const Panel& panel, int64_t unit, int b)
      : codes(panel.codes + unit * 256), words(panel.scales + unit / 2 * 64), first(unit & 1), bias(b) {}

  HB_MEMBER Bytes value(Bytes code, I shift) const {
    const Bytes magnitude = (Bytes)((I)(code & 7) << shift);
    const Bytes negative = (Bytes)((code & 8) == 8);
    return ((magnitude ^ negative) - negative) + (uint8_t)bias;
  }

  HB_MEMBER void four(int u, int p, int r, Bytes& low, Bytes& high) const {
    const int half = (u + first) & 1;
    const I word = load<I>(words + (u + first) / 2 * 64 + r * 4 * W);
    const I eight = (word >> (8 + half * 4 + p)) & 1;
    const int four = 16 + half * 8 + 2 * p;
    const Bytes c = load<Bytes>(codes + (u * 4 + p) * 64 + r * 4 * W);
    low = value(c, eight + ((word >> four) & 1));
    high = value((Bytes)((U)c >> 4), eight + ((word >> (four + 1)) & 1));
  }
};

// Codes of a byte; FLIP: what turns stored bytes into the integers that are wanted.
struct ByteCodes {
  static constexpr bool DECODED = false;
  const uint8_t* codes;
  uint8_t flip;

  ByteCodes(const hb_weight& w, const Panel& panel, int64_t unit, int bias)
      : codes(panel.codes + unit * 512), flip((w.code_kind == HB_CODE_UINT8) != (bias != 0) ? 0x80 : 0) {}
  explicit ByteCodes(const uint8_t* decoded) : codes(decoded), flip(0) {}

  HB_MEMBER void four(int u, int p, int r, Bytes& low, Bytes& high) const {
    const uint8_t* const at = codes + (u * 8 + 2 * p) * 64 + r * 4 * W;
    low = load<Bytes>(at) ^ flip;
    high = load<Bytes>(at + 64) ^ flip;
  }
};

// Codes that were decoded before.
struct DecodedCodes {
  static constexpr bool DECODED = true;
  const uint8_t* codes;

  HB_MEMBER void four(int u, int p, int r, Bytes& low, Bytes& high) const {
    const uint8_t* const at = codes + (u * 8 + 2 * p) * 64 + r * 4 * W;
    low = load<Bytes>(at);
    high = load<Bytes>(at + 64);
  }
};

// Rows of activations of one tile.
template <int T>
struct Tile {
  const char* x[T];
  const float* scales[T];
  const int32_t* counts[T];
  const float* sums[T];

  HB_MEMBER Tile(const hb_row_layout& layout, const void* const* rows) {
    for (int t = 0; t < T; ++t) {
      x[t] = (const char*)rows[t];
      scales[t] = (const float*)(x[t] + layout.scales);
      counts[t] = (const int32_t*)(x[t] + layout.counts);
      sums[t] = (const float*)(x[t] + layout.sums);
    }
  }
};

}  // namespace
