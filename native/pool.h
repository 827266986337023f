// Threads that stay: each call hands them numbered tasks; a call during another's work does its own alone.
#pragma once
#include <stdint.h>
#if !defined(_WIN32)
#include <pthread.h>
#include <sched.h>
#include <time.h>
#endif

#include "arithmetic.h"

namespace {

typedef void (*Task)(void* context, int64_t index);

#if defined(_WIN32)

struct Pool {
  int threads = 1;
  void set_threads(int) {}
  void run(int64_t count, Task task, void* context) {
    for (int64_t i = 0; i < count; ++i) task(context, i);
  }
};

#else

// A job is open while its number is in `open`. Workers say that they are inside before they look at it, and callers
// close it before they look who is inside; so a worker never touches a job whose caller has gone.
struct Pool {
  static constexpr int LARGEST = 256;
  static constexpr int64_t SPIN = 20000;  // nanoseconds

  pthread_mutex_t busy = PTHREAD_MUTEX_INITIALIZER;  // one job at a time
  pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t wake = PTHREAD_COND_INITIALIZER;
  int threads = 1, started = 0;
  uint64_t jobs = 0, open = 0;
  int inside = 0, sleeping = 0;
  int64_t next = 0, count = 0;
  int places = 0;  // workers that the job may still take
  Task task = nullptr;
  void* context = nullptr;

  template <class T>
  static T get(const T& v) {
    return __atomic_load_n(&v, __ATOMIC_SEQ_CST);
  }
  template <class T>
  static void set(T& v, T value) {
    __atomic_store_n(&v, value, __ATOMIC_SEQ_CST);
  }
  template <class T>
  static T add(T& v, T value) {
    return __atomic_fetch_add(&v, value, __ATOMIC_SEQ_CST);
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
  }

  static int64_t now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
  }

  void work() {
    for (;;) {
      const int64_t i = add(next, (int64_t)1);
      if (i >= get(count)) return;
      task(context, i);
    }
  }

  bool is_new(uint64_t seen) {
    const uint64_t job = get(open);
    return job != 0 && job != seen;
  }

  void wait(uint64_t seen) {
    const int64_t until = now() + SPIN;
    do {
      for (int i = 0; i < 64; ++i) {
        if (is_new(seen)) return;
        pause();
      }
    } while (now() < until);
    pthread_mutex_lock(&lock);
    add(sleeping, 1);
    while (!is_new(seen)) pthread_cond_wait(&wake, &lock);
    add(sleeping, -1);
    pthread_mutex_unlock(&lock);
  }

  static void* serve(void* self) {
    const StandardArithmetic arithmetic;
    Pool& pool = *(Pool*)self;
    uint64_t seen = 0;
    for (;;) {
      pool.wait(seen);
      add(pool.inside, 1);
      const uint64_t job = get(pool.open);
      if (job != 0 && job != seen) {
        seen = job;
        if (add(pool.places, -1) > 0) pool.work();
      }
      add(pool.inside, -1);
    }
    return nullptr;
  }

  void start_workers() {
    while (started < threads - 1) {
      pthread_t worker;
      if (pthread_create(&worker, nullptr, serve, this) != 0) return;
      pthread_detach(worker);
      ++started;
    }
  }

  void set_threads(int wanted) { set(threads, wanted < 1 ? 1 : wanted > LARGEST ? LARGEST : wanted); }

  void run(int64_t tasks, Task what, void* with) {
    const int most = get(threads);
    if (most <= 1 || tasks <= 1 || pthread_mutex_trylock(&busy) != 0) {
      for (int64_t i = 0; i < tasks; ++i) what(with, i);
      return;
    }
    start_workers();
    task = what;
    context = with;
    set(next, (int64_t)0);
    set(count, tasks);
    set(places, most - 1);
    set(open, ++jobs);
    if (get(sleeping) > 0) {
      pthread_mutex_lock(&lock);
      pthread_cond_broadcast(&wake);
      pthread_mutex_unlock(&lock);
    }
    work();
    set(open, (uint64_t)0);
    for (int64_t i = 0; get(inside) != 0; ++i) {
      if (i < 1000) pause();
      else sched_yield();
    }
    pthread_mutex_unlock(&busy);
  }

  // A child of fork() has none of the threads, and whatever the locks were when it began.
  void forget() {
    busy = PTHREAD_MUTEX_INITIALIZER;
    lock = PTHREAD_MUTEX_INITIALIZER;
    wake = PTHREAD_COND_INITIALIZER;
    started = inside = sleeping = 0;
    open = 0;
  }
};

#endif

Pool pool;

#if !defined(_WIN32)
void forget_threads() { pool.forget(); }
__attribute__((constructor)) void watch_forks() { pthread_atfork(nullptr, nullptr, forget_threads); }
#endif

}  // namespace
