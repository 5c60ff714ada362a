// SPDX-License-Identifier: Apache-2.0
// Times the attention core at Flash's width (64 heads, top 512) over a context of 64K, and checks that a row has the
// same bits among others, alone and split.
//
//   sparse_attention_cuda_bench [CSV] [COMMIT]
//
// Decode: each row is a sequence of its own; successive launches take other sequences, together more bytes than the L2
// cache holds. Prefill: 512 consecutive rows of one sequence, each with its own selection. Bytes are keys as stored,
// each once, queries and outputs.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/device/cuda_bench.h"
#include "engine/ops/cuda_sparse_attention.h"

namespace millrace::cuda {
namespace {

constexpr int kHeads = 64, kTopK = 512;
constexpr int64_t kContext = 64 << 10, kSequencePages = kContext / 128, kCsaEntries = kContext / 4;
constexpr int kSequences = 160;                                   // 430 KB of keys each: 69 MB
constexpr int64_t kMostRows = 512, kMaxPlaces = kWindow + kTopK;  // HCA sees 512 entries as well
constexpr int64_t kEntryBytes = kPlainDim + 2 * kRopeDim + 8, kRowValues = int64_t{kHeads} * kHeadDim;

CacheLayout Layout() {
  ModelConfig c;
  c.hidden_size = 4096;
  c.num_hidden_layers = 2;
  c.num_attention_heads = kHeads;
  c.head_dim = kHeadDim;
  c.rope_head_dim = kRopeDim;
  c.sliding_window = kWindow;
  c.index_head_dim = kIndexDim;
  c.layer_kinds = {LayerKind::kCsa, LayerKind::kHca};
  return CacheLayout::Make(c, Numerics::kRelease, false);
}

// Keys of all sequences, queries of the most rows.
struct Cache {
  Cache()
      : layout(Layout()),
        pages(Take(kSequences * kSequencePages * layout.page_bytes)),
        window(Take((kSequences + kMostRows) * kWindow * kHeadDim * 2)),
        q(Take(kMostRows * kRowValues * 2)),
        sink(Take(kHeads * 4)),
        rope(Take(kMostRows * 32 * 4)),
        workspace(Take(SparseAttentionWorkspaceBytes(kMostRows, kHeads, kMaxPlaces))),
        out(Take(kMostRows * kRowValues * 2)) {
    // Codes without NaN: the top exponent bit stays clear. Scales are one.
    FillRandom(pages.data(), pages.bytes(), 1, 0xbf, 0, nullptr);
    for (const PageLayerLayout& l : layout.page_layers) {
      CUDA_CHECK(
          cudaMemset2D(pages.data() + l.scales, layout.page_bytes, 127, l.entries * 8, kSequences * kSequencePages));
    }
    FillRandomBf16(window.data(), window.bytes() / 2, 2, nullptr);
    FillRandomBf16(q.data(), kMostRows * kRowValues, 3, nullptr);
    FillRandomBf16(rope.data(), kMostRows * 64, 4, nullptr);  // any floats
    std::vector<int32_t> pool(kSequences * kSequencePages);
    for (size_t i = 0; i < pool.size(); ++i) pool[i] = static_cast<int32_t>(i * 17 % pool.size());  // scattered
    table = Upload(pool);
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  CacheLayout layout;
  DeviceBuffer pages, window, q, sink, rope, workspace, out, table;
};

// `rows` rows: of as many sequences, or consecutive ones of a single sequence; `sets` such passes.
struct Batch {
  Batch(const Cache& cache_, int64_t rows_, bool decode_, int sets_)
      : cache(cache_), rows(rows_), sets(sets_), decode(decode_) {
    std::vector<int32_t> positions, row_sequence, chosen;
    std::vector<SequenceView> views;
    for (int64_t r = 0; r < rows; ++r) {
      positions.push_back(static_cast<int32_t>(decode ? kContext - 1 : kContext - rows + r));
      row_sequence.push_back(decode ? static_cast<int32_t>(r) : 0);
      for (int64_t j = 0; j < kTopK; ++j) {
        chosen.push_back(static_cast<int32_t>(j * (kCsaEntries / kTopK) + (r * 7 + j * 13) % (kCsaEntries / kTopK)));
      }
    }
    const auto* tables = reinterpret_cast<const int32_t*>(cache.table.data());
    for (int s = 0; s < sets; ++s) {
      for (int64_t i = 0; i < (decode ? rows : 1); ++i) {
        const int64_t sequence = (s * rows + i) % kSequences;
        views.push_back({i, decode ? 1 : rows, positions[i], nullptr, tables + sequence * kSequencePages});
      }
    }
    device_positions = Upload(positions);
    device_row_sequence = Upload(row_sequence);
    entries = Upload(chosen);
    counts = Upload(std::vector<int32_t>(rows, kTopK));
    device_views = Upload(views);
  }

  // Rows first .. first + count of set `set` in decode; else all rows.
  void Launch(int layer, int set, int64_t first, int64_t count, bool may_split, Bf16* out, cudaStream_t stream) const {
    const auto int32s = [](const DeviceBuffer& b) { return reinterpret_cast<int32_t*>(b.data()); };
    const int64_t sequences = decode ? rows : 1;
    const PassView pass{count,
                        static_cast<int>(decode ? count : 1),
                        nullptr,
                        int32s(device_positions) + first,
                        int32s(device_row_sequence) + (decode ? 0 : first),
                        reinterpret_cast<const SequenceView*>(device_views.data()) + set * sequences,
                        cache.pages.data(),
                        cache.layout.page_bytes};
    const auto* rope = reinterpret_cast<const float*>(cache.rope.data());
    SparseAttention(cache.layout.page_layers[layer].kind, pass, cache.layout.page_layers[layer],
                    reinterpret_cast<const Bf16*>(cache.q.data()) + first * kRowValues, kHeads,
                    reinterpret_cast<const float*>(cache.sink.data()),
                    reinterpret_cast<const Bf16*>(cache.window.data()) +
                        (decode ? set * rows % kSequences * kWindow * kHeadDim : 0),
                    {int32s(entries) + first * kTopK, int32s(counts) + first, kTopK}, {rope, rope}, kMaxPlaces,
                    may_split ? cache.workspace.data() : nullptr, out, stream);
  }

  const Cache& cache;
  int64_t rows;
  int sets;
  bool decode;
  DeviceBuffer device_positions, device_row_sequence, entries, counts, device_views;
};

std::vector<uint16_t> Read(const DeviceBuffer& out, int64_t rows) {
  std::vector<uint16_t> host(rows * kRowValues);
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaMemcpy(host.data(), out.data(), host.size() * 2, cudaMemcpyDeviceToHost));
  return host;
}

// One pass as the engine launches it (and, where that is split, whole).
int Run(const Cache& cache, int layer, int64_t rows, bool decode, BenchReport& report) {
  const int sets = decode ? static_cast<int>(kSequences / rows) : 1;
  const Batch batch(cache, rows, decode, sets);
  auto* out = reinterpret_cast<Bf16*>(cache.out.data());
  const bool split = SparseAttentionGroups(rows, kHeads, kMaxPlaces) > 1;
  CUDA_CHECK(cudaMemset(cache.out.data(), 0xff, cache.out.bytes()));
  batch.Launch(layer, 0, 0, rows, true, out, nullptr);
  const std::vector<uint16_t> all = Read(cache.out, rows);
  const bool written = std::none_of(all.begin(), all.end(), [](uint16_t y) { return (y & 0x7f80) == 0x7f80; });
  // The other way round: all rows whole where they were split, the first row split where all were whole.
  CUDA_CHECK(cudaMemset(cache.out.data(), 0xff, cache.out.bytes()));
  const int64_t again = split ? rows : 1;
  batch.Launch(layer, 0, 0, again, !split, out, nullptr);
  const std::vector<uint16_t> other = Read(cache.out, again);
  const bool good = written && std::memcmp(all.data(), other.data(), other.size() * 2) == 0;

  const bool csa = cache.layout.page_layers[layer].kind == LayerKind::kCsa;
  const double row_keys = kWindow * kHeadDim * 2.0 + kTopK * static_cast<double>(kEntryBytes);
  const double unique_keys =
      decode ? rows * row_keys
             : (rows + kWindow - 1) * kHeadDim * 2.0 + static_cast<double>(csa ? kCsaEntries : kTopK) * kEntryBytes;
  const double bytes = unique_keys + rows * kRowValues * 4.0;
  const double flops = 4.0 * rows * kRowValues * kMaxPlaces;
  const int launches = std::max(sets, decode ? 32 : 8);
  for (const bool may_split : split ? std::vector<bool>{true, false} : std::vector<bool>{true}) {
    const Timing timing = TimeLaunches(launches, sets, 7, [&](int set, cudaStream_t stream) {
      batch.Launch(layer, set, 0, rows, may_split, out, stream);
    });
    report.Add({absl::StrCat("attention ", csa ? "csa" : "hca", may_split ? "" : " (not split)"),
                absl::StrCat("Flash 64K ", decode ? "decode B " : "prefill T ", rows), timing, bytes, flops,
                absl::StrFormat("%s; keys %.0f GB/s",
                                good      ? "bits equal split and whole"
                                : written ? "BITS DIFFER"
                                          : "NOT WRITTEN",
                                rows * row_keys / timing.median_us / 1e3)});
  }
  return good ? 0 : 1;
}

int RunAll(BenchReport& report) {
  const Cache cache;
  int wrong = 0;
  for (const int layer : {0, 1}) {
    for (const int64_t rows : {1, 8, 64}) wrong += Run(cache, layer, rows, true, report);
    wrong += Run(cache, layer, kMostRows, false, report);
  }
  return wrong;
}

}  // namespace
}  // namespace millrace::cuda

int main(int argc, char** argv) { return millrace::cuda::BenchMain(argc, argv, millrace::cuda::RunAll); }
