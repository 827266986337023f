// The exported functions: the kernels of the instruction set that the caller names.
#include "kernels.h"

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define HB_X86 1
#endif

namespace {

// Subnormal numbers and rounding as IEEE 754 has them, whatever other libraries left in this thread.
struct StandardArithmetic {
#if HB_X86
  unsigned saved = _mm_getcsr();
  StandardArithmetic() { _mm_setcsr(0x1f80); }
  ~StandardArithmetic() { _mm_setcsr(saved); }
#elif defined(__aarch64__)
  uint64_t saved;
  StandardArithmetic() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved));
    __asm__ volatile("msr fpcr, %0" : : "r"((uint64_t)0));
  }
  ~StandardArithmetic() { __asm__ volatile("msr fpcr, %0" : : "r"(saved)); }
#endif
};

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

int hb_interface(void) { return 1000003 + (int)(sizeof(hb_codec) + sizeof(hb_task)); }

int hb_has_isa(int isa) {
  if (isa == HB_BASELINE) return 1;
#if HB_X86
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2");
  if (isa == HB_AVX2) return avx2;
  if (isa == HB_AVX512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return 0;
}

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
}
