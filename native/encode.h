// Encoding of blocks along a row: tile by tile, load, search, code, pack, measure.
#pragma once
#include "four_over_six.h"
#include "stats.h"

namespace {

// Buffers of tiles, full or not.
struct Run {
  const hb_task& task;
  int size, bits;
  int64_t blocks;  // of one leading index
  alignas(64) char spare[LARGEST_BLOCK * W * 4];

  HB_MEMBER int64_t code_bytes() const { return (int64_t)size * bits / 8; }

  // Loads blocks first.. of matrix `lead`; lanes beyond the last block are zero.
  HB_MEMBER void load_tile(Tile& t, int64_t lead, int64_t first, int lanes) {
    const int64_t at = (lead * blocks + first) * size;
    const int width = task.type == HB_FP32 ? 4 : 2;
    if (lanes == W) {
      load_blocks(task.x, task.type, at, size, size, t.x);
    } else {
      const size_t filled = (size_t)lanes * (size_t)size * (size_t)width;
      memcpy(spare, (const char*)task.x + at * width, filled);
      memset(spare + filled, 0, sizeof spare - filled);
      load_blocks(spare, task.type, 0, size, size, t.x);
    }
    t.size = size;
    t.weighted = task.weights != nullptr;
    if (t.weighted) {
      const float* row = task.weights + (task.weight_lead > 1 ? lead : 0) * task.k;
      load_weights(row, first, task.k, size, t.w);
    }
  }

  HB_MEMBER void store_codes(I* words, int64_t lead, int64_t first, int lanes) {
    const int64_t bytes = code_bytes();
    uint8_t* out = (uint8_t*)task.codes + (lead * blocks + first) * bytes;
    const int count = (int)(bytes / 4);
    words_to_blocks(words, count);
    if (lanes == W) {
      memcpy(out, words, (size_t)count * sizeof(I));
    } else {
      memcpy(out, words, (size_t)(lanes * bytes));
    }
  }
};

// Codes of the lanes in `mask` under one grid, into words of 32 bits, and their error.
template <bool MEASURED, class Grid>
void write_codes(const Grid& grid, const hb_table& t, const Tile& tile, int bits_of_code, I mask, F inverse, F scale,
                 I* words, Sums& sums) {
  const int per_word = 32 / bits_of_code;
  Sums s = sums;
  const F low = all(t.lowest) * scale, high = all(t.highest) * scale;
  for (int i = 0; i < tile.size; i += per_word) {
    I word = {};
    for (int k = per_word - 1; k >= 0; --k) {
      const F z = tile.y[i + k] * inverse;
      F value;
      word = (word << bits_of_code) | grid.code(z, value);
      if (MEASURED) {
        s.error(keep(mask, value * scale - tile.x[i + k]));
        s.range(mask, tile.x[i + k], low, high);
      }
    }
    I& out = words[i / per_word];
    out = select(mask, word, out);
  }
  sums = s;
}

struct BlockEncoder {
  const hb_codec& c;
  const hb_task& task;
  Run run;
  Stats stats;
  Tile tile;
  I worst = {};

  BlockEncoder(const hb_codec& codec, const hb_task& t)
      : c(codec), task(t), run{t, codec.columns, codec.bits, t.n * t.k / codec.columns, {}}, stats(t.stats) {}

  int encode() {
    for (int64_t lead = 0; lead < task.lead; ++lead) {
      const float scale = task.tensor_scale ? task.tensor_scale[lead] : 1.0f;
      const SixConstants six = six_constants(scale);
      const float factor = c.four_over_six ? six.unit : 1.0f / scale;
      for (int64_t first = 0; first < run.blocks; first += W) {
        const int64_t rest = run.blocks - first;
        one_tile(lead, first, rest < W ? (int)rest : W, scale, factor, six);
      }
    }
    stats.finish();
    return has_no_number(worst, task.type) ? 1 : 0;
  }

  HB_MEMBER void one_tile(int64_t lead, int64_t first, int lanes, float tensor_scale, float factor,
                          const SixConstants& six) {
    run.load_tile(tile, lead, first, lanes);
    I largest = {};
    F amax = {}, amax_weight = {};
    const bool scaled = task.tensor_scale != nullptr;
    for (int i = 0; i < tile.size; ++i) {
      largest = maximum(largest, bits(tile.x[i]) & 0x7fffffff);
      const F y = scaled ? tile.x[i] * all(factor) : tile.x[i];
      const F a = absolute(y);
      tile.y[i] = y;
      tile.a[i] = a;
      if (tile.weighted) amax_weight = select((I)(a > amax), tile.w[i], amax_weight);
      amax = maximum(a, amax);
    }
    worst = maximum(worst, largest);
    const I live = largest != 0;
    Best best;
    const Problem problem{c, tile, amax, amax_weight, ~live};
    if (c.four_over_six)
      four_over_six(problem, six, best);
    else
      sweep(problem, best);
    const I stored = best.stored & live;
    const I table = best.table & live;
    write(lead, first, lanes, tensor_scale, stored, table, live, best);
    const I selected = c.table_count > 1 ? stored | (table << c.scale_bits) : stored;
    const int bytes = scale_bytes(c);
    store_lanes((char*)task.scales + (lead * run.blocks + first) * bytes, selected, bytes, lanes);
  }

  HB_MEMBER void write(int64_t lead, int64_t first, int lanes, float tensor_scale, I stored, I table, I live,
                       const Best& best) {
    I words[LARGEST_BLOCK / 4];
    Sums sums;
    const int32_t zero = (int32_t)((uint32_t)c.tables[0].zero_code * (c.bits == 4 ? 0x11111111u : 0x01010101u));
    for (int i = 0; i < tile.size * c.bits / 32; ++i) words[i] = all(zero);
    F scale = select(live, best.scale, scale_value(c.scale_kind, stored));
    if (task.stats) {
      sums = Sums::begin(stats, (int)(first % LANES16));
      if (task.divisor)
        scale = scale / all(task.divisor[lead]);
      else if (task.tensor_scale)
        scale = scale * all(tensor_scale);
      for (int i = 0; i < tile.size; ++i) sums.square(tile.x[i]);
    }
    for (int t = 0; t < c.table_count; ++t) {
      const I chosen = c.table_count == 1 ? ~I{} : (I)(table == t);
      if (!any(chosen)) continue;
      const I mask = chosen & live;
      with_grid(c.tables[t], [&](const auto& grid) {
        if (task.stats)
          write_codes<true>(grid, c.tables[t], tile, c.bits, mask, best.inverse, scale, words, sums);
        else
          write_codes<false>(grid, c.tables[t], tile, c.bits, mask, best.inverse, scale, words, sums);
      });
      if (task.stats)
        for (int l = 0; l < lanes; ++l) stats.blocks[t] -= chosen[l];
    }
    if (task.stats) sums.end(stats, (int)(first % LANES16));
    run.store_codes(words, lead, first, lanes);
  }
};

}  // namespace
