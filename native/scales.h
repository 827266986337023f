// Block scales: between positive FP32 values and stored codes, a block per lane.
#pragma once
#include "grids.h"

namespace {

// Bits of the stored scale nearest to v > 0, never zero.
HB_INLINE I scale_code(int kind, F v) {
  switch (kind) {
    case HB_SCALE_E4M3:
      return maximum(E4M3Steps::code(E4M3Steps::make(v, 448.0f)), all(1));
    case HB_SCALE_E3M3: {
      typedef FloatSteps<3, -2> Steps;
      return clip(Steps::code(Steps::make(v, 28.0f)), 1, 62);
    }
    case HB_SCALE_BF16:
      return (I)((U)bf16_round(clip(v, 1.2e-38f, 3.3e38f)) >> 16);
    default:
      return bits(clip(v, 1.2e-38f, 3.4e38f));
  }
}

HB_INLINE F scale_value(int kind, I code) {
  switch (kind) {
    case HB_SCALE_E4M3: {
      const F value = select(code < 8, to_float(code) * all(0x1p-9f), floats((code << 20) + (120 << 23)));
      return select(code == 127, floats(all(0x7fc00000)), value);
    }
    case HB_SCALE_E3M3:
      return select(code < 8, to_float(code) * all(0x1p-5f), floats((code << 20) + (124 << 23)));
    case HB_SCALE_E8M0: {
      const I power = select(code == 0, all(0x00400000), code << 23);
      return floats(select(code == 255, all(0x7fc00000), power));
    }
    case HB_SCALE_E6M2:
      return floats((code + (127 - 48) * 4) << 21);
    case HB_SCALE_BF16:
      return floats(code << 16);
    default:
      return floats(code);
  }
}

// E8M0 code of the largest magnitude of a block by the rule floor, even or rceil.
HB_INLINE I power_of_two_code(F amax, const hb_table& t, int rule) {
  const I exponent = (bits(amax) >> 23) - 127;
  const F mantissa = floats((bits(amax) & 0x7fffff) | (127 << 23));
  I code = exponent + (127 - t.exponent);
  if (rule == HB_EVEN) code -= mantissa >= all(t.even_from);
  if (rule == HB_RCEIL) code -= mantissa > all(t.rceil_from);
  return clip(code, 0, 254);
}

// Code of absmax scaling.
HB_INLINE I base_code(const hb_codec& c, const hb_table& t, F amax) {
  if (c.scale_kind == HB_SCALE_E8M0) return power_of_two_code(amax, t, c.rule);
  return scale_code(c.scale_kind, amax / all(t.top));
}

HB_INLINE bool is_ordered(int scale_kind) { return scale_kind <= HB_SCALE_E3M3; }

HB_INLINE int scale_bytes(const hb_codec& c) {
  if (c.family == HB_HIF4) return 4;
  if (c.family != HB_BLOCK || c.scale_kind == HB_SCALE_BF16) return 2;
  return c.scale_kind == HB_SCALE_FP32 ? 4 : 1;
}

// Stores the first `count` lanes as integers of `bytes` bytes.
HB_INLINE void store_lanes(void* p, I v, int bytes, int count) {
  int32_t lanes[W];
  store(lanes, v);
  if (bytes == 1) {
    uint8_t narrow[W];
    for (int l = 0; l < W; ++l) narrow[l] = (uint8_t)lanes[l];
    memcpy(p, narrow, (size_t)count);
  } else if (bytes == 2) {
    uint16_t narrow[W];
    for (int l = 0; l < W; ++l) narrow[l] = (uint16_t)lanes[l];
    memcpy(p, narrow, (size_t)count * 2);
  } else {
    memcpy(p, lanes, (size_t)count * 4);
  }
}

}  // namespace
