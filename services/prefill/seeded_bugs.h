// SPDX-License-Identifier: Apache-2.0
// Wrong bytes on purpose: the seeded bugs of a hand-off, which the test suites must catch.
//
// Each returns to the sender a copy that has gone wrong the way real code has, with a digest that fits it, so that only
// an oracle on tokens can notice. Nothing happens unless a test armed the failpoint. Thread: engine thread.
#pragma once

#include "engine/cache/cache_layout.h"
#include "engine/engine.h"
#include "kvtransfer/memory.h"
#include "services/prefill/prompt.h"

namespace millrace::prefill {

// What to send for `extent`: `truth`, unless a seeded bug is on. Copies live in the prompt.
kvtransfer::ConstMemory SeededBugSource(Prompt& prompt, const CacheExtent& extent, const CacheLayout& layout,
                                        kvtransfer::ConstMemory truth);

}  // namespace millrace::prefill
