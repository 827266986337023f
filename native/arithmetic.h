// Subnormal numbers and rounding as IEEE 754 has them, whatever other libraries left in this thread.
#pragma once
#include <stdint.h>
#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#endif

namespace {

struct StandardArithmetic {
#if defined(__x86_64__) || defined(_M_X64)
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

}  // namespace
