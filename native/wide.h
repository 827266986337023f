// FP8 with large blocks: output channels, tiles and whole tensors; lanes are neighbouring elements of a row.
#pragma once
#include "encode.h"
#include "rows.h"

namespace {

constexpr int SUMS = 64;  // running sums of the reference for blocks of more than 128 elements

struct WideEncoder {
  const hb_codec& c;
  const hb_task& task;
  Stats stats;
  I worst = {};
  const GridE4M3 grid;

  WideEncoder(const hb_codec& codec, const hb_task& t) : c(codec), task(t), stats(t.stats), grid(codec.tables[0]) {}

  struct Region {
    int64_t start, rows, columns;  // first element
    const float* weights;          // of its columns
    float tensor_scale;
    float factor;          // one over the tensor scale
    float decode_divisor;  // or 0
  };

  int encode() {
    const int64_t tall = c.rows > 0 ? c.rows : task.n, wide = c.columns > 0 ? c.columns : task.k;
    int64_t block = 0;
    for (int64_t lead = 0; lead < task.lead; ++lead) {
      const float scale = task.tensor_scale ? task.tensor_scale[lead] : 1.0f;
      const float divisor = task.divisor ? task.divisor[lead] : 0.0f;
      const float* weights = task.weights ? task.weights + (task.weight_lead > 1 ? lead : 0) * task.k : nullptr;
      for (int64_t r = 0; r < task.n; r += tall)
        for (int64_t k = 0; k < task.k; k += wide, ++block) {
          const int64_t rows = task.n - r < tall ? task.n - r : tall;
          const int64_t columns = task.k - k < wide ? task.k - k : wide;
          const Region region = {(lead * task.n + r) * task.k + k,
                                 rows,
                                 columns,
                                 weights ? weights + k : nullptr,
                                 scale,
                                 1.0f / scale,
                                 divisor};
          one_block(region, block, tall * wide);
        }
    }
    stats.finish();
    return has_no_number(worst, task.type) ? 1 : 0;
  }

  HB_MEMBER F y_of(const Region& g, F x) const { return task.tensor_scale ? x * all(g.factor) : x; }

  void one_block(const Region& g, int64_t block, int64_t size) {
    void* const place = (char*)task.scales + block * scale_bytes(c);
    if (c.rows < 0) {
      float given;  // one scale for the whole tensor is the caller's
      memcpy(&given, place, sizeof given);
      return write(g, all(1.0f / given), given, true);
    }
    I largest = {};
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t k = 0; k < g.columns; k += W)
        largest =
            maximum(largest, bits(load_row(task.x, task.type, g.start + r * task.k + k, g.columns - k)) & 0x7fffffff);
    worst = maximum(worst, largest);
    int32_t most = 0;
    for (int l = 0; l < W; ++l) most = largest[l] > most ? largest[l] : most;
    Best best;
    F amax = absolute(y_of(g, floats(all(most))));
    amax = select((I)(amax == all(0.0f)), all(1.0f), amax);
    const hb_table& t = c.tables[0];
    F unit = {};
    const bool ordered = is_ordered(c.scale_kind);
    for (int i = 0; i < (c.single ? 1 : ordered ? c.offset_count : c.ratio_count); ++i) {
      const I stored = ordered ? clip(base_code(c, t, amax) + c.offsets[i], c.scale_low, t.high)
                               : scale_code(c.scale_kind, minimum(amax / all(t.top) * all(c.ratios[i]), all(t.limit)));
      const F scale = scale_value(c.scale_kind, stored), inverse = all(1.0f) / scale;
      if (i == 0) unit = unit_of(scale);
      const F relative = scale * unit;
      best.offer(c.single ? F{} : all(error(g, inverse, size)) * (relative * relative), scale, inverse, stored, 0);
    }
    const bool live = most != 0;
    const I stored = live ? best.stored : I{};
    store_lanes(place, stored, scale_bytes(c), 1);
    write(g, best.inverse, scale_value(c.scale_kind, stored)[0], live);
  }

  HB_MEMBER F term_at(const Region& g, int64_t r, int64_t k, F inverse) const {
    const int64_t rest = g.columns - k;
    const F y = y_of(g, load_row(task.x, task.type, g.start + r * task.k + k, rest));
    const F e = grid.miss(absolute(y) * inverse);
    return g.weights ? e * e * load_row(g.weights + k, HB_FP32, 0, rest) : e * e;
  }

  float error(const Region& g, F inverse, int64_t size) const {
    alignas(64) float sums[SUMS];
    float total = 0;
    if (size <= 2 * SUMS) {
      for (int64_t k = 0; k < g.columns; k += W) {
        store(sums, term_at(g, 0, k, inverse));
        for (int l = 0; l < W && k + l < g.columns; ++l) total += sums[l];
      }
      return total;
    }
    F running[SUMS / W] = {};
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t k = 0; k < g.columns; k += SUMS)
        for (int j = 0; j < SUMS / W; ++j) running[j] += term_at(g, r, k + j * W, inverse);
    for (int j = 0; j < SUMS / W; ++j) store(sums + j * W, running[j]);
    for (int l = 0; l < SUMS; ++l) total += sums[l];
    return total;
  }

  void write(const Region& g, F inverse, float scale, bool live) {
    if (g.decode_divisor != 0)
      scale = scale / g.decode_divisor;
    else if (task.tensor_scale)
      scale = scale * g.tensor_scale;
    const hb_table& t = c.tables[0];
    Sums sums[LANES16 / W];
    for (int j = 0; j < LANES16 / W; ++j) sums[j] = Sums::begin(stats, j * W);
    for (int64_t r = 0; r < g.rows; ++r)
      for (int64_t k = 0; k < g.columns; k += W) {
        const int64_t at = g.start + r * task.k + k, rest = g.columns - k;
        const F x = load_row(task.x, task.type, at, rest);
        worst = maximum(worst, bits(x) & 0x7fffffff);
        const F z = y_of(g, x) * inverse;
        F value;
        const I code = grid.code(z, value);
        store_bytes((uint8_t*)task.codes + at, live ? code : all(t.zero_code), rest);
        if (!task.stats) continue;
        Sums& s = sums[k % LANES16 / W];
        s.error(live ? value * all(scale) - x : -x);
        s.square(x);
        s.range(live ? ~I{} : I{}, x, all(t.lowest * scale), all(t.highest * scale));
      }
    if (!task.stats) return;
    F largest = stats.largest;
    for (int j = 0; j < LANES16 / W; ++j) {
      sums[j].end(stats, j * W);
      largest = maximum(stats.largest, largest);
    }
    stats.largest = largest;
    ++stats.blocks[0];
  }
};

}  // namespace
