#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Times cuBLASLt's products at the shapes of tensor_linear_cuda_bench, through PyTorch on a machine with a card.

    record_cublas.py FILE.csv

As there: replays of a graph over operands that together exceed the L2 cache, random data, the median of seven. FP8 with a
scale per tensor, which is the fastest there is and not what the model needs, and with a scale per 128 and 128 x 128, which
is. Not part of any build or test; a peer to compare with.
"""
import csv
import statistics
import sys

import torch

FP8 = [(4096, 4096, 16384), (4096, 16384, 4096), (8192, 8192, 8192), (4096, 4096, 7168), (4096, 32768, 1024),
       (4096, 4096, 8192), (8192, 1024, 4096), (8192, 2048, 4096)]
FP8 += [(rows, n, k) for rows in (1, 8, 16, 32, 64, 128, 256)
        for n, k in ((4096, 8192), (1024, 4096), (32768, 1024), (2048, 4096))]
BF16 = [(8192, 8192, 8192)] + [(rows, n, k) for rows in (1, 16, 64, 4096) for n, k in ((2048, 4096), (256, 4096))]
BF16 += [(rows, 129280, 4096) for rows in (1, 16, 64)]


def replay_us(launch, launches, repetitions=7):
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i)
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(repetitions):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / launches)
    return statistics.median(times), min(times), max(times)


def random(rows, columns, dtype, count):
    return [torch.randn(rows, columns, device="cuda").to(dtype) for _ in range(count)]


def main(path):
    with open(path, "w", newline="") as target:
        out = csv.writer(target)
        out.writerow(["machine", "library", "kernel", "shape", "us_median", "us_low", "us_high", "tflop_s"])

        def record(kernel, shape, launch):
            rows, n, k = shape
            flops = 2.0 * rows * n * k
            launches = int(max(4, min(200, 4000 / max((rows + n) * k / 3e6, flops / 1.5e9))))
            median, low, high = replay_us(launch, launches)
            out.writerow([torch.cuda.get_device_name(0), f"cuBLASLt of CUDA {torch.version.cuda}", kernel,
                          f"{rows}x{n}x{k}", f"{median:.3f}", f"{low:.3f}", f"{high:.3f}", f"{flops / median / 1e6:.1f}"])
            target.flush()

        for rows, n, k in FP8:
            # cuBLASLt wants rows in sixteens; fewer cost it the same.
            padded = (rows + 15) // 16 * 16
            sets = int(min(64, 1 + 200e6 / ((padded + n) * k)))
            x, w = (random(r, k, torch.float8_e4m3fn, sets) for r in (padded, n))
            one = torch.ones((), device="cuda")
            x_scales = [torch.rand(k // 128, padded, device="cuda").t() + 0.5 for _ in range(sets)]
            w_scales = [(torch.rand(n // 128, k // 128, device="cuda") + 0.5).t() for _ in range(sets)]
            record("fp8 per tensor", (rows, n, k), lambda i: torch._scaled_mm(
                x[i % sets], w[i % sets].t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True))
            record("fp8 blocks", (rows, n, k), lambda i: torch._scaled_mm(
                x[i % sets], w[i % sets].t(), scale_a=x_scales[i % sets], scale_b=w_scales[i % sets],
                out_dtype=torch.bfloat16))
        for rows, n, k in BF16:
            sets = int(min(64, 1 + 200e6 / (2 * (rows + n) * k)))
            x, w = (random(r, k, torch.bfloat16, sets) for r in (rows, n))
            record("bf16", (rows, n, k), lambda i: torch.mm(x[i % sets], w[i % sets].t()))


if __name__ == "__main__":
    main(sys.argv[1])
