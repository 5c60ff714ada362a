// SPDX-License-Identifier: Apache-2.0
// See explanation.h.
#include "services/router/explanation.h"

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/text/concat.h"

namespace millrace::router {
namespace {

double Ms(absl::Duration duration) { return absl::ToDoubleMilliseconds(duration); }

std::string Outcome(absl::StatusCode code) {
  return code == absl::StatusCode::kOk ? "ok" : absl::AsciiStrToLower(absl::StatusCodeToString(code));
}

int64_t Number(const PhaseRecord& phase, std::string_view name, int64_t otherwise = 0) {
  for (const auto& [key, value] : phase.numbers) {
    if (key == name) return value;
  }
  return otherwise;
}

bool Has(const PhaseRecord& phase, std::string_view name) { return Number(phase, name, -1) >= 0; }

std::string Bytes(int64_t bytes) {
  return bytes < 1 << 20 ? absl::StrFormat("%.1f KiB", static_cast<double>(bytes) / 1024)
                         : absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
}

std::string Plural(int64_t count, const char* one, const char* many) {
  return absl::StrCat(count, " ", count == 1 ? one : many);
}

// One sentence about what is particular to a phase; empty if its time says it all.
std::string Detail(const PhaseRecord& phase) {
  switch (phase.phase) {
    case Phase::kQueue:
      return phase.attempt == 0 ? "waiting for a place" : "waiting for another pair, after the one before failed";
    case Phase::kPlacement:
      if (!Has(phase, "prefill_fit")) return "";
      return absl::StrCat("of ", Plural(Number(phase, "prefill_fit"), "prefill worker", "prefill workers"),
                          " with room it had the fewest prompt tokens waiting (",
                          Number(phase, "prefill_waiting_tokens"), "); of ",
                          Plural(Number(phase, "decode_fit"), "decode worker", "decode workers"),
                          " with room it was the least used (", Number(phase, "decode_use_percent"), " %)");
    case Phase::kPrefill:
      if (!Has(phase, "compute_us")) return "";
      return absl::StrFormat("%.1f ms in its queue, %.1f ms computing %d tokens", Number(phase, "queue_us") / 1e3,
                             Number(phase, "compute_us") / 1e3, Number(phase, "tokens"));
    case Phase::kHandoff: {
      if (!Has(phase, "bytes")) return "";
      const int64_t resent = Number(phase, "resent");
      return absl::StrCat(Bytes(Number(phase, "bytes")), " in ", Plural(Number(phase, "extents"), "extent", "extents"),
                          ", ", resent == 0 ? "none" : absl::StrCat(resent), " sent again");
    }
    case Phase::kGeneration:
      return Has(phase, "tokens") ? Plural(Number(phase, "tokens"), "token", "tokens") : "";
    default:
      return "";
  }
}

// A wait and a decision are recorded before the attempt that they lead to.
uint32_t AttemptOf(const PhaseRecord& phase) {
  const bool leads = phase.phase == Phase::kQueue || phase.phase == Phase::kPlacement;
  return phase.attempt + (leads ? 1 : 0);
}

}  // namespace

Json ExplanationSummaryJson(const TraceView& trace, absl::Time now) {
  const PhaseRecord& root = trace.phases.front();
  uint32_t attempts = 0;
  int64_t bytes = 0, resent = 0;
  for (const PhaseRecord& phase : trace.phases) {
    attempts = std::max(attempts, phase.attempt);
    if (phase.phase != Phase::kHandoff) continue;
    bytes += Number(phase, "bytes");
    resent += Number(phase, "resent");
  }
  Json json;
  json["request_id"] = trace.request_id;
  json["route"] = trace.name;
  json["trace_id"] = absl::StrFormat("%016x%016x", trace.trace_high, trace.trace_low);
  json["state"] = trace.closed ? "ended" : "running";
  json["http_status"] = trace.http_status;
  json["outcome"] = trace.closed ? Outcome(root.code) : "";
  json["total_ms"] = Ms((root.open() ? now : root.end) - root.begin);
  json["age_ms"] = Ms(now - root.begin);
  json["input_tokens"] = Number(root, "input_tokens");
  json["output_tokens"] = Number(root, "output_tokens");
  json["attempts"] = attempts;
  json["bytes_moved"] = bytes;
  json["extents_resent"] = resent;
  return json;
}

Json ExplanationJson(const TraceView& trace, absl::Time now) {
  Json json = ExplanationSummaryJson(trace, now);
  const absl::Time begin = trace.phases.front().begin;
  std::vector<const PhaseRecord*> phases;
  for (size_t i = 1; i < trace.phases.size(); ++i) phases.push_back(&trace.phases[i]);
  std::stable_sort(phases.begin(), phases.end(), [](auto* a, auto* b) { return a->begin < b->begin; });
  json["phases"] = Json::array();
  for (const PhaseRecord* phase : phases) {
    json["phases"].push_back(Json{{"name", std::string(PhaseName(phase->phase))},
                                  {"choice", phase->choice},
                                  {"attempt", phase->phase == Phase::kGeneration ? 0 : AttemptOf(*phase)},
                                  {"worker", phase->worker},
                                  {"start_ms", Ms(phase->begin - begin)},
                                  {"ms", Ms((phase->open() ? now : phase->end) - phase->begin)},
                                  {"outcome", phase->open() ? "running" : Outcome(phase->code)},
                                  {"detail", Detail(*phase)}});
  }
  return json;
}

}  // namespace millrace::router
