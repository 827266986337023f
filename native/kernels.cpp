// Compiled once per instruction set; HB_NAME is the name of its table of kernels.
#include "kernels.h"

#include "affine.h"
#include "decode.h"
#include "descent.h"
#include "factor.h"
#include "gptq.h"
#include "hif4.h"
#include "rotate.h"
#include "row_feedback.h"
#include "wide.h"

namespace {

int amax(const void* x, int type, int64_t lead, int64_t count, float* out) {
  int bad = 0;
  for (int64_t i = 0; i < lead; ++i) {
    int32_t most = 0;
    if (type == HB_FP32) {
      const float* p = (const float*)x + i * count;
      I m[4] = {};
      int64_t k = 0;
      for (; k + 4 * W <= count; k += 4 * W)
        for (int j = 0; j < 4; ++j) m[j] = maximum(m[j], load<I>(p + k + j * W) & 0x7fffffff);
      m[0] = maximum(maximum(m[0], m[1]), maximum(m[2], m[3]));
      for (; k < count; k += W) m[0] = maximum(m[0], bits(load_row(p, type, k, count - k)) & 0x7fffffff);
      for (int l = 0; l < W; ++l) most = m[0][l] > most ? m[0][l] : most;
      bad |= most >= 0x7f800000;
      out[i] = floats(all(most))[0];
    } else {
      const uint16_t* p = (const uint16_t*)x + i * count;
      Shorts m[4] = {};
      int64_t k = 0;
      for (; k + 8 * W <= count; k += 8 * W)
        for (int j = 0; j < 4; ++j) {
          const Shorts v = load<Shorts>(p + k + j * 2 * W) & 0x7fff;
          m[j] = v > m[j] ? v : m[j];
        }
      for (int j = 0; j < 4; ++j)
        for (int l = 0; l < 2 * W; ++l) most = m[j][l] > most ? m[j][l] : most;
      for (; k < count; ++k) {
        const int32_t v = load<uint16_t>(p + k) & 0x7fff;
        most = v > most ? v : most;
      }
      bad |= most >= (type == HB_BF16 ? 0x7f80 : 0x7c00);
      out[i] = (type == HB_BF16 ? floats(all(most << 16)) : widen_half(all(most)))[0];
    }
  }
  return bad;
}

bool is_wide(const hb_codec& c) { return c.family == HB_BLOCK && (c.rows != 1 || c.columns < 0); }

bool is_known(const hb_codec& c) {
  if (c.bits != 4 && c.bits != 8) return false;
  if (is_wide(c))
    return c.bits == 8 && c.table_count == 1 && c.tables[0].kind == HB_E4M3 &&
           (c.rows == 1 || c.columns % 64 == 0 || c.rows < 0);
  return c.columns >= 16 && c.columns % 16 == 0 && c.columns <= LARGEST_BLOCK;
}

int encode(const hb_codec* codec, const hb_task* task) {
  if (!is_known(*codec)) return 2;
  if (is_wide(*codec)) return WideEncoder(*codec, *task).encode();
  if (codec->family == HB_BLOCK) return BlockEncoder(*codec, *task).encode();
  if (codec->family == HB_HIF4) return HiF4Encoder(*codec, *task).encode();
  return AffineEncoder(*codec, *task).encode();
}

int decode(const hb_codec* codec, const hb_task* task) {
  if (!is_known(*codec)) return 2;
  if (task->type == HB_BF16) {
    ToBF16 sink{(uint16_t*)task->x};
    Decoder<ToBF16>{*codec, *task, sink, nullptr}.decode();
  } else {
    ToFloats sink{(float*)task->x};
    Decoder<ToFloats>{*codec, *task, sink, nullptr}.decode();
  }
  return 0;
}

int compare(const hb_codec* codec, const hb_task* task) {
  if (!is_known(*codec)) return 2;
  ToStats sink(*task);
  Decoder<ToStats>{*codec, *task, sink, sink.stats.blocks}.decode();
  sink.finish();
  return any((I)(sink.worst >= 0x7f800000)) ? 1 : 0;
}

int gptq(const hb_codec* codec, const hb_gptq_task* task) {
  if (!is_known(*codec) || is_wide(*codec) || codec->family == HB_HIF4) return 2;
  return Gptq(*codec, *task).run();
}

bool has_columns(const hb_codec& c) { return is_known(c) && !is_wide(c) && c.family != HB_HIF4; }

int round_rows(const hb_codec* codec, const hb_rows_task* task) {
  return has_columns(*codec) ? RowGroup(*codec, *task).run() : 2;
}

int descend(const hb_codec* codec, const hb_descent_task* task) {
  return has_columns(*codec) ? Descent(*codec, *task).run() : 2;
}

int subtract_products(float* out, const float* left, const float* right, int64_t count, int64_t rows, int64_t k) {
  Products::subtract(out, left, right, count, rows, k);
  return 0;
}

int rotate(float* x, int64_t lead, int64_t rows, int64_t k, int size, float norm, const uint8_t* swaps, int steps,
           int inverse) {
  if (k % size) return 2;
  if (size == 16) Rotate<16>::all_matrices(x, lead, rows, k, norm, swaps, steps, inverse);
  else if (size == 32) Rotate<32>::all_matrices(x, lead, rows, k, norm, swaps, steps, inverse);
  else if (size == 64) Rotate<64>::all_matrices(x, lead, rows, k, norm, swaps, steps, inverse);
  else if (size == 128) Rotate<128>::all_matrices(x, lead, rows, k, norm, swaps, steps, inverse);
  else return 2;
  return 0;
}

int factor(int64_t count, int64_t k, double* m, double* inverse, double* gain) {
  if (k % Factor::P) return 2;
  const Factor f{k};
  for (int64_t i = 0; i < count; ++i) {
    if (!f.cholesky(m + i * k * k)) return 1;
    f.normalise(m + i * k * k, gain + i * k);
    f.invert(m + i * k * k, inverse + i * k * k);
  }
  return 0;
}

}  // namespace

extern "C" {
extern const hb_kernels HB_NAME;
const hb_kernels HB_NAME = {amax, encode, decode, compare, gptq, round_rows, descend,
                            subtract_products, rotate, factor};
}
