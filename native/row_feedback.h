// Rounding with feedback between rows: a group of rows, each of which takes the errors of earlier ones.
// Rows follow one another, so lanes are candidates of a block, or columns.
#pragma once
#include <stdlib.h>

#include <type_traits>

#include "judge.h"
#include "search.h"

namespace {

// Takes left [count, rows] transposed times right [count, k] from out [rows, k], one product after the other.
struct Products {
  static constexpr int DEPTH = 32;    // products between two writes of a result
  static constexpr int WIDTH = 1024;  // columns of `right` that stay in the cache

  template <int P>
  HB_MEMBER static void some(float* out, const float* left, const float* right, int64_t count, int64_t rows, int64_t k,
                             int64_t from, int64_t to) {
    int64_t j = from;
    for (; j + 2 * W <= to; j += 2 * W) {
      F sum[P][2];
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < 2; ++v) sum[p][v] = load<F>(out + p * k + j + v * W);
      for (int64_t s = 0; s < count; ++s) {
        const F a = load<F>(right + s * k + j), b = load<F>(right + s * k + j + W);
        for (int p = 0; p < P; ++p) {
          const F factor = all(left[s * rows + p]);
          sum[p][0] -= factor * a;
          sum[p][1] -= factor * b;
        }
      }
      for (int p = 0; p < P; ++p)
        for (int v = 0; v < 2; ++v) store(out + p * k + j + v * W, sum[p][v]);
    }
    for (; j < to; ++j)
      for (int p = 0; p < P; ++p) {
        float sum = out[p * k + j];
        for (int64_t s = 0; s < count; ++s) sum -= left[s * rows + p] * right[s * k + j];
        out[p * k + j] = sum;
      }
  }

  static void subtract(float* out, const float* left, const float* right, int64_t count, int64_t rows, int64_t k) {
    for (int64_t s = 0; s < count; s += DEPTH) {
      const int64_t depth = count - s < DEPTH ? count - s : DEPTH;
      for (int64_t from = 0; from < k; from += WIDTH) {
        const int64_t to = k - from < WIDTH ? k : from + WIDTH;
        int64_t m = 0;
        for (; m + 4 <= rows; m += 4)
          some<4>(out + m * k, left + s * rows + m, right + s * k, depth, rows, k, from, to);
        for (; m < rows; ++m) some<1>(out + m * k, left + s * rows + m, right + s * k, depth, rows, k, from, to);
      }
    }
  }
};

// The best candidate of one block; the first one wins ties, and stands even where its loss overflows.
struct BestCandidate {
  float loss = 0, scale = 1, inverse = 1, offset = 0;
  int32_t stored = 0, table = 0;
  bool empty = true;
};

// Candidates of one block, a lane each; some are judged together.
template <class Rule>
struct Candidates {
  static constexpr int N = 2;
  const Rule& rule;
  const Judged& block;
  BestCandidate& best;
  F unit;
  Choice waiting[N];
  int count = 0;

  void add(float scale, float offset, int32_t stored, int32_t table) {
    Choice& choice = waiting[count / W];
    choice.scale[count % W] = scale;
    choice.offset[count % W] = offset;
    choice.stored[count % W] = stored;
    choice.table[count % W] = table;
    if (++count == N * W) flush();
  }

  template <int M>
  void judge(F* loss) {
    const F most = all(best.empty ? __builtin_inff() : best.loss);
    if (block.feedback)
      losses_of<M, true>(rule, block, waiting, unit, most, loss);
    else
      losses_of<M, false>(rule, block, waiting, unit, most, loss);
  }

  void flush() {
    if (!count) return;
    const int used = (count + W - 1) / W, last = count - 1;
    for (int i = count; i < used * W; ++i) {
      waiting[i / W].scale[i % W] = waiting[last / W].scale[last % W];
      waiting[i / W].offset[i % W] = waiting[last / W].offset[last % W];
    }
    for (int n = 0; n < used; ++n) waiting[n].inverse = all(1.0f) / waiting[n].scale;
    F loss[N];
    if (used == 1)
      judge<1>(loss);
    else
      judge<N>(loss);
    for (int i = 0; i < count; ++i) offer(loss[i / W][i % W], waiting[i / W], i % W);
    count = 0;
  }

  void offer(float loss, const Choice& c, int l) {
    if (!best.empty && !(loss < best.loss)) return;
    best = {loss, c.scale[l], c.inverse[l], c.offset[l], c.stored[l], c.table[l], false};
  }
};

struct RowGroup {
  const hb_codec& c;
  const hb_rows_task& task;
  const int64_t k;
  const int size, n;
  void* memory = nullptr;
  float* y = nullptr;      // weights, compensated for the errors of earlier columns
  float* error = nullptr;  // of each column after compensation
  float turned[LARGEST_BLOCK * LARGEST_BLOCK];  // coefficients within a block, by the column whose error it is

  RowGroup(const hb_codec& codec, const hb_rows_task& t)
      : c(codec), task(t), k(t.k), size(t.block_of ? 16 : codec.columns), n((int)t.n) {}
  ~RowGroup() { free(memory); }

  int run() {
    const size_t count = (size_t)(k * n);
    memory = malloc(2 * count * sizeof(float) + 64);
    if (!memory) return 3;
    y = (float*)(((uintptr_t)memory + 63) / 64 * 64);
    error = y + count;
    memcpy(y, task.x, count * sizeof(float));
    for (int64_t start = 0; start < k; start += size) {
      if (task.outer)
        for (int64_t at = start; at < start + size; at += 16) {
          int row = 0;
          for (; row + 4 <= n; row += 4) compensate<4>(row, at, start);
          for (; row < n; ++row) compensate<1>(row, at, start);
        }
      if (task.inner)
        for (int j = 0; j < size; ++j)
          for (int i = 0; i < size; ++i) turned[i * size + j] = i < j ? task.inner[start * size + j * size + i] : 0.0f;
      for (int row = 0; row < n; ++row) block(row, start);
    }
    return 0;
  }

  // Takes from 16 columns of some rows what the errors of all finished columns ask for, one after the other.
  template <int P>
  HB_MEMBER void compensate(int row, int64_t at, int64_t done) {
    constexpr int V = 16 / W;
    const float* const part = task.outer + at * k;
    F sum[P][V];
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) sum[p][v] = load<F>(y + (row + p) * k + at + v * W);
    for (int64_t j = 0; j < done; ++j)
      for (int v = 0; v < V; ++v) {
        const F m = load<F>(part + j * 16 + v * W);
        for (int p = 0; p < P; ++p) sum[p][v] -= all(error[(row + p) * k + j]) * m;
      }
    for (int p = 0; p < P; ++p)
      for (int v = 0; v < V; ++v) store(y + (row + p) * k + at + v * W, sum[p][v]);
  }

  // A block of a row: what earlier rows left, then its scale, then its columns.
  void block(int row, int64_t start) {
    float taken[LARGEST_BLOCK] = {};
    for (int q = 0; q < row; ++q) {
      const float* const left = task.error + q * k + start;
      const F share = all(task.coupling[q * n + row]);
      for (int j = 0; j < size; j += W) store(taken + j, load<F>(taken + j) + share * load<F>(left + j));
    }
    float* const here = y + row * k + start;
    for (int j = 0; j < size; ++j) here[j] = here[j] - taken[j];
    BestCandidate choice;
    bool live = true;
    if (!task.block_of) {
      choose(row, start, choice, live);
      keep(row, start / size, choice, live);
    }
    for (int j = 0; j < size; ++j) {
      const int64_t at = start + j;
      if (task.block_of && (j == 0 || task.block_of[at] != task.block_of[at - 1]))
        given(row, task.block_of[at], choice, live);
      float value;
      task.codes[row * k + at] = (uint8_t)place(here[j], choice, live, value);
      const float left = here[j] - value;
      error[row * k + at] = left;
      task.error[row * k + at] = (task.x[row * k + at] - taken[j]) - value;
      if (!task.inner) continue;
      // columns before j are done, so that what is taken from them does not matter
      for (int i = j / W * W; i < size; i += W)
        store(here + i, load<F>(here + i) - all(left) * load<F>(turned + j * size + i));
    }
  }

  void choose(int row, int64_t start, BestCandidate& best, bool& live) {
    F wide[LARGEST_BLOCK];
    for (int j = 0; j < size; ++j) wide[j] = all(y[row * k + start + j]);
    const int64_t number = start / size;
    const Judged judged{wide, size, task.judge_feedback != 0, task.judge ? task.judge + number * size * size : nullptr,
                        task.gain + start};
    if (c.family == HB_AFFINE_BIAS) return choose_range<true>(judged, best);
    if (c.family == HB_AFFINE_ZERO_POINT) return choose_range<false>(judged, best);
    F amax = {};
    for (int j = 0; j < size; ++j) amax = maximum(absolute(wide[j]), amax);
    live = amax[0] != 0.0f;
    F unit = {};
    bool has_unit = false;
    for (int i = 0; i < c.table_count; ++i) {
      const int index = c.order[i];
      with_grid(c.tables[index], [&](const auto& grid) {
        typedef TableRule<typename std::decay<decltype(grid)>::type> Rule;
        const Rule rule{grid};
        Candidates<Rule> candidates{rule, judged, best, unit, {}, 0};
        each_scale(c, c.shared_base ? c.tables[c.order[0]] : c.tables[index], amax, [&](I stored, F scale) {
          if (!has_unit) candidates.unit = unit = unit_of(scale);
          has_unit = true;
          if (c.single && !c.four_over_six) {
            const Choice choice{scale, all(1.0f) / scale, F{}, stored, all(index)};
            candidates.offer(0.0f, choice, 0);
          } else {
            candidates.add(scale[0], 0.0f, stored[0], index);
          }
        });
        candidates.flush();
      });
    }
  }

  template <bool BIAS>
  void choose_range(const Judged& judged, BestCandidate& best) {
    F low = judged.y[0], high = judged.y[0];
    for (int j = 0; j < size; ++j) {
      low = minimum(judged.y[j], low);
      high = maximum(judged.y[j], high);
    }
    const F unit = unit_of(maximum(absolute(low), absolute(high)) + all(0x1p-126f));
    const RangeRule<BIAS> rule{{(float)c.levels}};
    Candidates<RangeRule<BIAS>> candidates{rule, judged, best, unit, {}, 0};
    for (int i = 0; i < c.ratio_count; ++i)
      for (int j = 0; j < c.ratio_count; ++j) {
        F scale, offset;
        rule.rule.solve(low * all(c.ratios[i]), high * all(c.ratios[j]), scale, offset);
        candidates.add(scale[0], offset[0], (int32_t)((uint32_t)bits(scale)[0] >> 16), 0);
      }
    candidates.flush();
  }

  // Stores the scale and offset of a block.
  void keep(int row, int64_t number, BestCandidate& choice, bool live) {
    if (c.family == HB_BLOCK && !live) choice.stored = choice.table = 0;
    const int64_t at = row * (k / size) + number;
    const int32_t stored = c.table_count > 1 ? choice.stored | (choice.table << c.scale_bits) : choice.stored;
    const int bytes = scale_bytes(c);
    memcpy((char*)task.scales + at * bytes, &stored, (size_t)bytes);
    if (c.family == HB_AFFINE_BIAS) {
      const uint16_t offset = (uint16_t)((uint32_t)bits(all(choice.offset))[0] >> 16);
      memcpy((char*)task.offsets + at * 2, &offset, 2);
    }
    if (c.family == HB_AFFINE_ZERO_POINT) ((uint8_t*)task.offsets)[at] = (uint8_t)choice.offset;
  }

  void given(int row, int32_t number, BestCandidate& choice, bool& live) const {
    const Choice stored = stored_choice(c, task.scales, task.offsets, row * (k / c.columns) + number, live);
    choice = {0, stored.scale[0], stored.inverse[0], stored.offset[0], stored.stored[0], stored.table[0], false};
  }

  int32_t place(float v, const BestCandidate& b, bool live, float& value) const {
    F result;
    const Choice choice{all(b.scale), all(b.inverse), all(b.offset), all(b.stored), all(b.table)};
    const I code = nearest_codes(c, all(v), choice, live ? ~I{} : I{}, result);
    value = result[0];
    return code[0];
  }

  // What a stored scale and offset stand for, in all lanes.
  static Choice stored_choice(const hb_codec& c, const void* scales, const void* offsets, int64_t at, bool& live) {
    Choice choice;
    int32_t stored = 0;
    const int bytes = scale_bytes(c);
    memcpy(&stored, (const char*)scales + at * bytes, (size_t)bytes);
    live = true;
    if (c.family != HB_BLOCK) {
      choice.scale = floats(all(stored << 16));
      if (c.family == HB_AFFINE_BIAS) {
        uint16_t offset;
        memcpy(&offset, (const char*)offsets + at * 2, 2);
        choice.offset = floats(all((int32_t)offset << 16));
      } else {
        choice.offset = all((float)((const uint8_t*)offsets)[at]);
      }
      return choice;
    }
    if (c.table_count > 1) {
      choice.table = all(stored >> c.scale_bits);
      stored &= (1 << c.scale_bits) - 1;
    }
    live = stored != 0;
    choice.stored = all(stored);
    choice.scale = scale_value(c.scale_kind, all(stored));
    choice.inverse = all(1.0f) / choice.scale;
    return choice;
  }
};

}  // namespace
