// AMX: whether this process may use its instructions, and the shapes of its tiles. Included by machine.h.
//
// LLM_JAX_AMX_MODEL names a header that computes the instructions in software, for tests; with LLM_JAX_AMX_ASSUMED, only the
// trial of the instructions decides.

#ifndef LLM_JAX_KERNELS_CPU_AMX_H_
#define LLM_JAX_KERNELS_CPU_AMX_H_

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && __has_include(<amxtileintrin.h>)
#define LLM_JAX_AMX 1
#include <immintrin.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>
#ifdef LLM_JAX_AMX_MODEL
#include LLM_JAX_AMX_MODEL
#endif
#define LLM_JAX_AMX_TARGET "amx-tile,amx-int8,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c"
#endif

// For functions with static variables: each library of kernels in a process has its own.
#define LLM_JAX_HIDDEN __attribute__((visibility("hidden")))

namespace llm_jax {

#if LLM_JAX_AMX
LLM_JAX_TARGET(LLM_JAX_AMX_TARGET)
namespace amx {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// The operand of `ldtilecfg`.
struct TileShapes {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];  // of a row of each tile
  uint8_t rows[16];
};

// Tiles 0 to 3 are sums of 2 x 2 blocks: two of rows with `rows0` and `rows1` rows, two of 16 outputs; 4 and 5 are the two
// blocks of rows with `bytes` of the contracted axis, 6 and 7 the weights of the outputs.
static inline TileShapes ShapesOf(int64_t rows0, int64_t rows1, int64_t bytes) {
  TileShapes s{};
  s.palette = 1;
  const int64_t rows[8] = {rows0, rows0, rows1, rows1, rows0, rows1, bytes / 4, bytes / 4};
  for (int i = 0; i < 8; ++i) {
    s.rows[i] = static_cast<uint8_t>(rows[i]);
    s.bytes[i] = static_cast<uint16_t>(rows[i] == 0 ? 0 : i == 4 || i == 5 ? bytes : kTileBytes);
  }
  return s;
}

// Makes the compiler complete all stores to memory and repeat all loads: its tile intrinsics do not declare their accesses.
static inline void ClobberMemory(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

static inline void LoadShapes(const TileShapes& shapes) {
  ClobberMemory(&shapes);
  _tile_loadconfig(&shapes);
}

// Restores the shapes of the caller's tiles at the end.
class Tiles {
 public:
  Tiles() {
    ClobberMemory(&previous_);
    _tile_storeconfig(&previous_);
    ClobberMemory(&previous_);
  }
  ~Tiles() {
    if (previous_.palette) LoadShapes(previous_); else _tile_release();
  }

 private:
  alignas(64) TileShapes previous_{};
};

// The state of `Trial` that its signal handler reads.
struct TrialState {
  sigjmp_buf start;
  struct sigaction previous;
  volatile long thread;
};

LLM_JAX_HIDDEN inline TrialState& StateOfTrial() {
  static TrialState state;
  return state;
}

// Ends the trial if its thread has executed an illegal instruction; other signals are for the previous handler.
inline void OnIllegalInstruction(int signal, siginfo_t* info, void* context) {
  TrialState& state = StateOfTrial();
  const bool executed = info->si_code > 0;  // else another process or thread has sent the signal
  if (executed && syscall(SYS_gettid) == state.thread) siglongjmp(state.start, 1);
  const struct sigaction& previous = state.previous;
  if (previous.sa_flags & SA_SIGINFO) return previous.sa_sigaction(signal, info, context);
  if (previous.sa_handler == SIG_IGN && !executed) return;
  if (previous.sa_handler != SIG_IGN && previous.sa_handler != SIG_DFL) return previous.sa_handler(signal);
  struct sigaction end {};  // Linux ends a process that ignores an instruction that it cannot execute
  end.sa_handler = SIG_DFL;
  sigaction(signal, &end, nullptr);
  raise(signal);  // delivered when this handler returns
}

// Whether the instructions give right sums. Some virtual machines announce instructions that are illegal there. One thread
// at a time may call it.
inline bool Trial() {
  TrialState& state = StateOfTrial();
  state.thread = syscall(SYS_gettid);
  if (sigaction(SIGILL, nullptr, &state.previous)) return false;
  struct sigaction action {};
  action.sa_sigaction = OnIllegalInstruction;
  action.sa_flags = SA_SIGINFO | (state.previous.sa_flags & SA_ONSTACK);
  action.sa_mask = state.previous.sa_mask;
  if (sigaction(SIGILL, &action, nullptr)) return false;
  sigset_t illegal, mask;  // a thread that blocks the signal would end the process
  sigemptyset(&illegal);
  sigaddset(&illegal, SIGILL);
  pthread_sigmask(SIG_UNBLOCK, &illegal, &mask);
  volatile bool right = false;
  if (!sigsetjmp(state.start, 1)) {
    alignas(64) int8_t a[1024];
    alignas(64) uint8_t b[1024];
    alignas(64) uint16_t ones[512];
    alignas(64) int32_t sums[256];
    alignas(64) float floats[256];
    for (int i = 0; i < 1024; ++i) {
      a[i] = -3;
      b[i] = 200;
      ones[i / 2] = 0x3f80;
    }
    LoadShapes(ShapesOf(kTileRows, kTileRows, kTileBytes));
    ClobberMemory(a);
    ClobberMemory(b);
    ClobberMemory(ones);
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, a, 64);
    _tile_loadd(6, b, 64);
    _tile_dpbsud(0, 4, 6);
    _tile_loadd(5, ones, 64);
    _tile_loadd(7, ones, 64);
    _tile_dpbf16ps(1, 5, 7);
    _tile_stored(0, sums, 64);
    _tile_stored(1, floats, 64);
    _tile_release();
    ClobberMemory(sums);
    ClobberMemory(floats);
    bool all = true;
    for (int i = 0; i < 256; ++i) all &= sums[i] == -3 * 200 * 64 && floats[i] == 32.0f;
    right = all;
  }
  pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  sigaction(SIGILL, &state.previous, nullptr);
  return right;
}

// The reason why this process cannot use AMX, or "".
inline const char* FindReason() {
#if !defined(LLM_JAX_AMX_MODEL) && !defined(LLM_JAX_AMX_ASSUMED)
  constexpr uint32_t kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25, kTileStates = 3u << 17;
  const Features f = FeaturesOfCpu();
  if (!HasAll(f.leaf7_edx, kBFloat16 | kTile | kInt8)) return "this CPU has no AMX";
  if (!HasAll(f.states, kTileStates)) return "the operating system does not support AMX";
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData)) return "the operating system refuses the permission";
#endif
  return Trial() ? "" : "the instructions fail in a trial, although the CPU announces them";
}

}  // namespace amx
LLM_JAX_END_TARGET

// Depends on the CPU and the operating system only. `FastestPath` and `HasPath` call it only where kAmx may be used.
LLM_JAX_HIDDEN inline const char* AmxReason() {
  static const char* reason = amx::FindReason();
  return reason;
}
#elif defined(__x86_64__)
inline const char* AmxReason() { return "the compiler of the kernels has no AMX for this system"; }
#else
inline const char* AmxReason() { return "this CPU has no AMX"; }
#endif

}  // namespace llm_jax

#endif  // LLM_JAX_KERNELS_CPU_AMX_H_
