// The exported functions: the kernels of the instruction set that the caller names.
#include "arithmetic.h"
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <cpuid.h>
#define HB_X86 1
#endif

namespace {

#if HB_X86
// The largest instruction set that the processor has and whose registers the operating system saves.
int find_isa() {
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return HB_BASELINE;
  unsigned saved, high;
  __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return HB_BASELINE;
  const unsigned avx2 = 1u << 5 | 1u << 8;                                   // AVX2, BMI2
  const unsigned avx512 = avx2 | 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
  if ((b & avx512) == avx512 && (saved & 0xe6) == 0xe6) return HB_AVX512;
  return (b & avx2) == avx2 && (saved & 0x6) == 0x6 ? HB_AVX2 : HB_BASELINE;
}
#else
int find_isa() { return HB_BASELINE; }
#endif

int largest_isa() {
  static int known = -1;
  int found = __atomic_load_n(&known, __ATOMIC_RELAXED);
  if (found < 0) {
    found = find_isa();
    __atomic_store_n(&known, found, __ATOMIC_RELAXED);
  }
  return found;
}

const hb_kernels* kernels(int isa) {
  if (!hb_has_isa(isa)) return nullptr;
#if HB_X86
  if (isa == HB_AVX512) return &hb_kernels_avx512;
  if (isa == HB_AVX2) return &hb_kernels_avx2;
#endif
  return &hb_kernels_baseline;
}

}  // namespace

extern "C" {

int hb_interface(void) { return 3 * 1000003 + (int)(sizeof(hb_codec) + sizeof(hb_task) + sizeof(hb_gptq_task)); }

int hb_has_isa(int isa) { return isa >= HB_BASELINE && isa <= largest_isa(); }

int hb_amax(int isa, const void* x, int type, int64_t lead, int64_t count, float* out) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->amax(x, type, lead, count, out) : 2;
}

int hb_encode(int isa, const hb_codec* codec, const hb_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->encode(codec, task) : 2;
}

int hb_decode(int isa, const hb_codec* codec, const hb_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->decode(codec, task) : 2;
}

int hb_compare(int isa, const hb_codec* codec, const hb_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->compare(codec, task) : 2;
}

int hb_gptq(int isa, const hb_codec* codec, const hb_gptq_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->gptq(codec, task) : 2;
}

int hb_round_rows(int isa, const hb_codec* codec, const hb_rows_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->round_rows(codec, task) : 2;
}

int hb_descend(int isa, const hb_codec* codec, const hb_descent_task* task) {
  const StandardArithmetic guard;
  const hb_kernels* k = kernels(isa);
  return k ? k->descend(codec, task) : 2;
}

int hb_subtract_products(int isa, float* out, const float* left, const float* right, int64_t count, int64_t rows,
                         int64_t k) {
  const StandardArithmetic guard;
  const hb_kernels* kernel = kernels(isa);
  return kernel ? kernel->subtract_products(out, left, right, count, rows, k) : 2;
}

int hb_rotate(int isa, float* x, int64_t lead, int64_t rows, int64_t k, int size, float norm, const uint8_t* swaps,
              int steps, int inverse) {
  const StandardArithmetic guard;
  const hb_kernels* kernel = kernels(isa);
  return kernel ? kernel->rotate(x, lead, rows, k, size, norm, swaps, steps, inverse) : 2;
}

int hb_factor(int isa, int64_t count, int64_t k, double* m, double* inverse, double* gain) {
  const StandardArithmetic guard;
  const hb_kernels* kernel = kernels(isa);
  return kernel ? kernel->factor(count, k, m, inverse, gain) : 2;
}
}
