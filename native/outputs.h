// What comes after products: results in their type, activation functions, sums over experts.
#pragma once
#include "activations.h"

namespace {

HB_INLINE uint16_t narrow_bf16(float v) {
  const uint32_t u = load<uint32_t>(&v);
  if ((u & 0x7fffffff) > 0x7f800000) return (uint16_t)(u >> 16 | 0x40);
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

HB_INLINE uint16_t narrow_fp16(float v) {
  uint32_t u = load<uint32_t>(&v);
  const uint16_t sign = (uint16_t)(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u > 0x7f800000) return sign | 0x7e00;
  if (u >= 0x477ff000) return sign | 0x7c00;
  if (u < 0x38800000) {  // subnormal: the sum has its last bit where FP16 has it
    const float small = load<float>(&u) + 0.5f;
    return (uint16_t)(sign | (load<uint32_t>(&small) - 0x3f000000));
  }
  return (uint16_t)(sign | ((u - 0x38000000 + 0xfff + ((u >> 13) & 1)) >> 13));
}

HB_INLINE void put(void* y, int type, int64_t at, float v) {
  if (type == HB_FP32) ((float*)y)[at] = v;
  else ((uint16_t*)y)[at] = type == HB_BF16 ? narrow_bf16(v) : narrow_fp16(v);
}

HB_INLINE F exponential(F x) {
  x = clip(x, -87.0f, 88.0f);
  const F n = rint_small(x * all(1.44269504f));
  const F r = fma(n, all(2.12194440e-4f), fma(n, all(-0.693359375f), x));
  F p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r) + all(1.0f);
  return p * floats((to_int(n) + 127) << 23);
}

HB_INLINE F gated(const hb_mixture& m, F gate, F up) {
  switch (m.activation) {
    case HB_SILU: return gate / (all(1.0f) + exponential(-gate)) * up;
    case HB_GELU_TANH: {
      // x / (1 + exp(-2z)) is x (1 + tanh z) / 2
      const F z = gate * fma(gate * gate, all(0.044715f), all(1.0f)) * all(1.59576912160573f);
      return gate / (all(1.0f) + exponential(-z)) * up;
    }
    case HB_CLAMPED_SWIGLU: {
      // comparisons that keep a NaN
      gate = select((I)(gate > all(m.limit)), all(m.limit), gate);
      up = select((I)(up > all(m.limit)), all(m.limit), select((I)(up < all(-m.limit)), all(-m.limit), up));
      return gate / (all(1.0f) + exponential(-gate * all(m.alpha))) * (up + all(1.0f));
    }
    case HB_RELU2: {
      const F positive = select((I)(gate < F{}), F{}, gate);
      return positive * positive * up;
    }
    default: return gate * up;
  }
}

void activate(const hb_mixture* m, const float* gate_up, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += W) {
    const int lanes = width - i < W ? (int)(width - i) : W;
    F gate = {}, up = all(1.0f);
    if (lanes == W && !m->interleaved) {
      gate = load<F>(gate_up + i);
      if (m->gated) up = load<F>(gate_up + width + i);
    } else {
      for (int l = 0; l < lanes; ++l) {
        gate[l] = gate_up[m->interleaved ? 2 * (i + l) : i + l];
        if (m->gated) up[l] = gate_up[m->interleaved ? 2 * (i + l) + 1 : width + i + l];
      }
    }
    const F value = gated(*m, gate, up);
    memcpy(out + i, &value, (size_t)lanes * 4);
  }
}

void combine(const float* const* rows, const float* weights, int64_t count, int64_t n, void* y, int y_type) {
  for (int64_t i = 0; i < n; i += W) {
    const int lanes = n - i < W ? (int)(n - i) : W;
    F sum = {};
    for (int64_t j = 0; j < count; ++j) {
      if (!rows[j]) continue;
      F v = {};
      if (lanes == W) v = load<F>(rows[j] + i);
      else memcpy(&v, rows[j] + i, (size_t)lanes * 4);
      sum = fma(v, all(weights[j]), sum);
    }
    for (int l = 0; l < lanes; ++l) put(y, y_type, i + l, sum[l]);
  }
}

}  // namespace
