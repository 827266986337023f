// The search: for each lane the scale and table with the least error, in the reference's order of operations.
#pragma once
#include "scales.h"
#include "tile.h"

namespace {

struct Best {
  F loss = {};
  F scale = {};    // as decoding sees it
  F inverse = {};  // elements are multiplied by it
  I stored = {};   // bits of the scale, without the selector
  I table = {};
  bool empty = true;

  HB_MEMBER void offer(F new_loss, F new_scale, F new_inverse, I new_stored, int new_table) {
    if (empty) {
      // the first candidate stands even where its error overflows
      loss = new_loss;
      scale = new_scale;
      inverse = new_inverse;
      stored = new_stored;
      table = all(new_table);
      empty = false;
      return;
    }
    const I better = (I)(new_loss < loss);
    loss = select(better, new_loss, loss);
    scale = select(better, new_scale, scale);
    inverse = select(better, new_inverse, inverse);
    stored = select(better, new_stored, stored);
    table = select(better, all(new_table), table);
  }
};

// What the candidates of one tile have in common.
struct Problem {
  const hb_codec& codec;
  const Tile& tile;
  F amax;         // largest |y|
  F amax_weight;  // importance of an element of that magnitude
  I ignored;      // lanes without weights other than zero
};

HB_INLINE F term(F miss, int metric) { return metric == HB_SSE ? miss * miss : absolute(miss); }

// Unit-free errors of N scales: sums over the block, element after element.
template <class Grid, bool WEIGHTED, int N>
HB_INLINE void losses(const Grid& grid, const Tile& tile, const F* inverse, F* loss) {
  const F* const v = Grid::symmetric ? tile.a : tile.y;
  F sum[N] = {};
  for (int i = 0; i < tile.size; i += 8) {
#pragma GCC unroll 8
    for (int k = i; k < i + 8; ++k) {
      for (int j = 0; j < N; ++j) {
        const F e = grid.miss(v[k] * inverse[j]);
        sum[j] += WEIGHTED ? e * e * tile.w[k] : e * e;
      }
    }
  }
  for (int j = 0; j < N; ++j) loss[j] = sum[j];
}

// Scales wait here until N of them can be judged together, which keeps the adders busy.
template <class Grid>
struct Judge {
  static constexpr int N = 2;
  const Problem& p;
  const Grid& grid;
  const int table;
  Best& best;
  F& unit;
  bool& has_unit;
  int waiting = 0;
  F scale[N] = {}, inverse[N] = {}, square[N] = {};
  I stored[N] = {};

  HB_MEMBER void add(I new_stored, F new_scale) {
    const F new_inverse = all(1.0f) / new_scale;
    if (!has_unit) {
      unit = unit_of(new_scale);
      has_unit = true;
    }
    const F relative = new_scale * unit, new_square = relative * relative;
    if (!best.empty && hopeless(new_inverse, new_square)) return;
    scale[waiting] = new_scale;
    inverse[waiting] = new_inverse;
    square[waiting] = new_square;
    stored[waiting] = new_stored;
    if (++waiting == N || best.empty) flush();
  }

  // The error of the largest element alone bounds the sum from below, in FP32 too, where sums of squares only
  // grow: where no lane's bound is under its best, no lane can choose this scale.
  HB_MEMBER bool hopeless(F inv, F sq) const {
    const F z = p.amax * inv;
    F e = absolute(grid.miss(z));
    if (!Grid::symmetric) e = minimum(e, absolute(grid.miss(-z)));
    F bound = e * e;
    if (p.tile.weighted) bound = bound * p.amax_weight;
    return every((I)(bound * sq >= best.loss) | p.ignored);
  }

  HB_MEMBER void flush() {
    F loss[N];
    if (waiting == 0) return;
    if (waiting == 1) {
      if (p.tile.weighted)
        losses<Grid, true, 1>(grid, p.tile, inverse, loss);
      else
        losses<Grid, false, 1>(grid, p.tile, inverse, loss);
    } else if (p.tile.weighted) {
      losses<Grid, true, N>(grid, p.tile, inverse, loss);
    } else {
      losses<Grid, false, N>(grid, p.tile, inverse, loss);
    }
    for (int j = 0; j < waiting; ++j) best.offer(loss[j] * square[j], scale[j], inverse[j], stored[j], table);
    waiting = 0;
  }
};

// Calls use(stored, scale) for every candidate scale of blocks of this amax, the absmax scale first.
template <class Use>
HB_INLINE void each_scale(const hb_codec& c, const hb_table& t, F amax, Use use) {
  amax = select((I)(amax == all(0.0f)), all(1.0f), amax);
  if (c.four_over_six) {
    const F base = amax / all(t.top);
    for (int i = 0; i < (t.kind == HB_E2M1 ? 2 : 1); ++i) {
      const I stored = scale_code(c.scale_kind, base * all(i ? 1.5f : 1.0f));
      use(stored, scale_value(c.scale_kind, stored));
    }
  } else if (is_ordered(c.scale_kind)) {
    const I base = base_code(c, t, amax);
    const int low = c.scale_low, high = t.high;
    for (int i = 0; i < c.offset_count; ++i) {
      // clipped to the same code as an earlier candidate
      if (every((I)(base + c.above[i] >= high)) || every((I)(base + c.below[i] <= low))) continue;
      const I stored = clip(base + c.offsets[i], low, high);
      use(stored, scale_value(c.scale_kind, stored));
    }
  } else {
    const F exact = amax / all(t.top);
    for (int i = 0; i < c.ratio_count; ++i) {
      const I stored = scale_code(c.scale_kind, minimum(exact * all(c.ratios[i]), all(t.limit)));
      use(stored, scale_value(c.scale_kind, stored));
    }
  }
}

// Every candidate scale of one table.
template <class Grid>
void sweep_table(const Problem& p, const Grid& grid, int table, const hb_table& base_table, Best& best, F& unit,
                 bool& has_unit) {
  Judge<Grid> judge{p, grid, table, best, unit, has_unit};
  each_scale(p.codec, base_table, p.amax, [&](I stored, F scale) { judge.add(stored, scale); });
  judge.flush();
}

// The only candidate: nothing to judge.
HB_INLINE void take_absmax(const Problem& p, const hb_table& t, Best& best) {
  const hb_codec& c = p.codec;
  const F amax = select((I)(p.amax == all(0.0f)), all(1.0f), p.amax);
  I stored;
  if (is_ordered(c.scale_kind)) {
    stored = clip(base_code(c, t, amax) + c.offsets[0], c.scale_low, t.high);
  } else {
    stored = scale_code(c.scale_kind, minimum(amax / all(t.top) * all(c.ratios[0]), all(t.limit)));
  }
  const F scale = scale_value(c.scale_kind, stored);
  best.offer(F{}, scale, all(1.0f) / scale, stored, 0);
}

HB_INLINE void sweep(const Problem& p, Best& best) {
  const hb_codec& c = p.codec;
  if (c.single) return take_absmax(p, c.tables[0], best);
  F unit = {};
  bool has_unit = false;
  for (int i = 0; i < c.table_count; ++i) {
    const int index = c.order[i];
    const hb_table& t = c.tables[index];
    const hb_table& base = c.shared_base ? c.tables[c.order[0]] : t;
    with_grid(t, [&](const auto& grid) { sweep_table(p, grid, index, base, best, unit, has_unit); });
  }
}

}  // namespace
