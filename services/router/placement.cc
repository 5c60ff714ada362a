// SPDX-License-Identifier: Apache-2.0
// Filters, then the least loaded pair of one compatibility hash.
#include "services/router/placement.h"

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

enum class Fit { kNever, kNotNow, kYes };

bool Alive(const WorkerView& worker, const ClusterSnapshot& snapshot, TimePoint now) {
  return worker.Serving() && now - worker.last_heard <= snapshot.suspect_after;
}

Fit PrefillFit(const WorkerView& worker, const PlacementRequest& request) {
  const v1::Capacity& capacity = worker.serves.capacity();
  const int64_t page_tokens = capacity.page_tokens();
  if (PagesFor(request.prompt_tokens, page_tokens) > static_cast<int64_t>(capacity.pages_total()) ||
      request.prompt_tokens + request.max_tokens > static_cast<int64_t>(capacity.max_context_tokens())) {
    return Fit::kNever;
  }
  const int64_t places = int64_t{capacity.slots_total()} + capacity.max_queue();
  return worker.saturated || worker.assigned.requests >= places ? Fit::kNotNow : Fit::kYes;
}

Fit DecodeFit(const WorkerView& worker, const PlacementRequest& request) {
  const v1::Capacity& capacity = worker.serves.capacity();
  const int64_t tokens = request.prompt_tokens + request.max_tokens;
  const int64_t pages = PagesFor(tokens, capacity.page_tokens());
  const int64_t total = static_cast<int64_t>(capacity.pages_total());
  if (pages > total || tokens > static_cast<int64_t>(capacity.max_context_tokens())) return Fit::kNever;
  const bool full = worker.assigned.pages + pages > total || worker.assigned.requests >= capacity.slots_total();
  return worker.saturated || full ? Fit::kNotNow : Fit::kYes;
}

// Lower is better.
double PrefillLoad(const WorkerView& worker) {
  return static_cast<double>(worker.assigned.prompt_tokens) + static_cast<double>(worker.assigned.requests);
}
double DecodeLoad(const WorkerView& worker) {
  const v1::Capacity& capacity = worker.serves.capacity();
  const double pages =
      static_cast<double>(worker.assigned.pages) / static_cast<double>(std::max<uint64_t>(capacity.pages_total(), 1));
  const double slots = static_cast<double>(worker.assigned.requests) /
                       static_cast<double>(std::max<uint32_t>(capacity.slots_total(), 1));
  return std::max(pages, slots);
}

// What is known about one role within one compatibility hash.
struct Candidates {
  std::optional<size_t> best;
  double best_load = 0;
  bool any = false;        // alive at all
  bool could_fit = false;  // some worker could hold it when empty
  int fit = 0;             // that could take it now

  void Consider(size_t index, Fit fits, double load) {
    any = true;
    could_fit |= fits != Fit::kNever;
    fit += fits == Fit::kYes;
    if (fits == Fit::kYes && (!best || load < best_load)) {
      best = index;
      best_load = load;
    }
  }
};

absl::Status NoCapacity(std::string_view code, std::string_view message) {
  return MakeError(absl::StatusCode::kUnavailable, std::string(message),
                   {.code = std::string(code), .retry_after_s = 5});
}

}  // namespace

int64_t PagesFor(int64_t tokens, int64_t page_tokens) {
  if (page_tokens <= 0) page_tokens = 128;
  return (tokens + page_tokens - 1) / page_tokens;
}

absl::StatusOr<Pair> ChoosePair(const ClusterSnapshot& snapshot, const PlacementRequest& request, TimePoint now) {
  std::map<std::string, std::pair<Candidates, Candidates>> by_hash;
  bool any_prefill = false, any_decode = false;
  for (size_t i = 0; i < snapshot.workers.size(); ++i) {
    const WorkerView& worker = snapshot.workers[i];
    if (!Alive(worker, snapshot, now)) continue;
    auto& [prefill, decode] = by_hash[worker.serves.compat_hash()];
    if (worker.role == v1::ROLE_PREFILL) {
      any_prefill = true;
      prefill.Consider(i, PrefillFit(worker, request), PrefillLoad(worker));
    } else if (worker.role == v1::ROLE_DECODE) {
      any_decode = true;
      decode.Consider(i, DecodeFit(worker, request), DecodeLoad(worker));
    }
  }
  if (!any_prefill) return NoCapacity("no_capacity", "no prefill worker is ready");
  if (!any_decode) return NoCapacity("no_capacity", "no decode worker is ready");

  bool compatible = false, could_fit = false;
  std::optional<Pair> best;
  double best_decode_load = 0, best_prefill_load = 0;
  for (const auto& [hash, roles] : by_hash) {
    const auto& [prefill, decode] = roles;
    if (!prefill.any || !decode.any) continue;
    compatible = true;
    could_fit |= prefill.could_fit && decode.could_fit;
    if (!prefill.best || !decode.best) continue;
    const bool better = !best || decode.best_load < best_decode_load ||
                        (decode.best_load == best_decode_load && prefill.best_load < best_prefill_load);
    if (!better) continue;
    best = Pair{.prefill = *prefill.best,
                .decode = *decode.best,
                .prefill_fit = prefill.fit,
                .decode_fit = decode.fit,
                .prefill_waiting_tokens = snapshot.workers[*prefill.best].assigned.prompt_tokens,
                .decode_use = decode.best_load};
    best_decode_load = decode.best_load;
    best_prefill_load = prefill.best_load;
  }
  if (best) return *best;
  if (!compatible) {
    return NoCapacity("no_compatible_pair", "no prefill and decode worker serve the same model, numerics and layout");
  }
  if (!could_fit) {
    return InvalidRequest("context_length_exceeded", "max_tokens",
                          absl::StrCat("prompt of ", request.prompt_tokens, " tokens and max_tokens of ",
                                       request.max_tokens, " are more than any worker can hold"));
  }
  return MakeError(absl::StatusCode::kResourceExhausted, "every worker is busy",
                   {.code = "overloaded", .retry_after_s = 2});
}

}  // namespace millrace::router
