// Prints why this process does not use AMX, and fails if the handler of illegal instructions is another one afterwards.

#include <cstdio>

#include "machine.h"

static void Handler(int) {}

int main() {
  struct sigaction action {}, after {};
  action.sa_handler = Handler;
  sigaction(SIGILL, &action, nullptr);
  std::puts(llm_jax::AmxReason());
  sigaction(SIGILL, nullptr, &after);
  return after.sa_handler != Handler;
}
