// Rounding with error feedback (GPTQ, arXiv 2210.17323), the scale and table of a block chosen by a quadratic error.
// A lane is a row, so no row depends on another; columns follow one another in the order of the arrays.
#pragma once
#include <stdlib.h>

#include <type_traits>

#include "judge.h"

namespace {

struct Gptq {
  const hb_codec& c;
  const hb_gptq_task& task;
  const int64_t k;
  const int size;  // columns that are worked on together: a block, or 16 where scales are given
  void* memory = nullptr;
  F* y = nullptr;      // weights, compensated for the errors of earlier columns
  F* error = nullptr;  // error of each column
  I* codes = nullptr;  // of four columns in a word

  Gptq(const hb_codec& codec, const hb_gptq_task& t)
      : c(codec), task(t), k(t.k), size(t.block_of ? 16 : codec.columns) {}
  ~Gptq() { free(memory); }

  int run() {
    const size_t columns = (size_t)k;
    memory = malloc((2 * columns + columns / 4 + 1) * sizeof(F));
    if (!memory) return 3;
    y = (F*)(((uintptr_t)memory + sizeof(F) - 1) / sizeof(F) * sizeof(F));
    error = y + columns;
    codes = (I*)(error + columns);
    for (int64_t lead = 0; lead < task.lead; ++lead)
      for (int64_t first = 0; first < task.n; first += W) {
        const int64_t rest = task.n - first;
        rows(lead, first, rest < W ? (int)rest : W);
      }
    return 0;
  }

  void rows(int64_t lead, int64_t first, int lanes) {
    const int64_t row = lead * task.n + first;
    load_rows(task.x, task.type, [&](int l) { return (row + (l < lanes ? l : lanes - 1)) * k; }, k, y);
    if (task.tensor_scale) {
      const F factor = all(1.0f / task.tensor_scale[lead]);
      for (int64_t j = 0; j < k; ++j) y[j] = y[j] * factor;
    }
    Choice choice;
    I live = ~I{};
    for (int64_t start = 0; start < k; start += size) {
      if (task.outer)
        for (int64_t at = start; at < start + size; at += 16) compensate(at, start);
      if (!task.block_of) {
        choose(start, choice, live);
        const int64_t at = row * (k / size) + start / size;
        scatter(task.scales, at, k / size, c.table_count > 1 ? choice.stored | (choice.table << c.scale_bits)
                                                             : choice.stored, scale_bytes(c), lanes);
        if (c.family == HB_AFFINE_BIAS)
          scatter(task.offsets, at, k / size, (I)((U)bits(choice.offset) >> 16), 2, lanes);
        if (c.family == HB_AFFINE_ZERO_POINT) scatter(task.offsets, at, k / size, to_int(choice.offset), 1, lanes);
      }
      for (int64_t j = start; j < start + size; ++j) {
        if (task.block_of && (j == 0 || task.block_of[j] != task.block_of[j - 1])) given(row, j, lanes, choice, live);
        place(start, j, task.inner ? task.inner + (start * size + (j - start) * size) : nullptr, choice, live);
      }
    }
    for (int l = 0; l < lanes; ++l)
      for (int64_t i = 0; i < k / 4; ++i) {
        const int32_t word = codes[i][l];
        memcpy(task.codes + (row + l) * k + 4 * i, &word, sizeof word);
      }
  }

  // Takes from 16 columns what the errors of all finished columns ask for, one column after the other.
  HB_MEMBER void compensate(int64_t at, int64_t done) {
    constexpr int C = W == 16 ? 16 : 8;
    const float* const part = task.outer + at * k;
    for (int half = 0; half < 16; half += C) {
      F sum[C];
      for (int i = 0; i < C; ++i) sum[i] = y[at + half + i];
      for (int64_t j = 0; j < done; ++j) {
        const F e = error[j];
        const float* const row = part + j * 16 + half;
#pragma GCC unroll 16
        for (int i = 0; i < C; ++i) sum[i] -= e * all(row[i]);
      }
      for (int i = 0; i < C; ++i) y[at + half + i] = sum[i];
    }
  }

  void choose(int64_t start, Choice& choice, I& live) {
    const int64_t block = start / size;
    const Judged judged{y + start, size, task.judge_feedback != 0,
                        task.judge ? task.judge + block * size * size : nullptr, task.gain + start};
    Search search{judged, F{}, F{}, {}, true};
    if (c.family == HB_AFFINE_BIAS)
      choose_range<true>(search);
    else if (c.family == HB_AFFINE_ZERO_POINT)
      choose_range<false>(search);
    else
      choose_scale(search, live);
    choice = search.best;
    choice.stored &= live;
    choice.table &= live;
  }

  void choose_scale(Search& search, I& live) {
    F amax = {};
    for (int i = 0; i < size; ++i) amax = maximum(absolute(search.block.y[i]), amax);
    live = (I)(amax != all(0.0f));
    bool has_unit = false;
    for (int i = 0; i < c.table_count; ++i) {
      const int index = c.order[i];
      const hb_table& t = c.tables[index];
      with_grid(t, [&](const auto& grid) {
        typedef TableRule<typename std::decay<decltype(grid)>::type> Rule;
        const Rule rule{grid};
        Queue<Rule> queue{rule, search, {}, 0};
        each_scale(c, c.shared_base ? c.tables[c.order[0]] : t, amax, [&](I stored, F scale) {
          if (!has_unit) search.unit = unit_of(scale);
          has_unit = true;
          const Choice choice{scale, all(1.0f) / scale, F{}, stored, all(index)};
          if (c.single && !c.four_over_six)
            search.offer(F{}, choice);
          else
            queue.add(choice);
        });
        queue.flush();
      });
    }
  }

  template <bool BIAS>
  void choose_range(Search& search) {
    const F* const v = search.block.y;
    F low = v[0], high = v[0];
    for (int i = 0; i < size; ++i) {
      low = minimum(v[i], low);
      high = maximum(v[i], high);
    }
    search.unit = unit_of(maximum(absolute(low), absolute(high)) + all(0x1p-126f));
    const RangeRule<BIAS> rule{{(float)c.levels}};
    Queue<RangeRule<BIAS>> queue{rule, search, {}, 0};
    for (int i = 0; i < c.ratio_count; ++i)
      for (int j = 0; j < c.ratio_count; ++j) {
        Choice choice;
        rule.rule.solve(low * all(c.ratios[i]), high * all(c.ratios[j]), choice.scale, choice.offset);
        choice.stored = (I)((U)bits(choice.scale) >> 16);
        queue.add(choice);
      }
    queue.flush();
  }

  // The scale that was given for column j.
  HB_MEMBER void given(int64_t row, int64_t j, int lanes, Choice& choice, I& live) const {
    const int64_t in_row = k / c.columns, at = row * in_row + task.block_of[j];
    I stored = gather(task.scales, at, in_row, scale_bytes(c), lanes);
    if (c.family != HB_BLOCK) {
      choice.scale = floats(stored << 16);
      if (c.family == HB_AFFINE_BIAS)
        choice.offset = floats(gather(task.offsets, at, in_row, 2, lanes) << 16);
      else
        choice.offset = to_float(gather(task.offsets, at, in_row, 1, lanes));
      return;
    }
    choice.table = c.table_count > 1 ? stored >> c.scale_bits : I{};
    if (c.table_count > 1) stored &= (1 << c.scale_bits) - 1;
    live = stored != 0;
    choice.scale = scale_value(c.scale_kind, stored);
    choice.inverse = all(1.0f) / choice.scale;
  }

  // Rounds column j, after taking from it what the errors of columns start..j-1 ask for.
  HB_MEMBER void place(int64_t start, int64_t j, const float* coefficients, const Choice& choice, I live) {
    F v = y[j];
    for (int64_t i = start; coefficients && i < j; ++i) v -= error[i] * all(coefficients[i - start]);
    F value;
    const I code = nearest_codes(c, v, choice, live, value);
    error[j] = v - value;
    const int shift = (int)(j % 4) * 8;
    codes[j / 4] = shift ? codes[j / 4] | (code << shift) : code;
  }

  HB_MEMBER static void scatter(void* p, int64_t at, int64_t stride, I v, int bytes, int lanes) {
    for (int l = 0; l < lanes; ++l) {
      const int32_t value = v[l];
      memcpy((char*)p + (at + l * stride) * bytes, &value, (size_t)bytes);
    }
  }

  HB_MEMBER static I gather(const void* p, int64_t at, int64_t stride, int bytes, int lanes) {
    I v = {};
    for (int l = 0; l < W; ++l) {
      uint32_t value = 0;
      memcpy(&value, (const char*)p + (at + (l < lanes ? l : lanes - 1) * stride) * bytes, (size_t)bytes);
      v[l] = (int32_t)value;
    }
    return v;
  }
};

}  // namespace
