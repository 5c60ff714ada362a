// SPDX-License-Identifier: Apache-2.0
// The sampler: a handful of passes over the vocabulary, never a sort of it.
//
//   adjust    banned ids to -inf, bias added, then penalties: repetition, frequency, presence (vLLM's order). Skipped,
//             without a copy, when the request asks for none of it.
//   check     maximum, and whether anything is NaN or +inf.
//   log-probs weights exp(logit - max) and their sum.
//   truncate  weights exp((logit - max) / temperature); then min-p, top-k, top-p, each on what the previous one left
//   and
//             renormalised over it. A histogram over the weights' binades says which binade a cut is in; only there are
//             tokens compared with each other.
//   draw      inverse of the cumulative weights in ascending id.
//
// A token's bits must not depend on the machine that draws it, since a migrated request goes on elsewhere: IEEE double
// arithmetic in one order, and this file is built without contraction to FMA. The passes over whole rows (maximum,
// weights) are sampler_weights_cpu.cc.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "engine/ops/sampler.h"
#include "engine/ops/sampler_arithmetic.h"
#include "engine/ops/sampler_weights_cpu.h"
#include "engine/status.h"

namespace millrace {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

struct Candidate {
  double weight;
  int32_t id;
};
bool Better(const Candidate& a, const Candidate& b) { return a.weight != b.weight ? a.weight > b.weight : a.id < b.id; }

// Reused from draw to draw: about 2 MB at the released vocabulary, too much to ask of the allocator each time. No value
// survives a call.
struct Scratch {
  std::vector<float> adjusted;
  std::vector<uint32_t> seen;
  RowWeights row;
  std::vector<Candidate> candidates, doubtful;
};

// ---- Adjust ----

// Returns the logits the request is drawn from: the caller's own, or a changed copy in scratch. Ids outside the
// vocabulary (which a server has refused long before) name no logit and change nothing.
absl::Span<const float> Adjust(absl::Span<const float> logits, const SamplingRequest& request, Scratch& scratch) {
  const SamplingParams& p = request.params;
  const bool repetition = p.repetition_penalty != 1.0f && !(request.prompt.empty() && request.output.empty());
  const bool counting = (p.frequency_penalty != 0.0f || p.presence_penalty != 0.0f) && !request.output.empty();
  if (p.banned.empty() && p.logit_bias.empty() && !repetition && !counting) return logits;

  const int64_t size = logits.size();
  auto in_vocabulary = [size](int32_t id) { return id >= 0 && id < size; };
  std::vector<float>& out = scratch.adjusted;
  out.assign(logits.begin(), logits.end());
  for (int32_t id : p.banned) {
    if (in_vocabulary(id)) out[id] = -kInf;
  }
  for (const auto& [id, bias] : p.logit_bias) {
    if (in_vocabulary(id)) out[id] += bias;
  }
  if (repetition || counting) {
    // Per id: how often it was drawn, and in the top bit whether the prompt has it.
    constexpr uint32_t kInPrompt = 1u << 31;
    scratch.seen.assign(size, 0);
    for (int32_t id : request.output) {
      if (in_vocabulary(id)) ++scratch.seen[id];
    }
    if (repetition) {
      for (int32_t id : request.prompt) {
        if (in_vocabulary(id)) scratch.seen[id] |= kInPrompt;
      }
    }
    for (int64_t id = 0; id < size; ++id) {
      const uint32_t seen = scratch.seen[id];
      if (seen == 0) continue;
      const uint32_t drawn = seen & ~kInPrompt;
      if (repetition) out[id] = out[id] > 0 ? out[id] / p.repetition_penalty : out[id] * p.repetition_penalty;
      out[id] -= p.frequency_penalty * static_cast<float>(drawn);
      if (drawn > 0) out[id] -= p.presence_penalty;
    }
  }
  return out;
}

// ---- Truncate ----

// Binade of a weight in (0, 1]: 0 for 1, 1 for [1/2, 1), and so on; the last holds all smaller ones.
constexpr int kBinades = 64;
int Binade(double weight) {
  const int exponent = static_cast<int>(std::bit_cast<uint64_t>(weight) >> 52);
  return std::min(1023 - exponent, kBinades - 1);
}

double Sum(absl::Span<const Candidate> candidates) {
  double sum = 0;
  for (const Candidate& c : candidates) sum += c.weight;
  return sum;
}

// Keeps the shortest list of best candidates that numbers `count` or weighs `mass`, at least one, ids ascending as
// before. Whole binades stay or go by their sums; only the one the cut falls into is searched, by halving its doubtful
// range, so that the work is linear.
void KeepBest(int64_t count, double mass, Scratch& scratch) {
  std::vector<Candidate>& candidates = scratch.candidates;
  int64_t counts[kBinades] = {};
  double masses[kBinades] = {};
  for (const Candidate& c : candidates) {
    ++counts[Binade(c.weight)];
    masses[Binade(c.weight)] += c.weight;
  }
  int cut_binade = 0;
  while (cut_binade < kBinades - 1 && counts[cut_binade] < count && masses[cut_binade] < mass) {
    count -= counts[cut_binade];
    mass -= masses[cut_binade];
    ++cut_binade;
  }

  std::vector<Candidate>& doubtful = scratch.doubtful;
  doubtful.clear();
  for (const Candidate& c : candidates) {
    if (Binade(c.weight) == cut_binade) doubtful.push_back(c);
  }
  if (doubtful.empty()) return;             // neither was reached: all stay
  size_t begin = 0, end = doubtful.size();  // up to and with `begin` all stay, from `end` on all go
  while (end - begin > 1) {
    const size_t middle = begin + (end - begin) / 2;
    std::nth_element(doubtful.begin() + begin, doubtful.begin() + middle, doubtful.begin() + end, Better);
    const double heavier = Sum(absl::MakeSpan(doubtful).subspan(begin, middle - begin));
    const int64_t more = middle - begin;
    if (more >= count || heavier >= mass) {
      end = middle;
    } else {
      count -= more;
      mass -= heavier;
      begin = middle;
    }
  }
  const Candidate last_kept = doubtful[begin];
  std::erase_if(candidates, [&](const Candidate& c) { return Better(last_kept, c); });
}

// Applies min-p, top-k and top-p to scratch.row.weights; what survives is in scratch.candidates, in ascending id.
void Truncate(const SamplingParams& p, Scratch& scratch) {
  std::vector<Candidate>& candidates = scratch.candidates;
  const double floor = std::min(p.min_p, 1.0f);  // the heaviest token weighs exactly 1 and always stays
  candidates.clear();
  for (size_t id = 0; id < scratch.row.weights.size(); ++id) {
    const double w = scratch.row.weights[id];
    if (w > 0 && w >= floor) candidates.push_back({w, static_cast<int32_t>(id)});
  }
  if (p.top_k > 0) KeepBest(p.top_k, kInf, scratch);
  if (p.top_p < 1.0f) {
    // The fraction comes as a float: the half ulp it may have gained must not let one more token in, as it would with
    // ten equal tokens and 0.6.
    const double fraction = static_cast<double>(p.top_p) * (1 - 0x1p-23);
    KeepBest(std::numeric_limits<int64_t>::max(), fraction * Sum(candidates), scratch);
  }
}

// ---- Draw ----

// The first id whose cumulative weight passes u times the total; if rounding has let none pass, the last with any
// weight.
int32_t DrawFromCandidates(const std::vector<Candidate>& candidates, double u) {
  const double target = u * Sum(candidates);
  double cumulative = 0;
  for (const Candidate& c : candidates) {
    cumulative += c.weight;
    if (cumulative > target) return c.id;
  }
  return candidates.back().id;
}

// The same over the whole vocabulary, whose block sums are known.
int32_t DrawFromAll(const RowWeights& row, double total, double u) {
  const double target = u * total;
  double cumulative = 0;
  int32_t last = -1;
  for (size_t block = 0; block < row.block_sums.size(); ++block) {
    const double after = cumulative + row.block_sums[block];
    const size_t begin = block * kSamplerBlock, end = std::min(begin + kSamplerBlock, row.weights.size());
    if (after > target || block + 1 == row.block_sums.size()) {
      for (size_t id = begin; id < end; ++id) {
        if (row.weights[id] == 0) continue;
        cumulative += row.weights[id];
        last = static_cast<int32_t>(id);
        if (cumulative > target) return last;
      }
      // The block's lanes and this walk may differ in the last bit: the block was the right one.
      if (last >= 0) return last;
    }
    cumulative = after;
  }
  // Only if the trailing blocks weigh nothing and rounding ate the rest: the last id that weighs anything.
  for (size_t id = row.weights.size(); id-- > 0;) {
    if (row.weights[id] > 0) return static_cast<int32_t>(id);
  }
  CHECK(false, "a finite row has a token of weight 1");
  return -1;
}

int32_t FirstWithValue(absl::Span<const float> logits, float value) {
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), value) - logits.begin());
}

// Ids and logits of the n best that can occur at all, best first, ties to the lower id. n is small: one pass with a
// sorted list, which most tokens fail to enter by one comparison.
std::vector<std::pair<int32_t, float>> TopLogits(absl::Span<const float> logits, int n) {
  std::vector<std::pair<int32_t, float>> top;
  if (n <= 0) return top;
  top.reserve(n + 1);
  for (size_t id = 0; id < logits.size(); ++id) {
    const float x = logits[id];
    if (x == -kInf || (static_cast<int>(top.size()) == n && x <= top.back().second)) continue;
    const auto at = std::find_if(top.begin(), top.end(), [x](const auto& entry) { return x > entry.second; });
    top.insert(at, {static_cast<int32_t>(id), x});
    if (static_cast<int>(top.size()) > n) top.pop_back();
  }
  return top;
}

}  // namespace

// Salmon, Moraes, Dror, Shaw: Parallel Random Numbers: As Easy as 1, 2, 3 (SC'11), section 3.
PhiloxWords Philox4x32(uint64_t key, uint64_t counter_low, uint64_t counter_high) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter_low), c1 = static_cast<uint32_t>(counter_low >> 32);
  uint32_t c2 = static_cast<uint32_t>(counter_high), c3 = static_cast<uint32_t>(counter_high >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9;  // golden ratio
    k1 += 0xBB67AE85;  // sqrt(3) - 1
  }
  return {{c0, c1, c2, c3}};
}

SampledToken Sample(absl::Span<const float> raw_logits, const SamplingRequest& request) {
  CHECK(!raw_logits.empty(), "sampling needs a vocabulary");
  thread_local Scratch scratch;
  const SamplingParams& p = request.params;
  const absl::Span<const float> logits = Adjust(raw_logits, request, scratch);

  SampledToken token;
  const MaxOfRow max = FindMax(logits);
  if (!max.finite || max.value == -kInf) {
    token.finite = false;
    return token;
  }
  double total = Weigh(logits, max.value, 1.0, scratch.row);
  const double log_total = std::log(total);
  auto logprob = [&](float logit) {
    return static_cast<float>((static_cast<double>(logit) - static_cast<double>(max.value)) - log_total);
  };

  if (!(p.temperature >= kGreedyTemperature)) {
    token.id = FirstWithValue(logits, max.value);
  } else {
    if (p.temperature != 1.0f) total = Weigh(logits, max.value, 1.0 / static_cast<double>(p.temperature), scratch.row);
    const double u = UniformDraw(request);
    const bool truncates = p.top_p < 1.0f || p.min_p > 0.0f || p.top_k > 0;
    if (truncates) {
      Truncate(p, scratch);
      token.id = DrawFromCandidates(scratch.candidates, u);
    } else {
      token.id = DrawFromAll(scratch.row, total, u);
    }
  }
  token.logprob = logprob(logits[token.id]);
  token.top = TopLogits(logits, p.top_logprobs);
  for (auto& [id, value] : token.top) value = logprob(value);
  return token;
}

}  // namespace millrace
