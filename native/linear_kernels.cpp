// Products with quantized weights, compiled once per instruction set; HB_NAME is the name of its table of kernels.
#include "gemm_dense.h"

namespace {

// Writes 16 rows of results of up to TOKENS rows of activations.
void write_sums(const hb_weight& w, int64_t lead, int64_t panel, float unit, const float (*sums)[16], int64_t count,
                void* y, int y_type, int64_t stride) {
  const int64_t first = panel * 16, rows = w.n - first < 16 ? w.n - first : 16;
  const float global = w.global_scale ? w.global_scale[lead] : 1.0f;
  const float factor = !w.global_scale ? unit : w.divide ? unit / global : unit * global;
  const float* const bias = w.row_bias ? w.row_bias + lead * w.n + first : nullptr;
  for (int64_t t = 0; t < count; ++t)
    for (int64_t r = 0; r < rows; ++r)
      put(y, y_type, t * stride + first + r, sums[t][r] * factor + (bias ? bias[r] : 0.0f));
}

void add_offsets(const hb_weight& w, const float* offsets, const hb_row_layout& layout, const void* const* rows,
                 int count, int64_t unit, int units, float (*sums)[16]) {
  const int s = scales_per_unit(w);
  for (int t = 0; t < count; ++t) {
    const float* const x = (const float*)((const char*)rows[t] + layout.sums) + 2 * unit;
    for (int r = 0; r < R; ++r) {
      F total = load<F>(sums[t] + r * W);
      for (int i = 0; i < units * 2; ++i)
        total = fma(load<F>(offsets + (i * s / 2) * 16 + r * W), all(x[i]), total);
      store(sums[t] + r * W, total);
    }
  }
}

template <class Kind>
void panels_of_kind(const hb_weight& w, int64_t lead, const hb_row_layout& layout, float unit_of_sum, float unit,
                    int64_t first, int64_t end, const void* const* rows, int64_t count, void* y, int y_type,
                    int64_t stride) {
  alignas(64) float scales[Kind::CHUNK * 32], offsets[Kind::CHUNK * 32], sums[TOKENS][16];
  const int64_t y_size = y_type == HB_FP32 ? 4 : 2;
  // some rows of activations after the other, since these fit into a cache and all of them may not
  for (int64_t t = 0; t < count; t += TOKENS) {
    const int tokens = count - t < TOKENS ? (int)(count - t) : TOKENS;
    for (int64_t panel = first; panel < end; ++panel) {
      const Panel p(w, lead, panel);
      memset(sums, 0, (size_t)tokens * 64);
      for (int64_t unit_at = 0; unit_at < layout.units; unit_at += Kind::CHUNK) {
        const int64_t rest = layout.units - unit_at;
        const int units = rest < Kind::CHUNK ? (int)rest : Kind::CHUNK;
        decode_scales(w, p, unit_at, units, scales);
        Kind::add(w, p, scales, layout, rows + t, tokens, unit_at, units, sums);
        if (!w.offset_kind) continue;
        decode_offsets(w, p, unit_at, units, scales, unit_of_sum, offsets);
        add_offsets(w, offsets, layout, rows + t, tokens, unit_at, units, sums);
      }
      write_sums(w, lead, panel, unit, sums, tokens, (char*)y + t * stride * y_size, y_type, stride);
    }
  }
}

void panels(const hb_weight* w, int64_t lead, int arithmetic, int64_t first, int64_t end, const void* const* rows,
            int64_t count, void* y, int y_type, int64_t stride) {
  hb_row_layout layout;
  layout_of(w, arithmetic, &layout);
  const float unit = scale_unit(*w) * (has_steps(*w) ? 1.0f : w->steps[0]);
  if (arithmetic == INTEGERS)
    return panels_of_kind<Int8>(*w, lead, layout, 1.0f, unit, first, end, rows, count, y, y_type, stride);
#if defined(__AVX512BF16__)
  if (arithmetic == BF16_PAIRS)
    return panels_of_kind<Bf16>(*w, lead, layout, 1.0f, unit, first, end, rows, count, y, y_type, stride);
#endif
  // integers become FP32 in the upper byte of a word
  const bool high = w->code_kind != HB_CODE_E4M3 && w->code_kind != HB_CODE_FLOAT;
  panels_of_kind<Exact>(*w, lead, layout, high ? 0x1p24f : 1.0f, high ? unit * 0x1p-24f : unit, first, end, rows, count,
                        y, y_type, stride);
}

#if defined(__AVX512BF16__)
constexpr int DENSE_BF16 = 1;
#else
constexpr int DENSE_BF16 = 0;
#endif

}  // namespace

extern "C" {
extern const hb_linear_kernels HB_NAME;
const hb_linear_kernels HB_NAME = {arithmetic_of, layout_of, prepare, panels, DENSE_BF16, dense, activate, combine};
}
