// SPDX-License-Identifier: Apache-2.0
// The state of a sequence from one engine to another, byte by byte through the host, as a hand-off does it.
//
// CHECK-fails where the engines disagree about what there is to carry: no test goes on from there. Thread: the test's.
#pragma once

#include <cstdint>

#include "engine/engine.h"

namespace millrace::golden {

// One extent, whatever devices the engines are on.
void CopyExtent(const Engine& source, const CacheExtent& from, const Engine& target, const CacheExtent& to);

// Every byte of an extent of `engine`, on whatever device.
void FillExtent(const Engine& engine, const CacheExtent& extent, uint8_t byte);

// Gives `to`, a fresh sequence reserved for `max_tokens`, the state of `from` at `num_tokens`. Its memory is filled
// with NaN first: what is read of what was not carried shows.
void CarryState(Engine& source, SequenceId from, Engine& target, SequenceId to, int64_t max_tokens, int64_t num_tokens);

}  // namespace millrace::golden
