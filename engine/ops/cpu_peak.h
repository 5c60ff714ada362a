// SPDX-License-Identifier: Apache-2.0
// What this machine's arithmetic can do at best, for benchmarks that state a share of it. Not used by the engine.
#pragma once

namespace millrace {

// FP32 multiply-adds per second of one thread, in a loop of independent fused multiply-adds on registers, with the
// instruction set the CPU operations dispatch to. Measured once per process, in about 0.1 s.
double PeakMultiplyAdds();

}  // namespace millrace
