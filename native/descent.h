// Coordinate descent of codes with fixed scales: a group of rows, one after the other; lanes are columns.
#pragma once
#include "row_feedback.h"

namespace {

struct Descent {
  const hb_codec& c;
  const hb_descent_task& task;
  const int64_t k;
  void* memory = nullptr;
  F *scale, *inverse, *offset, *curve, *step;
  I *table, *live, *codes;
  int64_t moves = 0;

  Descent(const hb_codec& codec, const hb_descent_task& t) : c(codec), task(t), k(t.k) {}
  ~Descent() { free(memory); }

  int run() {
    memory = malloc(8 * (size_t)k * sizeof(float) + sizeof(F));
    if (!memory) return 3;
    float* const from = (float*)(((uintptr_t)memory + sizeof(F) - 1) / sizeof(F) * sizeof(F));
    F** const floats_of[] = {&scale, &inverse, &offset, &curve, &step};
    for (int i = 0; i < 5; ++i) *floats_of[i] = (F*)(from + i * k);
    table = (I*)(from + 5 * k);
    live = (I*)(from + 6 * k);
    codes = (I*)(from + 7 * k);
    for (int64_t row = 0; row < task.n; ++row) {
      begin(row);
      descend(row);
      for (int64_t i = 0; i < k; ++i) task.codes[row * k + i] = (uint8_t)((int32_t*)codes)[i];
      for (int64_t later = row + 1; later < task.n; ++later)
        add(task.gradient + later * k, task.moved + row * k, task.coupling[row * task.n + later]);
    }
    *task.moves = moves;
    return 0;
  }

  // What each column's scale stands for, and what moving it costs.
  void begin(int64_t row) {
    const int64_t in_row = k / c.columns;
    const float weight = task.coupling[row * task.n + row];
    Choice choice;
    bool alive = true;
    for (int64_t i = 0; i < k; ++i) {
      if (i == 0 || task.places[i] != task.places[i - 1])
        choice = RowGroup::stored_choice(c, task.scales, task.offsets, row * in_row + task.places[i], alive);
      ((float*)scale)[i] = choice.scale[0];
      ((float*)inverse)[i] = choice.inverse[0];
      ((float*)offset)[i] = choice.offset[0];
      ((int32_t*)table)[i] = choice.table[0];
      ((int32_t*)live)[i] = alive ? -1 : 0;
      ((int32_t*)codes)[i] = task.codes[row * k + i];
      ((float*)curve)[i] = weight * task.hessian[i * k + i];
      ((float*)step)[i] = 1.0f / ((float*)curve)[i];
    }
  }

  HB_MEMBER void add(float* out, const float* values, float factor) const {
    for (int64_t i = 0; i < k; i += W) store(out + i, load<F>(out + i) + all(factor) * load<F>(values + i));
  }

  // The nearest values of W columns to v.
  HB_MEMBER I nearest(F v, int64_t at, F& value) const {
    return nearest_codes(c, v, {scale[at], inverse[at], offset[at], I{}, table[at]}, live[at], value);
  }

  void descend(int64_t row) {
    float* const values = task.values + row * k;
    float* const gradient = task.gradient + row * k;
    const float weight = task.coupling[row * task.n + row];
    for (int64_t move = 0; move < task.limit; ++move) {
      F best = {};
      I where = {};
      for (int64_t at = 0; at < k / W; ++at) {
        const F value = load<F>(values + at * W), g = load<F>(gradient + at * W);
        F rounded;
        const I code = nearest(value - g * step[at], at, rounded);
        const F change = rounded - value;
        const F bent = change * curve[at];
        const F gain = -(change * ((g + g) + bent));
        const I better = (I)(code != codes[at]) & (I)(gain > all(task.margin) * (change * bent)) & (I)(gain > best);
        best = select(better, gain, best);
        where = select(better, lane_numbers() + (int32_t)(at * W), where);
      }
      float most = 0;
      int32_t column = -1;
      for (int l = 0; l < W; ++l)
        if (best[l] > most || (best[l] == most && most > 0 && where[l] < column)) {
          most = best[l];
          column = where[l];
        }
      if (column < 0) return;
      const int64_t at = column / W;
      F rounded;
      const I code = nearest(load<F>(values + at * W) - load<F>(gradient + at * W) * step[at], at, rounded);
      const float change = rounded[column % W] - values[column];
      const float* const line = task.hessian + (int64_t)column * k;
      add(gradient, line, change * weight);
      add(task.moved + row * k, line, change);
      values[column] = rounded[column % W];
      ((int32_t*)codes)[column] = code[column % W];
      ++moves;
    }
  }
};

}  // namespace
