// Four Over Six in the FP32 order of its reference implementation (arXiv 2512.02010).
#pragma once
#include "search.h"

namespace {

// Per tensor: the constants of that order.
struct SixConstants {
  float unit, amax, encode_scale, decode_scale;
};

HB_INLINE SixConstants six_constants(float tensor_scale) {
  SixConstants s;
  s.unit = unit_of(all(tensor_scale))[0];
  s.amax = tensor_scale * s.unit * 1536.0f;
  s.encode_scale = 1536.0f / s.amax;
  s.decode_scale = 1.0f / s.encode_scale;
  return s;
}

// Decoded values of a grid's elements under one scale: ((value * scale) * amax) / 1536, each rounded.
template <class Grid>
struct SixValues {
  F scale, amax;
  HB_MEMBER SixValues(F s, float a) : scale(s), amax(all(a)) {}
  HB_MEMBER F operator()(F value) const { return value * scale * amax / all(1536.0f); }
};

// E2M1 has two mantissas; powers of two change no bit of a product or quotient of this range.
template <>
struct SixValues<GridE2M1> {
  F one, one_and_half;
  HB_MEMBER SixValues(F s, float a) {
    one = s * all(a) / all(1536.0f);
    one_and_half = all(1.5f) * s * all(a) / all(1536.0f);
  }
  HB_MEMBER F operator()(F value) const {
    const F power = floats(bits(value) & (int32_t)0xff800000);
    return power * select((I)((bits(value) & 0x400000) != 0), one_and_half, one);
  }
};

template <class Grid>
HB_INLINE void six_candidate(const Problem& p, const Grid& grid, int table, F base, const SixConstants& k, Best& best) {
  const hb_codec& c = p.codec;
  const I stored = scale_code(c.scale_kind, base);
  const F scale = scale_value(c.scale_kind, stored);
  const F inverse = all(1.0f) / (all(k.decode_scale) * scale);
  const SixValues<Grid> decoded(scale, k.amax);
  F loss = {};
  for (int i = 0; i < p.tile.size; ++i) {
    F value;
    grid.code(p.tile.y[i] * inverse, value);
    F t = term(decoded(value) - p.tile.y[i], c.metric);
    if (p.tile.weighted) t = t * p.tile.w[i];
    if (c.metric == HB_MAX)
      loss = i == 0 ? t : select((I)(t > loss) | (I)(t != t), t, loss);
    else
      loss += t;
  }
  best.offer(loss, scale, inverse, stored, table);
}

template <class Grid>
void six_table(const Problem& p, const Grid& grid, int table, const SixConstants& k, Best& best) {
  const hb_table& t = p.codec.tables[table];
  const F base = p.amax / all(t.top) * all(k.encode_scale);
  six_candidate(p, grid, table, base * all(1.0f), k, best);
  if (t.kind == HB_E2M1) six_candidate(p, grid, table, base * all(1.5f), k, best);
}

HB_INLINE void four_over_six(const Problem& p, const SixConstants& k, Best& best) {
  for (int i = 0; i < p.codec.table_count; ++i) {
    const int index = p.codec.order[i];
    with_grid(p.codec.tables[index], [&](const auto& grid) { six_table(p, grid, index, k, best); });
  }
}

}  // namespace
