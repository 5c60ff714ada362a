// SPDX-License-Identifier: Apache-2.0
// See amx.h: CPUID says what the processor has, the kernel grants the tiles' state.
#include "engine/ops/amx.h"

#ifdef MILLRACE_HAVE_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace millrace {
namespace {

bool AskForAmx() {
  uint32_t a, b, c, d;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr uint32_t kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // BF16, tiles, INT8
  if ((d & kNeeded) != kNeeded) return false;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512vl") || !__builtin_cpu_supports("avx512dq") ||
      !__builtin_cpu_supports("avx512vbmi") || !__builtin_cpu_supports("gfni")) {
    return false;
  }
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM; threads made later inherit it
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace

bool AmxAvailable() {
  static const bool available = AskForAmx();
  return available;
}

}  // namespace millrace

#else

namespace millrace {
bool AmxAvailable() { return false; }
}  // namespace millrace

#endif
