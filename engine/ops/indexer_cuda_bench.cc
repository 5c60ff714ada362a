// SPDX-License-Identifier: Apache-2.0
// Times the lightning indexer at Flash's width (64 heads, top 512) from 4K to 1M tokens, and checks that a row selects
// the same entries alone and among others, and that the choice is the exact one of its scores.
//
//   indexer_cuda_bench [CSV] [COMMIT]
//
// `select` is the whole call: query codes, scores, top-k. `topk` is the choice alone, over scores as they come out of a
// model and over equal ones, the worst case of a radix selection. Decode: each row is a sequence of its own; successive
// launches take other sequences where the context leaves room for several. Prefill: consecutive rows of one sequence at
// its end. Bytes are keys as stored, each once, and for `topk` the scores once; operations are the products of all
// heads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "engine/device/cuda_bench.h"
#include "engine/ops/cuda_indexer.h"
#include "engine/ops/rounding.h"

namespace millrace::cuda {
namespace {

constexpr int kHeads = 64, kTopK = 512;
constexpr int64_t kMostContext = 1 << 20, kMostRows = 512, kMostEntries = kMostContext / 4;
constexpr int64_t kPages = kMostContext / 128;  // all contexts use these, cut into as many sequences as fit
constexpr int64_t kScoreBytes = 256 << 20;      // as the engine's
constexpr int64_t kKeyBytes = kIndexDim / 2 + 4;

template <typename T>
std::vector<T> Fetch(const DeviceBuffer& buffer, int64_t count) {
  std::vector<T> host(count);
  CUDA_CHECK(cudaDeviceSynchronize());
  CUDA_CHECK(cudaMemcpy(host.data(), buffer.data(), count * sizeof(T), cudaMemcpyDeviceToHost));
  return host;
}

CacheLayout Layout() {
  ModelConfig c;
  c.hidden_size = 4096;
  c.num_hidden_layers = 1;
  c.num_attention_heads = kHeads;
  c.head_dim = kHeadDim;
  c.rope_head_dim = kRopeDim;
  c.sliding_window = kWindow;
  c.index_head_dim = kIndexDim;
  c.layer_kinds = {LayerKind::kCsa};
  return CacheLayout::Make(c, Numerics::kRelease, false);
}

struct Keys {
  Keys()
      : layout(Layout()),
        pages(Take(kPages * layout.page_bytes)),
        q(Take(kMostRows * kHeads * kIndexDim * 2)),
        weights(Take(kMostRows * kHeads * 4)),
        rope(Take(kMostRows * 64 * 4)),
        codes(Take(kMostRows * kHeads * kIndexDim)),
        scales(Take(kMostRows * kHeads * 16)),
        scores(Take(kScoreBytes)),
        entries(Take(kMostRows * kTopK * 4)),
        counts(Take(kMostRows * 4)) {
    FillRandom(pages.data(), pages.bytes(), 1, 0xff, 0, nullptr);
    const PageLayerLayout& l = layout.page_layers[0];
    CUDA_CHECK(cudaMemset2D(pages.data() + l.index_scales, layout.page_bytes, 127, l.entries * 4, kPages));
    FillRandomBf16(q.data(), kMostRows * kHeads * kIndexDim, 2, nullptr);
    std::vector<float> host_weights(kMostRows * kHeads), host_rope(kMostRows * 64);
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (float& w : host_weights) w = normal(random);
    for (size_t i = 0; i < host_rope.size() / 2; ++i) {
      host_rope[i] = std::cos(static_cast<float>(i));  // cosines of all rows, then sines
      host_rope[i + host_rope.size() / 2] = std::sin(static_cast<float>(i));
    }
    weights = Upload(host_weights);
    rope = Upload(host_rope);
    std::vector<int32_t> pool(kPages);
    for (size_t i = 0; i < pool.size(); ++i) pool[i] = static_cast<int32_t>(i * 17 % pool.size());  // scattered
    table = Upload(pool);
    CUDA_CHECK(cudaDeviceSynchronize());
  }
  CacheLayout layout;
  DeviceBuffer pages, q, weights, rope, codes, scales, scores, entries, counts, table;
};

// `rows` rows at the end of a context: of as many sequences (decode; several share pages where they do not fit apart),
// or consecutive ones of one.
struct Batch {
  Batch(const Keys& keys_, int64_t rows_, int64_t context_, bool decode_)
      : keys(keys_), rows(rows_), context(context_), decode(decode_) {
    const int64_t each = context / 128, fit = kPages / each;
    sets = decode ? static_cast<int>(std::max<int64_t>(1, fit / rows)) : 1;
    std::vector<int32_t> positions, row_sequence;
    std::vector<SequenceView> views;
    for (int64_t r = 0; r < rows; ++r) {
      positions.push_back(static_cast<int32_t>(decode ? context - 1 : context - rows + r));
      row_sequence.push_back(decode ? static_cast<int32_t>(r) : 0);
    }
    const auto* tables = reinterpret_cast<const int32_t*>(keys.table.data());
    for (int s = 0; s < sets; ++s) {
      for (int64_t i = 0; i < (decode ? rows : 1); ++i) {
        views.push_back({i, decode ? 1 : rows, positions[i], nullptr, tables + (s * rows + i) % fit * each});
      }
    }
    device_positions = Upload(positions);
    device_row_sequence = Upload(row_sequence);
    device_views = Upload(views);
  }

  // Rows first .. first + count of set `set`; a row keeps its query wherever it stands.
  void Select(int set, int64_t first, int64_t count, cudaStream_t stream) const {
    const auto int32s = [](const DeviceBuffer& b) { return reinterpret_cast<int32_t*>(b.data()); };
    const PassView pass{
        count,
        static_cast<int>(decode ? count : 1),
        nullptr,
        int32s(device_positions) + first,
        int32s(device_row_sequence) + (decode ? 0 : first),
        reinterpret_cast<const SequenceView*>(device_views.data()) + set * (decode ? rows : 1) + (decode ? first : 0),
        keys.pages.data(),
        keys.layout.page_bytes};
    const auto* rope = reinterpret_cast<const float*>(keys.rope.data());
    const IndexWorkspace workspace{reinterpret_cast<int8_t*>(keys.codes.data()),
                                   reinterpret_cast<float*>(keys.scales.data()),
                                   reinterpret_cast<uint16_t*>(keys.scores.data()),
                                   std::clamp<int64_t>(kScoreBytes / 2 / (context / 4), 1, rows), context / 4};
    IndexSelect(pass, keys.layout.page_layers[0],
                {reinterpret_cast<const Bf16*>(keys.q.data()) + first * kHeads * kIndexDim, kHeads * kIndexDim},
                {reinterpret_cast<const float*>(keys.weights.data()) + first * kHeads, kHeads}, kHeads,
                {rope + first * 32, rope + (kMostRows + first) * 32}, workspace,
                {int32s(keys.entries), int32s(keys.counts), kTopK}, stream);
  }

  const Keys& keys;
  int64_t rows, context;
  bool decode;
  int sets = 1;
  DeviceBuffer device_positions, device_row_sequence, device_views;
};

int RunSelect(const Keys& keys, int64_t rows, int64_t context, bool decode, BenchReport& report) {
  const Batch batch(keys, rows, context, decode);
  CUDA_CHECK(cudaMemset(keys.entries.data(), 0xff, keys.entries.bytes()));
  batch.Select(0, 0, rows, nullptr);
  const auto all = Fetch<int32_t>(keys.entries, rows * kTopK);
  bool good = true;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = r * kTopK; i < (r + 1) * kTopK; ++i) {
      good &= all[i] >= 0 && all[i] < context / 4 && (i == r * kTopK || all[i] > all[i - 1]);
    }
  }
  for (const int64_t alone : {int64_t{0}, rows - 1}) {
    CUDA_CHECK(cudaMemset(keys.entries.data(), 0xff, keys.entries.bytes()));
    batch.Select(0, alone, 1, nullptr);
    const auto one = Fetch<int32_t>(keys.entries, kTopK);
    good &= std::memcmp(one.data(), all.data() + alone * kTopK, kTopK * 4) == 0;
  }
  const double entries = static_cast<double>(context) / 4;
  const Timing timing = TimeLaunches(std::max(batch.sets, decode && context < (1 << 18) ? 32 : 4), batch.sets, 7,
                                     [&](int set, cudaStream_t stream) { batch.Select(set, 0, rows, stream); });
  report.Add({"indexer select", absl::StrCat("Flash ", context >> 10, "K ", decode ? "decode B " : "prefill T ", rows),
              timing, (decode ? rows : 1) * entries * kKeyBytes, 2.0 * rows * entries * kHeads * kIndexDim,
              good ? "ascending, equal alone and among others" : "SELECTIONS DIFFER"});
  return good ? 0 : 1;
}

int RunTopK(const Keys& keys, int64_t rows, int64_t entries, bool equal, BenchReport& report) {
  std::vector<uint16_t> scores(rows * entries, EncodeBf16(1.5f));
  std::mt19937 random(5);
  if (!equal) {
    std::normal_distribution<float> normal(0, 20);
    for (uint16_t& s : scores) s = EncodeBf16(std::max(0.0f, normal(random)));
  }
  CUDA_CHECK(cudaMemcpy(keys.scores.data(), scores.data(), scores.size() * 2, cudaMemcpyHostToDevice));
  const DeviceBuffer lengths = Upload(std::vector<int32_t>(rows, static_cast<int32_t>(entries)));
  const SelectionView selection{reinterpret_cast<int32_t*>(keys.entries.data()),
                                reinterpret_cast<int32_t*>(keys.counts.data()), kTopK};
  const auto launch = [&](int, cudaStream_t stream) {
    TopK(reinterpret_cast<const uint16_t*>(keys.scores.data()), entries,
         reinterpret_cast<const int32_t*>(lengths.data()), rows, selection, stream);
  };
  launch(0, nullptr);
  const auto found = Fetch<int32_t>(keys.entries, rows * kTopK);
  std::vector<int32_t> expected(entries);
  std::iota(expected.begin(), expected.end(), 0);
  std::partial_sort(expected.begin(), expected.begin() + kTopK, expected.end(), [&](int32_t a, int32_t b) {
    const float x = DecodeBf16(scores[a]), y = DecodeBf16(scores[b]);
    return x != y ? x > y : a < b;
  });
  expected.resize(kTopK);
  std::sort(expected.begin(), expected.end());
  const bool good = std::equal(expected.begin(), expected.end(), found.begin());
  const Timing timing = TimeLaunches(16, 1, 7, launch);
  report.Add({equal ? "indexer topk, equal scores" : "indexer topk", absl::StrCat(entries, " entries, rows ", rows),
              timing, static_cast<double>(rows * entries) * 2, 0, good ? "exact, ties to the lower" : "NOT EXACT"});
  return good ? 0 : 1;
}

int RunAll(BenchReport& report) {
  const Keys keys;
  int wrong = 0;
  for (const int64_t context : {4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20}) {
    for (const int64_t rows : {1, 8, 64}) wrong += RunSelect(keys, rows, context, true, report);
    wrong += RunSelect(keys, kMostRows, context, false, report);
  }
  for (const int64_t entries : {int64_t{16} << 10, kMostEntries}) {
    for (const int64_t rows : {1, 64}) {
      wrong += RunTopK(keys, rows, entries, false, report);
      wrong += RunTopK(keys, rows, entries, true, report);
    }
  }
  return wrong;
}

}  // namespace
}  // namespace millrace::cuda

int main(int argc, char** argv) { return millrace::cuda::BenchMain(argc, argv, millrace::cuda::RunAll); }
