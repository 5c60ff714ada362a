// SPDX-License-Identifier: Apache-2.0
// What the sources that use Intel's AMX tiles share: asking for them, configuring them, releasing them. The products
// are matmul_amx.h (linears), attention_amx.h (attention) and index_score_cpu.h (indexer); the order in which a tile
// instruction sums is described there.
#pragma once

#include <cstdint>

namespace millrace {

// Whether this processor has AMX with BF16 and INT8 and this process may use it. Asks the kernel once.
bool AmxAvailable();

}  // namespace millrace

#if defined(__x86_64__) && defined(__linux__)
#define MILLRACE_HAVE_AMX 1
#include <immintrin.h>

// Only functions marked so may contain AVX-512: options for a whole file would leak into inline functions of headers
// that the linker shares with the rest of the program.
#define MILLRACE_AMX \
  __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,gfni,avx2,fma,amx-tile,amx-bf16,amx-int8")))

namespace millrace::amx {

// A tile: 16 rows of 64 bytes. As the right-hand side of a BF16 product it holds 16 pairs of inputs by 16 outputs.
inline constexpr int kTileK = 32, kTileN = 16, kTileRows = 16;

struct alignas(64) Tile {
  uint32_t words[kTileRows][kTileN];
};

// What LDTILECFG reads.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  // Eight tiles of full width, of so many rows each.
  constexpr explicit TileConfig(const uint8_t (&tile_rows)[8]) {
    for (int t = 0; t < 8; ++t) bytes[t] = 64, rows[t] = tile_rows[t];
  }
};

// GCC 12's tile intrinsics do not say which memory they read: what they shall find there must be stored before.
inline void CompilerBarrier() { asm volatile("" ::: "memory"); }

MILLRACE_AMX inline void ConfigureTiles(const TileConfig& config) {
  CompilerBarrier();
  _tile_loadconfig(&config);
}

// Tiles in use make every context switch dearer.
MILLRACE_AMX inline void ReleaseTiles() { _tile_release(); }

}  // namespace millrace::amx
#endif
