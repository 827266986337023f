// Memory and threads of one call.
#pragma once
#include <stdlib.h>
#if defined(_WIN32)
#include <malloc.h>
#endif

#include "linear_kernels.h"
#include "pool.h"

namespace {

constexpr int64_t LARGEST_WORKSPACE = 128 << 20;  // bytes of intermediate results of a mixture of experts

template <class T>
struct Buffer {
  T* data;

  explicit Buffer(int64_t count) {
    const size_t bytes = ((size_t)(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
#if defined(_WIN32)
    data = (T*)_aligned_malloc(bytes, 64);
#else
    data = (T*)aligned_alloc(64, bytes);
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() {
#if defined(_WIN32)
    _aligned_free(data);
#else
    free(data);
#endif
  }
};

// Whether waking threads would cost more than they save; multiplications in FP32 take longer than those of integers.
inline bool is_small(int64_t multiplications, int mode) {
  return multiplications < (mode == HB_INT8 ? 1500000 : 700000);
}

template <class Run>
void parallel(int64_t tasks, bool alone, const Run& run) {
  if (alone) {
    for (int64_t i = 0; i < tasks; ++i) run(i);
    return;
  }
  pool.run(tasks, [](void* context, int64_t index) { (*(const Run*)context)(index); }, (void*)&run);
}

}  // namespace
