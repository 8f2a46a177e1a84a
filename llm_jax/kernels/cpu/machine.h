// The instruction sets of the CPU, and work on several threads.

#ifndef LLM_JAX_KERNELS_CPU_MACHINE_H_
#define LLM_JAX_KERNELS_CPU_MACHINE_H_

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define LLM_JAX_X86 1
#elif defined(__aarch64__)
#include <arm_neon.h>
#define LLM_JAX_ARM 1
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#endif

#define LLM_JAX_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define LLM_JAX_TARGET(names) \
  LLM_JAX_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define LLM_JAX_END_TARGET LLM_JAX_PRAGMA(clang attribute pop)
#define LLM_JAX_DOT_PRODUCTS "dotprod"
#else
#define LLM_JAX_TARGET(names) LLM_JAX_PRAGMA(GCC push_options) LLM_JAX_PRAGMA(GCC target(names))
#define LLM_JAX_END_TARGET LLM_JAX_PRAGMA(GCC pop_options)
#define LLM_JAX_DOT_PRODUCTS "arch=armv8.2-a+dotprod"
#endif

#include "cpu_features.h"

#include "amx.h"

namespace llm_jax {

// "Portable" is what the compiler makes of plain C++: on ARM with NEON, which each 64-bit CPU has.
enum Path : int64_t { kAuto = 0, kPortable = 1, kAvx2 = 2, kAvx512 = 3, kVnni = 4, kAmx = 5, kNeonDot = 6 };

#if LLM_JAX_X86
static inline Path PathOf(const Features& f) {
  return HasVnni(f) ? kVnni : HasAvx512(f) ? kAvx512 : HasAvx2(f) ? kAvx2 : kPortable;
}
#endif

// The fastest path of this CPU, but not kAmx, whose instructions `AmxReason` tries.
static inline Path PathWithoutAmx() {
#if LLM_JAX_X86
  return PathOf(FeaturesOfCpu());
#elif LLM_JAX_ARM && defined(__linux__)
  constexpr unsigned long kDotProducts = 1 << 20;  // HWCAP_ASIMDDP
  return getauxval(AT_HWCAP) & kDotProducts ? kNeonDot : kPortable;
#elif LLM_JAX_ARM && defined(__APPLE__)
  return kNeonDot;  // each of their CPUs has it
#else
  return kPortable;
#endif
}

// Whether this CPU has the instructions of a path.
static inline bool HasPath(Path path) {
  const Path fastest = PathWithoutAmx();
  if (path == kAmx) return fastest == kVnni && !*AmxReason();
  return path == kAuto || path == kPortable || path == fastest || (path < fastest && fastest < kNeonDot);
}

// The path that `llm_jax_use_path` has chosen; kAuto: the fastest.
LLM_JAX_HIDDEN inline std::atomic<int64_t>& ChosenPath() {
  static std::atomic<int64_t> path{kAuto};
  return path;
}

// AMX is not tried where another path is chosen.
LLM_JAX_HIDDEN inline Path FastestPath() {
  const int64_t chosen = ChosenPath().load(std::memory_order_relaxed);
  if (chosen != kAuto) return static_cast<Path>(chosen);
  static const Path detected = HasPath(kAmx) ? kAmx : PathWithoutAmx();
  return detected;
}

#if LLM_JAX_X86
// Masks of the first `count` of 16 or 64 numbers; none below 0.
static inline __mmask16 First16(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

static inline __mmask64 First64(int64_t count) { return count >= 64 ? ~0ull : count <= 0 ? 0 : (1ull << count) - 1; }
#endif

static inline void Pause() {
#if LLM_JAX_X86
  _mm_pause();
#else
  std::this_thread::yield();
#endif
}

// Threads that wait a short time for the next task. Decoding calls a product every few microseconds, and to wake a thread
// of the pool takes about as long as such a product.
class LLM_JAX_HIDDEN Crew {
 public:
  static Crew& Get() {
    Crew* crew = Current().load(std::memory_order_acquire);
    if (crew) return *crew;
    Crew* created = new Crew;  // never destroyed: threads may still wait when the process ends
    if (!Current().compare_exchange_strong(crew, created)) {
      delete created;
      return *crew;
    }
    // A child of `fork` has none of the waiting threads, one of which may have held the lock.
    pthread_atfork(nullptr, nullptr, [] { Current() = new Crew; });
    return *created;
  }

  // Offers a task to up to `wanted` waiting threads; returns their number. An earlier offer ends.
  int64_t Offer(const std::function<void()>& task, int64_t wanted) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t count = std::min(waiting_, wanted);
    task_ = task;
    offers_.store(count, std::memory_order_release);
    return count;
  }

  // Waits for tasks and runs them, until there is none for `kPatience`.
  void Wait() {
    constexpr auto kPatience = std::chrono::microseconds(200), kEager = std::chrono::microseconds(20);
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      ++waiting_;
      lock.unlock();
      const auto start = std::chrono::steady_clock::now();
      for (auto waited = start - start; waited < kPatience && !offers_.load(std::memory_order_acquire);
           waited = std::chrono::steady_clock::now() - start) {
        if (waited < kEager) Pause(); else std::this_thread::yield();
      }
      lock.lock();
      --waiting_;
      const int64_t offers = offers_.load(std::memory_order_relaxed);
      if (!offers) return;
      offers_.store(offers - 1, std::memory_order_relaxed);
      const std::function<void()> task = task_;
      lock.unlock();
      task();
      lock.lock();
    }
  }

 private:
  static std::atomic<Crew*>& Current() {
    static std::atomic<Crew*> crew{nullptr};
    return crew;
  }

  std::mutex mutex_;
  int64_t waiting_ = 0;
  std::function<void()> task_;
  std::atomic<int64_t> offers_{0};  // threads that may still take the task
};

// Calls work(0) ... work(count - 1) by this thread and up to `threads` - 1 others: those of the crew, and as many as are
// missing, which `schedule` starts. A task that starts late finds nothing left, so that the caller never waits for a thread
// that is busy with other work. If `again`, the threads that were started join the crew afterwards: the next call is expected
// at once, and XLA, whose threads they are, has no other work for them until then.
template <typename Work, typename Schedule>
static void InParallel(int64_t count, int64_t threads, bool again, const Work& work, const Schedule& schedule) {
  if (count <= 1 || threads <= 1) {
    for (int64_t i = 0; i < count; ++i) work(i);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const Work* borrowed = &work;  // used only for a part that the caller waits for
  auto take = [state, borrowed, count] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      (*borrowed)(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t others = std::min(count, threads) - 1;
  for (int64_t i = Crew::Get().Offer(take, others); i < others; ++i) {
    schedule([take, again] {
      take();
      if (again) Crew::Get().Wait();
    });
  }
  take();
  for (int64_t spins = 0; state->done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins > 1024) std::this_thread::yield(); else Pause();
  }
}

// Calls run(schedule), where `schedule` starts a new thread for a task, and waits for these threads. For tests.
template <typename Run>
static void OnNewThreads(const Run& run) {
  std::vector<std::thread> started;
  run([&](const auto& task) { started.emplace_back([task] { task(); }); });
  for (std::thread& thread : started) thread.join();
}

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_MACHINE_H_
