// Activations made ready for products: rotated, as int8 with scales, or as BF16 pairs.
#pragma once
#include "gemm_bf16.h"
#include "gemm_exact.h"
#include "gemm_int8.h"

namespace {

enum { EXACT = 0, INTEGERS = 1, BF16_PAIRS = 2 };

HB_INLINE int64_t align64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

void widen_row(const void* x, int type, int64_t k, float* out) {
  const uint16_t* const h = (const uint16_t*)x;
  int64_t i = 0;
  if (type == HB_FP32) {
    memcpy(out, x, (size_t)k * 4);
    i = k;
  } else if (type == HB_BF16) {
    for (; i + W <= k; i += W) store(out + i, widen_bf16(h + i));
    for (; i < k; ++i) {
      const uint32_t word = (uint32_t)h[i] << 16;
      memcpy(out + i, &word, 4);
    }
  } else {
    for (; i + W <= k; i += W) store(out + i, widen(load<Halves>(h + i)));
    if (i < k) {
      Halves part = {};
      memcpy(&part, h + i, (size_t)(k - i) * 2);
      const F wide = widen(part);
      memcpy(out + i, &wide, (size_t)(k - i) * 4);
    }
  }
  for (i = k; i % 32; ++i) out[i] = 0;
}

void rotate_row(const hb_weight& w, int64_t lead, float* x) {
  const uint8_t* const swaps = w.swaps ? w.swaps + lead * (w.k / w.rotation) * w.swap_steps : nullptr;
  const auto go = [&](auto rotate) { rotate.all_matrices(x, 1, 1, w.k, w.norm, swaps, w.swap_steps, 0); };
  if (w.rotation == 16) go(Rotate<16>{});
  else if (w.rotation == 32) go(Rotate<32>{});
  else if (w.rotation == 64) go(Rotate<64>{});
  else go(Rotate<128>{});
}

HB_INLINE float sum_of(F v) {
  float sum = 0;
  for (int l = 0; l < W; ++l) sum += v[l];
  return sum;
}

// int8 per 32 columns. A row with a NaN or an infinity has NaN for the scale of these columns.
void quantize_row(const hb_weight& w, const hb_row_layout& layout, const float* x, char* row) {
  const int bias = Int8::bias(w);
  float* const scales = (float*)(row + layout.scales);
  int32_t* const counts = (int32_t*)(row + layout.counts);
  float* const sums = (float*)(row + layout.sums);
  for (int64_t u = 0; u < layout.units; ++u, x += 32) {
    I most = {};
    for (int i = 0; i < 32; i += W) most = maximum(most, load<I>(x + i) & 0x7fffffff);
    int32_t largest = 0;
    for (int l = 0; l < W; ++l) largest = most[l] > largest ? most[l] : largest;
    const float amax = load<float>(&largest);
    // numbers so small that 127 / amax would overflow count as zeros
    const bool live = amax > 0x1p-100f && largest < 0x7f800000;
    const F inverse = all(live ? 127.0f / amax : 0.0f);
    scales[u] = largest >= 0x7f800000 ? __builtin_nanf("") : live ? amax / 127.0f : 0.0f;
    for (int g = 0; g < 2; ++g) {
      I sum = {};
      for (int i = 16 * g; i < 16 * g + 16; i += W) {
        const F v = live ? load<F>(x + i) * inverse : F{};
        const I q = to_int(rint_small(v));
        sum += q;
        store(row + u * 32 + i, __builtin_convertvector(q, SignedRowBytes));
      }
      int32_t total = 0;
      for (int l = 0; l < W; ++l) total += sum[l];
      counts[2 * u + g] = -bias * total;
      sums[2 * u + g] = (float)total * scales[u];
    }
  }
}

void sum_row(const hb_row_layout& layout, const float* x, float* sums) {
  for (int64_t g = 0; g < 2 * layout.units; ++g) {
    F sum = {};
    for (int i = 0; i < 16; i += W) sum += load<F>(x + 16 * g + i);
    sums[g] = sum_of(sum);
  }
}

int arithmetic_of(const hb_weight* w, int mode, int x_type) {
  const bool integers = w->code_kind != HB_CODE_E4M3 && w->code_kind != HB_CODE_FLOAT;
  if (mode == HB_INT8 && integers) return INTEGERS;
#if defined(__AVX512BF16__)
  if (x_type == HB_BF16 && w->code_kind == HB_CODE_TABLE && w->table_count <= 2 && !w->rotation) return BF16_PAIRS;
#endif
  (void)x_type;
  return EXACT;
}

void layout_of(const hb_weight* w, int arithmetic, hb_row_layout* layout) {
  const int64_t units = units_of(*w), size = arithmetic == INTEGERS ? 1 : arithmetic == BF16_PAIRS ? 2 : 4;
  layout->units = units;
  layout->scales = align64(units * 32 * size);
  layout->counts = layout->scales + align64(units * 4);
  layout->sums = layout->counts + align64(units * 8);
  layout->bytes = layout->sums + align64(units * 8);
}

void prepare(const hb_weight* w, int64_t lead, int arithmetic, const void* x, int type, void* row, float* scratch) {
  hb_row_layout layout;
  layout_of(w, arithmetic, &layout);
  float* const wide = arithmetic == EXACT ? (float*)row : scratch;
  if (arithmetic != BF16_PAIRS || w->offset_kind) widen_row(x, type, w->k, wide);
  if (w->rotation) rotate_row(*w, lead, wide);
  if (arithmetic == INTEGERS) return quantize_row(*w, layout, wide, (char*)row);
  if (arithmetic == BF16_PAIRS) {
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    const uint16_t* const from = (const uint16_t*)x;
    uint16_t* const to = (uint16_t*)row;
    for (int64_t k = 0; k < layout.units * 32; k += 8)
      for (int i = 0; i < 8; ++i) to[k + i] = k + order[i] < w->k ? from[k + order[i]] : 0;
  }
  if (w->offset_kind) sum_row(layout, wide, (float*)((char*)row + layout.sums));
}

}  // namespace
