// The scale and table of a block by a quadratic error: candidates are run column by column, several at a time.
#pragma once
#include "affine.h"

namespace {

// How a number of a block is rounded.
struct Choice {
  F scale = {}, inverse = {}, offset = {};
  I stored = {}, table = {};
};

template <class Grid>
struct TableRule {
  Grid grid;
  HB_MEMBER I code(F v, const Choice& c, F& value) const {
    const I code = grid.code(v * c.inverse, value);
    value = value * c.scale;
    return code;
  }
};

template <bool BIAS>
struct RangeRule {
  AffineRule<BIAS> rule;
  HB_MEMBER I code(F v, const Choice& c, F& value) const {
    const F q = rule.number(v, c.scale, c.offset);
    value = rule.value(q, c.scale, c.offset);
    return to_int(q);
  }
};

// The nearest codes of W numbers under the scales that their lanes chose, and the values of these codes; lanes of a
// scale of zero, which are not `live`, get zeros.
HB_INLINE I nearest_codes(const hb_codec& c, F v, const Choice& choice, I live, F& value) {
  value = F{};
  if (c.family == HB_AFFINE_BIAS) return RangeRule<true>{{(float)c.levels}}.code(v, choice, value);
  if (c.family == HB_AFFINE_ZERO_POINT) return RangeRule<false>{{(float)c.levels}}.code(v, choice, value);
  I code = all(c.tables[0].zero_code);
  for (int t = 0; t < c.table_count; ++t) {
    const I mask = live & (c.table_count == 1 ? ~I{} : (I)(choice.table == t));
    if (!any(mask)) continue;
    with_grid(c.tables[t], [&](const auto& grid) {
      F result;
      const I new_code = grid.code(v * choice.inverse, result);
      code = select(mask, new_code, code);
      value = select(mask, result * choice.scale, value);
    });
  }
  return code;
}

// A block as its candidates are judged.
struct Judged {
  const F* y;
  int size;
  bool feedback;
  const float* coefficients;  // row j: of the errors of columns 0..j-1; or null
  const float* gain;
};

// Losses of N choices. Sums only grow, so they end where no lane can come under `most` any more.
template <int N, bool FEEDBACK, class Rule>
void losses_of(const Rule& rule, const Judged& b, const Choice* choice, F unit, F most, F* loss) {
  F error[N][LARGEST_BLOCK];
  F sum[N] = {};
  for (int j = 0; j < b.size; ++j) {
    const float* const row = b.coefficients ? b.coefficients + j * b.size : nullptr;
    F v[N];
    for (int n = 0; n < N; ++n) v[n] = b.y[j];
    if (FEEDBACK) {
      for (int k = 0; row && k < j; ++k)
        for (int n = 0; n < N; ++n) v[n] -= error[n][k] * all(row[k]);
    }
    for (int n = 0; n < N; ++n) {
      F value;
      rule.code(v[n], choice[n], value);
      v[n] -= value;
      error[n][j] = v[n];
    }
    if (!FEEDBACK) {
      for (int k = 0; row && k < j; ++k)
        for (int n = 0; n < N; ++n) v[n] += error[n][k] * all(row[k]);
    }
    for (int n = 0; n < N; ++n) {
      const F u = v[n] * unit;
      sum[n] += u * u * all(b.gain[j]);
    }
    if (j % 16 == 15) {
      I over = ~I{};
      for (int n = 0; n < N; ++n) over &= (I)(sum[n] >= most);
      if (every(over)) break;
    }
  }
  for (int n = 0; n < N; ++n) loss[n] = sum[n];
}

// The choice of the least loss; the first one wins ties, and stands even where its loss overflows.
struct Search {
  const Judged& block;
  F unit = {};
  F loss = {};
  Choice best;
  bool empty = true;

  HB_MEMBER void offer(F new_loss, const Choice& choice) {
    const I better = empty ? ~I{} : (I)(new_loss < loss);
    empty = false;
    loss = select(better, new_loss, loss);
    best.scale = select(better, choice.scale, best.scale);
    best.inverse = select(better, choice.inverse, best.inverse);
    best.offset = select(better, choice.offset, best.offset);
    best.stored = select(better, choice.stored, best.stored);
    best.table = select(better, choice.table, best.table);
  }

  template <int N, class Rule>
  void judge(const Rule& rule, const Choice* choice, int count) {
    F found[N];
    const F most = empty ? all(__builtin_inff()) : loss;
    if (block.feedback)
      losses_of<N, true>(rule, block, choice, unit, most, found);
    else
      losses_of<N, false>(rule, block, choice, unit, most, found);
    for (int n = 0; n < count; ++n) offer(found[n], choice[n]);
  }
};

// Choices wait here until some of them can be judged together, which hides the latency of a column's rounding.
template <class Rule>
struct Queue {
  static constexpr int N = 4;
  const Rule& rule;
  Search& search;
  Choice waiting[N];
  int count = 0;

  HB_MEMBER void add(const Choice& choice) {
    waiting[count++] = choice;
    if (count == N) flush();
  }
  void flush() {
    if (count == 1) search.template judge<1>(rule, waiting, 1);
    if (count > 1) {
      for (int n = count; n < N; ++n) waiting[n] = waiting[count - 1];
      search.template judge<N>(rule, waiting, count);
    }
    count = 0;
  }
};

}  // namespace
