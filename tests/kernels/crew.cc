// `InParallel` of machine.h with parts that wait for each other, with several callers, and in a child of `fork`.

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

#include "machine.h"

using llm_jax::InParallel;

[[noreturn]] static void Fail(const char* message) {
  std::fprintf(stderr, "%s\n", message);
  std::_Exit(1);
}

static std::mutex mutex;
static std::vector<std::thread> started;

template <typename Task>
static void Schedule(Task task) {
  std::lock_guard<std::mutex> lock(mutex);
  started.emplace_back(std::move(task));
}

// Every part waits until all threads have one, so that a lost offer is never answered.
static void Meet(int64_t threads) {
  const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  std::atomic<int64_t> arrived{0};
  const auto work = [&](int64_t) {
    ++arrived;
    while (arrived < threads) {
      if (std::chrono::steady_clock::now() > end) Fail("a thread does not take its part");
      std::this_thread::yield();
    }
  };
  InParallel(threads, threads, true, work, [](const auto& task) { Schedule(task); });
}

// Calls by several threads at once: each part runs once, before its call returns.
static void Call(int64_t parts) {
  std::vector<int64_t> runs(parts);
  InParallel(parts, 3, parts % 2, [&](int64_t i) { ++runs[i]; }, [](const auto& task) { Schedule(task); });
  for (int64_t count : runs) {
    if (count != 1) Fail("a part does not run once");
  }
}

// A child of `fork` has none of the threads, and must not wait for a lock that one of them holds.
static void Fork() {
#if !defined(__SANITIZE_THREAD__)  // which does not support new threads in a child
  std::atomic<bool> end{false};
  std::vector<std::thread> callers;
  for (int64_t i = 0; i < 2; ++i) {
    callers.emplace_back([&end] {
      while (!end) InParallel(3, 3, true, [](int64_t) {}, [](const auto& task) { std::thread(task).detach(); });
    });
  }
  for (int i = 0; i < 100; ++i) {
    const pid_t child = fork();
    if (!child) {
      alarm(30);
      int64_t parts = 0;
      InParallel(3, 3, false, [&](int64_t) { ++parts; }, [](const auto&) {});
      _exit(parts != 3);
    }
    int status = 1;
    if (waitpid(child, &status, 0) != child || status) Fail("a child of fork does not compute");
  }
  end = true;
  for (std::thread& caller : callers) caller.join();
#endif
}

int main() {
  constexpr int64_t kThreads = 3, kCalls = 200;
  for (int64_t i = 0; i < kCalls; ++i) Meet(kThreads);
  if (started.size() >= kCalls * (kThreads - 1)) Fail("no thread waits for the next call");
  std::vector<std::thread> callers;
  for (int64_t i = 0; i < 4; ++i) {
    callers.emplace_back([] {
      for (int64_t parts = 0; parts < kCalls; ++parts) Call(parts);
    });
  }
  for (std::thread& caller : callers) caller.join();
  Fork();
  for (std::thread& thread : started) thread.join();
}
