// HiF4 (arXiv 2602.11287): the E6M2 scale may be swept, the micro exponents follow.
#pragma once
#include "encode.h"

namespace {

// E6M2 code of a BF16 value v > 0: two mantissa bits, no subnormals, lowest code 2**-48.
HB_INLINE I e6m2_code(F v) {
  const U u = (U)bits(v);
  const I rounded = (I)((u + 0xfffffu + ((u >> 21) & 1u)) >> 21);
  return clip(rounded - (127 - 48) * 4, 0, 254);
}

struct HiF4Scale {
  I word;
  F step, inverse;
  F micro[16];  // 2**(e8 + e16) of each 4 elements
};

struct HiF4Encoder {
  const hb_codec& c;
  const hb_task& task;
  Run run;
  Stats stats;
  Tile tile;
  I worst = {};
  F fours[16], eights[8];

  HiF4Encoder(const hb_codec& codec, const hb_task& t)
      : c(codec), task(t), run{t, 64, 4, t.n * t.k / 64, {}}, stats(t.stats) {}

  int encode() {
    for (int64_t lead = 0; lead < task.lead; ++lead)
      for (int64_t first = 0; first < run.blocks; first += W) {
        const int64_t rest = run.blocks - first;
        one_tile(lead, first, rest < W ? (int)rest : W);
      }
    stats.finish();
    return has_no_number(worst, task.type) ? 1 : 0;
  }

  void one_tile(int64_t lead, int64_t first, int lanes) {
    run.load_tile(tile, lead, first, lanes);
    I any_bits = {};
    for (int i = 0; i < 64; ++i) {
      const F a = absolute(tile.x[i]);
      any_bits = maximum(any_bits, bits(a));
      tile.a[i] = minimum(a, all(7.0f * 1.5f * 0x1p15f));  // the largest value
    }
    worst = maximum(worst, any_bits);
    const I live = any_bits != 0;
    F largest = {};
    for (int g = 0; g < 16; ++g) {
      const F* a = tile.a + 4 * g;
      fours[g] = maximum(maximum(a[0], a[1]), maximum(a[2], a[3]));
    }
    for (int g = 0; g < 8; ++g) {
      eights[g] = maximum(fours[2 * g], fours[2 * g + 1]);
      largest = maximum(eights[g], largest);
    }
    F top = floats(bf16_round(largest * all(c.ratios[0])));
    top = select((I)(top == all(0.0f)), all(1.0f), top);
    const I base = e6m2_code(top);
    HiF4Scale best = {}, s;
    F best_loss = {};
    for (int i = 0; i < c.offset_count; ++i) {
      scale_of(clip(base + c.offsets[i], 0, 254), s);
      const F loss = tile.weighted ? error<true>(s) : error<false>(s);
      if (i == 0) {
        best = s;
        best_loss = loss;
        continue;
      }
      const I better = (I)(loss < best_loss);
      best_loss = select(better, loss, best_loss);
      best.word = select(better, s.word, best.word);
      best.step = select(better, s.step, best.step);
      best.inverse = select(better, s.inverse, best.inverse);
      for (int g = 0; g < 16; ++g) best.micro[g] = select(better, s.micro[g], best.micro[g]);
    }
    write(lead, first, lanes, live, best);
  }

  HB_MEMBER void scale_of(I code, HiF4Scale& s) const {
    s.word = code;
    s.step = scale_value(HB_SCALE_E6M2, code);
    s.inverse = floats(bf16_round(all(1.0f) / s.step));
    for (int g = 0; g < 8; ++g) {
      const I e8 = (I)(eights[g] * s.inverse >= all(4.0f));
      s.word |= e8 & (1 << (8 + g));
      const F half = select(e8, all(0.5f), all(1.0f));
      for (int h = 2 * g; h < 2 * g + 2; ++h) {
        const I e16 = (I)(fours[h] * s.inverse * half >= all(2.0f));
        s.word |= e16 & (int32_t)(1u << (16 + h));
        s.micro[h] = floats((127 - e8 - e16) << 23);
      }
    }
  }

  // Magnitude in quarters, halves rounded up.
  HB_MEMBER I quarters(F a, F inverse, F micro) const {
    const F q = a * inverse / micro * all(4.0f) + all(0.5f);
    return to_int(minimum(q, all(7.5f)));
  }

  template <bool WEIGHTED>
  HB_MEMBER F error(const HiF4Scale& s) const {
    F sum = {};
    for (int i = 0; i < 64; ++i) {
      const F micro = s.micro[i / 4];
      const F value = to_float(quarters(tile.a[i], s.inverse, micro)) * all(0.25f) * micro;
      const F e = value - tile.a[i] / s.step;
      sum += WEIGHTED ? e * e * tile.w[i] : e * e;
    }
    return sum * (s.step * s.step);
  }

  HB_MEMBER void write(int64_t lead, int64_t first, int lanes, I live, const HiF4Scale& best) {
    I words[8];
    Sums sums;
    if (task.stats) sums = Sums::begin(stats, (int)(first % LANES16));
    for (int i = 0; i < 64; i += 8) {
      I word = {};
      for (int k = 7; k >= 0; --k) {
        const F x = tile.x[i + k], micro = best.micro[(i + k) / 4];
        const I q = quarters(tile.a[i + k], best.inverse, micro);
        word = (word << 4) | q | (I)(((U)bits(x) >> 28) & 8u);
        if (task.stats) {
          const F value = to_float(q) * all(0.25f) * (best.step * micro);
          sums.error(keep(live, value - absolute(x)));
          sums.square(x);
          const F top = all(1.75f) * (best.step * micro);
          sums.range(live, x, -top, top);
        }
      }
      words[i / 8] = word & live;
    }
    if (task.stats) {
      sums.end(stats, (int)(first % LANES16));
      stats.blocks[0] += lanes;
    }
    run.store_codes(words, lead, first, lanes);
    store_lanes((uint32_t*)task.scales + lead * run.blocks + first, best.word & live, 4, lanes);
  }
};

}  // namespace
