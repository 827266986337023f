// Mixtures of experts: rows are grouped by their experts, so that each expert's weights are read once.
#pragma once
#include "workspace.h"

namespace {

struct Experts {
  const hb_linear_kernels& kernels;
  const hb_mixture& m;
  const hb_product& p;
  const hb_weight &up = *m.gate_up, &down = *m.down;
  const int64_t width = m.gated ? up.n / 2 : up.n;
  const int up_kind = kernels.arithmetic(&up, p.mode, p.x_type);
  const int down_kind = kernels.arithmetic(&down, p.mode, HB_FP32);
  // rotations that differ between experts need activations of their own for each
  const bool own_rows = up.swaps && up.lead > 1;
  hb_row_layout up_layout = {}, down_layout = {};

  struct Group {
    int64_t expert, first, count;  // of the pairs of rows and slots, sorted by expert
  };
  struct Part {
    const Group* group;
    int64_t first, end;  // panels
  };

  int run() {
    kernels.layout(&up, up_kind, &up_layout);
    kernels.layout(&down, down_kind, &down_layout);
    const int64_t slots = m.slots > 0 ? m.slots : 1;
    const int64_t pair_bytes = 4 * (up.n + down.n) + down_layout.bytes + up_layout.bytes;
    int64_t rows = LARGEST_WORKSPACE / (slots * pair_bytes);
    if (rows < 1) rows = 1;
    for (int64_t first = 0; first < p.rows; first += rows) {
      const int status = some_rows(first, p.rows - first < rows ? p.rows - first : rows);
      if (status) return status;
    }
    return 0;
  }

  static int64_t parts_of(const hb_weight& w, int64_t groups) {
    const int64_t panels = (w.n + 15) / 16, wanted = ((int64_t)pool.threads * 4 + groups - 1) / groups;
    return pool.threads == 1 ? 1 : wanted < panels ? wanted : panels;
  }

  template <class Run>
  void panels(const hb_weight& w, const Group* groups, int64_t count, bool alone, const Run& run) {
    const int64_t parts = parts_of(w, count), all = (w.n + 15) / 16;
    parallel(count * parts, alone, [&](int64_t i) {
      const int64_t part = i % parts;
      run(Part{groups + i / parts, all * part / parts, all * (part + 1) / parts});
    });
  }

  int some_rows(int64_t first, int64_t rows) {
    const int64_t pairs = rows * m.slots, experts = up.lead;
    const int64_t* const chosen = m.experts + first * m.slots;
    Buffer<int64_t> place(pairs), starts(experts + 1), pair_at(pairs);
    Buffer<Group> groups(experts);
    Buffer<const void*> up_rows(pairs), down_rows(pairs);
    Buffer<const float*> results(pairs);
    Buffer<float> gate_up(pairs * up.n), out(pairs * down.n);
    Buffer<char> x((own_rows ? pairs : rows) * up_layout.bytes), hidden(pairs * down_layout.bytes);
    if (!place.data || !starts.data || !pair_at.data || !groups.data || !up_rows.data || !down_rows.data ||
        !results.data || !gate_up.data || !out.data || !x.data || !hidden.data)
      return 3;

    for (int64_t e = 0; e <= experts; ++e) starts.data[e] = 0;
    for (int64_t i = 0; i < pairs; ++i)
      if (chosen[i] >= 0 && chosen[i] < experts) ++starts.data[chosen[i] + 1];
    int64_t count = 0;
    for (int64_t e = 0; e < experts; ++e) {
      if (starts.data[e + 1]) groups.data[count++] = {e, starts.data[e], starts.data[e + 1]};
      starts.data[e + 1] += starts.data[e];
    }
    const int64_t used = starts.data[experts];
    for (int64_t i = 0; i < pairs; ++i) {
      place.data[i] = -1;
      if (chosen[i] < 0 || chosen[i] >= experts) continue;
      place.data[i] = starts.data[chosen[i]]++;
      pair_at.data[place.data[i]] = i;
    }

    const bool alone = is_small(used * (up.n * up.k + down.n * down.k), p.mode);
    const int64_t x_size = p.x_type == HB_FP32 ? 4 : 2;
    const auto source = [&](int64_t row) { return (const char*)p.x + (first + row) * p.x_stride * x_size; };
    parallel(own_rows ? used : rows, alone, [&](int64_t i) {
      const int64_t pair = own_rows ? pair_at.data[i] : i;
      Buffer<float> scratch(up_layout.units * 32);
      kernels.prepare(&up, own_rows ? chosen[pair] : 0, up_kind, source(own_rows ? pair / m.slots : i), p.x_type,
                      x.data + i * up_layout.bytes, scratch.data);
    });
    for (int64_t i = 0; i < used; ++i) {
      up_rows.data[i] = x.data + (own_rows ? i : pair_at.data[i] / m.slots) * up_layout.bytes;
      down_rows.data[i] = hidden.data + i * down_layout.bytes;
    }
    panels(up, groups.data, count, alone, [&](const Part& part) {
      const Group& g = *part.group;
      kernels.panels(&up, g.expert, up_kind, part.first, part.end, up_rows.data + g.first, g.count,
                     gate_up.data + g.first * up.n, HB_FP32, up.n);
    });
    parallel(used, alone, [&](int64_t i) {
      Buffer<float> scratch(2 * down_layout.units * 32);
      kernels.activate(&m, gate_up.data + i * up.n, width, scratch.data);
      kernels.prepare(&down, chosen[pair_at.data[i]], down_kind, scratch.data, HB_FP32,
                      hidden.data + i * down_layout.bytes, scratch.data + down_layout.units * 32);
    });
    panels(down, groups.data, count, alone, [&](const Part& part) {
      const Group& g = *part.group;
      kernels.panels(&down, g.expert, down_kind, part.first, part.end, down_rows.data + g.first, g.count,
                     out.data + g.first * down.n, HB_FP32, down.n);
    });
    for (int64_t i = 0; i < pairs; ++i)
      results.data[i] = place.data[i] < 0 ? nullptr : out.data + place.data[i] * down.n;
    const int64_t y_size = p.y_type == HB_FP32 ? 4 : 2;
    parallel(rows, alone, [&](int64_t row) {
      kernels.combine(results.data + row * m.slots, m.slot_weights + (first + row) * m.slots, m.slots, down.n,
                      (char*)p.y + (first + row) * p.y_stride * y_size, p.y_type);
    });
    return 0;
  }
};

}  // namespace
