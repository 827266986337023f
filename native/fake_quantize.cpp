// The exported functions of fake quantization: the kernels of the instruction set that the caller names.
#include "fake_quantize.h"

#include "arithmetic.h"

namespace {

const hb_fake* kernels(int isa) {
  if (!hb_has_isa(isa)) return nullptr;
#if defined(__x86_64__) || defined(_M_X64)
  if (isa == HB_AVX512) return &hb_fake_avx512;
  if (isa == HB_AVX2) return &hb_fake_avx2;
#endif
  return &hb_fake_baseline;
}

}  // namespace

extern "C" {

int hb_fake_quantize_interface(void) { return 1 * 1000003 + (int)sizeof(hb_round_task); }

int hb_round_given(int isa, const hb_round_task* task) {
  const StandardArithmetic guard;
  const hb_fake* k = kernels(isa);
  return k ? k->round_given(task) : 2;
}
}
