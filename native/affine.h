// Affine formats: the ends of each group's range are shrunk by every pair of factors.
#pragma once
#include "encode.h"

namespace {

struct AffineBest {
  F loss, scale, offset;  // offset: the bias, or the zero point as a number
};

// What a scale and an offset make of a number: BIAS is value = code * scale + bias, else (code - zero point) * scale.
template <bool BIAS>
struct AffineRule {
  float levels;

  // Scale and offset of a range.
  HB_MEMBER void solve(F from, F to, F& scale, F& offset) const {
    if (BIAS) {
      // MLX's rule: the end of larger magnitude is met exactly by a whole number of steps
      const F low = minimum(from, to), high = maximum(from, to);
      const F floor = maximum(maximum(absolute(low), absolute(high)) * all(0x1p-30f), all(0x1p-126f));
      F step = maximum((high - low) / all(levels), floor);
      const I downward = (I)(absolute(low) > absolute(high));
      step = select(downward, step, -step);
      const F edge = select(downward, low, high);
      const F whole = rint_any(edge / step);
      const I is_whole = (I)(whole != all(0.0f));
      step = select(is_whole, edge / select(is_whole, whole, all(1.0f)), step);
      scale = floats(bf16_round(step));
      offset = floats(bf16_round(keep(is_whole, edge)));
    } else {
      // compressed-tensors' asymmetric rule: the range always holds zero, which gets a code of its own
      const F low = minimum(from, all(0.0f)), high = maximum(to, all(0.0f));
      const F span = maximum((high - low) / all(levels), all(0x1p-126f));
      scale = floats(bf16_round(span));
      offset = rint_small(clip(-low / scale, 0.0f, levels));
    }
  }

  HB_MEMBER F number(F x, F scale, F offset) const {
    if (BIAS) return rint_small(clip((x - offset) / scale, 0.0f, levels));
    // far beyond the codes nothing changes any more
    return clip(rint_small(clip(x / scale, -1024.0f, 1024.0f)) + offset, 0.0f, levels);
  }

  HB_MEMBER F value(F q, F scale, F offset) const { return BIAS ? q * scale + offset : (q - offset) * scale; }
};

struct AffineEncoder {
  const hb_codec& c;
  const hb_task& task;
  Run run;
  Stats stats;
  Tile tile;
  I worst = {};

  AffineEncoder(const hb_codec& codec, const hb_task& t)
      : c(codec), task(t), run{t, codec.columns, codec.bits, t.n * t.k / codec.columns, {}}, stats(t.stats) {}

  int encode() {
    for (int64_t lead = 0; lead < task.lead; ++lead)
      for (int64_t first = 0; first < run.blocks; first += W) {
        const int64_t rest = run.blocks - first;
        const int lanes = rest < W ? (int)rest : W;
        run.load_tile(tile, lead, first, lanes);
        if (c.family == HB_AFFINE_BIAS)
          one_tile<true>(lead, first, lanes);
        else
          one_tile<false>(lead, first, lanes);
      }
    stats.finish();
    return has_no_number(worst, task.type) ? 1 : 0;
  }

  template <bool BIAS>
  void one_tile(int64_t lead, int64_t first, int lanes) {
    F low = tile.x[0], high = tile.x[0];
    for (int i = 0; i < tile.size; ++i) {
      worst = maximum(worst, bits(tile.x[i]) & 0x7fffffff);
      low = minimum(tile.x[i], low);
      high = maximum(tile.x[i], high);
    }
    // levels * scale + bias must not overflow in wider groups
    const F end = all(0x1p127f * (1.0f - 0x1p-6f));
    const I wide = (I)(high * all(0.5f) - low * all(0.5f) > end);
    for (int i = 0; i < tile.size; ++i) {
      const F x = tile.x[i];
      tile.y[i] = select(wide, minimum(maximum(x, -end), end), x);
    }
    low = select(wide, minimum(maximum(low, -end), end), low);
    high = select(wide, minimum(maximum(high, -end), end), high);
    const F unit = unit_of(maximum(absolute(low), absolute(high)) + all(0x1p-126f));
    const AffineRule<BIAS> rule{(float)c.levels};
    AffineBest best = {all(__builtin_inff()), F{}, F{}};
    for (int i = 0; i < c.ratio_count; ++i)
      for (int j = 0; j < c.ratio_count; ++j) {
        F scale, offset;
        const F from = low * all(c.ratios[i]), to = high * all(c.ratios[j]);
        rule.solve(from, to, scale, offset);
        const F loss = tile.weighted ? error<BIAS, true>(scale, offset, unit) : error<BIAS, false>(scale, offset, unit);
        const I better = (I)(loss < best.loss);
        best.loss = select(better, loss, best.loss);
        best.scale = select(better, scale, best.scale);
        best.offset = select(better, offset, best.offset);
      }
    write<BIAS>(lead, first, lanes, best);
  }

  template <bool BIAS, bool WEIGHTED>
  HB_MEMBER F error(F scale, F offset, F unit) const {
    const AffineRule<BIAS> rule{(float)c.levels};
    F sum = {};
    for (int i = 0; i < tile.size; ++i) {
      const F q = rule.number(tile.y[i], scale, offset);
      const F e = (rule.value(q, scale, offset) - tile.y[i]) * unit;
      sum += WEIGHTED ? e * e * tile.w[i] : e * e;
    }
    return sum;
  }

  template <bool BIAS>
  HB_MEMBER void write(int64_t lead, int64_t first, int lanes, const AffineBest& best) {
    const AffineRule<BIAS> rule{(float)c.levels};
    I words[LARGEST_BLOCK / 4];
    const I found = (I)(best.loss < all(__builtin_inff()));
    const int per_word = 32 / c.bits;
    const F first_value = rule.value(F{}, best.scale, best.offset);
    const F last_value = rule.value(all((float)c.levels), best.scale, best.offset);
    Sums sums;
    if (task.stats) sums = Sums::begin(stats, (int)(first % LANES16));
    for (int i = 0; i < tile.size; i += per_word) {
      I word = {};
      for (int k = per_word - 1; k >= 0; --k) {
        const F x = tile.x[i + k];
        const F q = keep(found, rule.number(tile.y[i + k], best.scale, best.offset));
        word = (word << c.bits) | to_int(q);
        if (task.stats) {
          sums.error(rule.value(q, best.scale, best.offset) - x);
          sums.square(x);
          sums.range(~I{}, x, minimum(first_value, last_value), maximum(first_value, last_value));
        }
      }
      words[i / per_word] = word;
    }
    if (task.stats) {
      sums.end(stats, (int)(first % LANES16));
      stats.blocks[0] += lanes;
    }
    run.store_codes(words, lead, first, lanes);
    const int64_t at = lead * run.blocks + first;
    store_lanes((uint16_t*)task.scales + at, (I)((U)bits(best.scale) >> 16), 2, lanes);
    if (BIAS)
      store_lanes((uint16_t*)task.offsets + at, (I)((U)bits(best.offset) >> 16), 2, lanes);
    else
      store_lanes((uint8_t*)task.offsets + at, to_int(best.offset), 1, lanes);
  }
};

}  // namespace
