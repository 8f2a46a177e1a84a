// Prints why this process does not use AMX, in a thread that blocks all signals. Fails if the handler of illegal instructions
// or the blocked signals differ afterwards.

#include <cstdio>

#include "machine.h"

static void Handler(int) {}

int main() {
  struct sigaction action {}, after {};
  action.sa_handler = Handler;
  sigaction(SIGILL, &action, nullptr);
  sigset_t blocked;
  sigfillset(&blocked);
  pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  std::puts(llm_jax::AmxReason());
  pthread_sigmask(SIG_BLOCK, nullptr, &blocked);
  sigaction(SIGILL, nullptr, &after);
  return after.sa_handler != Handler || !sigismember(&blocked, SIGILL);
}
