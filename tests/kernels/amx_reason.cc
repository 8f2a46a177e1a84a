// Prints why this process does not use AMX, in a thread that blocks all signals. Fails if the handler of illegal instructions
// or the blocked signals differ afterwards, or if a signal of another thread during trials does not reach that handler.

#include <cstdio>

#include "machine.h"

static std::atomic<int> signals{0};
static void Handler(int) { ++signals; }

// Repeats the trial while another thread sends itself the signal.
static bool SignalsArrive() {
  std::atomic<bool> end{false};
  int sent = 0;
  signals = 0;
  std::thread other([&] {
    sigset_t illegal;
    sigemptyset(&illegal);
    sigaddset(&illegal, SIGILL);
    pthread_sigmask(SIG_UNBLOCK, &illegal, nullptr);
    for (; !end; ++sent) raise(SIGILL);
  });
#if LLM_JAX_AMX
  for (int i = 0; i < 2000; ++i) llm_jax::amx::Trial();
#endif
  end = true;
  other.join();
  return sent && signals == sent;
}

int main() {
  struct sigaction action {}, after {};
  action.sa_handler = Handler;
  sigaction(SIGILL, &action, nullptr);
  sigset_t blocked;
  sigfillset(&blocked);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  std::puts(llm_jax::AmxReason());
  const bool arrive = SignalsArrive();
  pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
  sigaction(SIGILL, nullptr, &after);
  return after.sa_handler != Handler || !sigismember(&blocked, SIGILL) || !arrive;
}
