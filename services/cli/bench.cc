// SPDX-License-Identifier: Apache-2.0
// `millrace bench`: an open-loop load generator against a running cluster.
//
// Requests leave at times drawn beforehand from the asked rate, whether or not earlier ones are answered, so a slow
// server is seen as it is: a closed loop would wait for it and hide its queue. Prompts are random token ids through
// /v1/completions, streamed; every time is taken from the moment a request should have left.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"
#include "services/cli/chat_client.h"
#include "services/cli/command.h"
#include "services/cli/http_client.h"
#include "services/cli/terminal.h"

namespace millrace::cli {
namespace {

using Json = nlohmann::ordered_json;
using Clock = std::chrono::steady_clock;

struct Load {
  std::string address, model;
  HttpDoor door;
  int64_t requests = 32, prompt_tokens = 256, output_tokens = 64, vocabulary = 1400, seed = 1;
  double rate = 0;  // requests per second; 0: all at once
};

// One request as its client saw it; times in seconds.
struct Outcome {
  double ttft = 0, total = 0;
  std::vector<double> gaps;  // between tokens
  int64_t tokens = 0;
  std::string error;  // empty: finished well
};

double Seconds(Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); }

Outcome Ask(const Load& load, int64_t index, Clock::time_point due) {
  std::mt19937_64 draw(static_cast<uint64_t>(load.seed) * 1'000'003 + static_cast<uint64_t>(index));
  Json prompt = Json::array();
  for (int64_t i = 0; i < load.prompt_tokens; ++i) {
    prompt.push_back(10 + static_cast<int64_t>(draw() % static_cast<uint64_t>(load.vocabulary - 10)));
  }
  const Json body = {{"model", load.model},
                     {"prompt", std::move(prompt)},
                     {"max_tokens", load.output_tokens},
                     {"temperature", 0},
                     {"ignore_eos", true},
                     {"stream", true},
                     {"stream_options", {{"include_usage", true}}}};
  std::this_thread::sleep_until(due);
  Outcome outcome;
  bool done = false;
  Clock::time_point last = due;
  SseReader events([&](absl::string_view data) {
    if (data == "[DONE]") return done = true;
    const Json event = Json::parse(data.begin(), data.end(), nullptr, /*allow_exceptions=*/false);
    if (!event.is_object() || event.contains("error")) {
      outcome.error = event.is_object() ? ErrorText(event.dump()) : "an event that is not JSON";
      return false;
    }
    if (event.contains("usage") && event["usage"].is_object()) {
      outcome.tokens = event["usage"].value("completion_tokens", int64_t{0});
    }
    if (!event.contains("choices") || event["choices"].empty()) return true;
    if (outcome.ttft == 0) {
      outcome.ttft = Seconds(due);
    } else {
      outcome.gaps.push_back(Seconds(last));
    }
    last = Clock::now();
    return true;
  });
  HttpCall call;
  call.address = load.address;
  call.door = load.door;
  call.method = "POST";
  call.path = "/v1/completions";
  call.accept = "text/event-stream";
  call.body = body.dump();
  call.on_body = [&](absl::string_view bytes) { return events.Push(bytes); };
  const absl::StatusOr<HttpReply> reply = Send(call);
  outcome.total = Seconds(due);
  if (!outcome.error.empty()) return outcome;
  if (!reply.ok()) {
    outcome.error = std::string(reply.status().message());
  } else if (reply->status != 200) {
    outcome.error = absl::StrCat(reply->status, " ", ErrorText(reply->body));
  } else if (!done) {
    outcome.error = "the stream ended without [DONE]";
  }
  return outcome;
}

// Nearest rank; values are sorted here.
double Percentile(std::vector<double>& values, double p) {
  if (values.empty()) return NAN;
  std::sort(values.begin(), values.end());
  const double rank = std::ceil(p / 100 * static_cast<double>(values.size()));
  return values[static_cast<size_t>(std::max(rank, 1.0)) - 1];
}

std::vector<Outcome> Run(const Load& load, bool quiet) {
  std::mt19937_64 draw(static_cast<uint64_t>(load.seed));
  std::exponential_distribution<double> gap(load.rate > 0 ? load.rate : 1);
  std::vector<Outcome> outcomes(load.requests);
  std::vector<std::thread> clients;
  std::mutex mutex;
  int64_t ended = 0, failed = 0;
  const Clock::time_point start = Clock::now() + std::chrono::milliseconds(50);
  double at = 0;
  const bool terminal = !quiet && IsTerminal(STDERR_FILENO);
  for (int64_t i = 0; i < load.requests; ++i) {
    if (load.rate > 0 && i > 0) at += gap(draw);
    const Clock::time_point due =
        start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(at));
    // A thread exists from a little before its request is due, so that open connections are the server's doing alone.
    std::this_thread::sleep_until(due - std::chrono::milliseconds(20));
    clients.emplace_back([&, i, due] {
      outcomes[i] = Ask(load, i, due);
      const std::lock_guard<std::mutex> lock(mutex);
      failed += outcomes[i].error.empty() ? 0 : 1;
      ++ended;
      if (terminal) {
        const double done = static_cast<double>(ended) / static_cast<double>(load.requests);
        std::fprintf(stderr, "\r%s  %d of %d answered, %d failed ", Bar(done, 24).c_str(), static_cast<int>(ended),
                     static_cast<int>(load.requests), static_cast<int>(failed));
      }
    });
  }
  for (std::thread& client : clients) client.join();
  if (terminal) std::fputs("\r\033[K", stderr);
  return outcomes;
}

struct Summary {
  int64_t answered = 0, failed = 0, tokens = 0;
  double span = 0;
  std::vector<double> ttft, itl, tpot, total;
  std::string first_error;
};

Summary Summarise(const std::vector<Outcome>& outcomes, double span) {
  Summary s;
  s.span = span;
  for (const Outcome& o : outcomes) {
    if (!o.error.empty()) {
      if (s.failed++ == 0) s.first_error = o.error;
      continue;
    }
    ++s.answered;
    s.tokens += o.tokens;
    s.ttft.push_back(o.ttft * 1e3);
    s.total.push_back(o.total * 1e3);
    for (const double gap : o.gaps) s.itl.push_back(gap * 1e3);
    if (o.tokens > 1) s.tpot.push_back((o.total - o.ttft) * 1e3 / static_cast<double>(o.tokens - 1));
  }
  return s;
}

void PrintTable(const Load& load, Summary& s) {
  std::printf("%d answered, %d failed in %.2f s: %.2f requests/s, %.1f output tokens/s\n", static_cast<int>(s.answered),
              static_cast<int>(s.failed), s.span, static_cast<double>(s.answered) / s.span,
              static_cast<double>(s.tokens) / s.span);
  std::printf("prompt %d tokens, output %d tokens, %s\n\n", static_cast<int>(load.prompt_tokens),
              static_cast<int>(load.output_tokens),
              load.rate > 0 ? absl::StrFormat("%.2f requests/s asked", load.rate).c_str() : "all at once");
  std::printf("%-16s %10s %10s %10s\n", "ms", "p50", "p90", "p99");
  const auto row = [](const char* name, std::vector<double>& values) {
    std::printf("%-16s %10.2f %10.2f %10.2f\n", name, Percentile(values, 50), Percentile(values, 90),
                Percentile(values, 99));
  };
  row("TTFT", s.ttft);
  row("ITL", s.itl);
  row("TPOT", s.tpot);
  row("end to end", s.total);
  if (s.failed > 0) std::printf("\nfirst failure: %s\n", s.first_error.c_str());
}

void PrintJson(const Load& load, Summary& s) {
  const auto three = [](std::vector<double>& values) -> Json {
    if (values.empty()) return nullptr;
    return {{"p50", Percentile(values, 50)}, {"p90", Percentile(values, 90)}, {"p99", Percentile(values, 99)}};
  };
  const Json out = {{"requests", load.requests},
                    {"answered", s.answered},
                    {"failed", s.failed},
                    {"prompt_tokens", load.prompt_tokens},
                    {"output_tokens", load.output_tokens},
                    {"rate", load.rate},
                    {"seconds", s.span},
                    {"output_tokens_per_second", static_cast<double>(s.tokens) / s.span},
                    {"ttft_ms", three(s.ttft)},
                    {"itl_ms", three(s.itl)},
                    {"tpot_ms", three(s.tpot)},
                    {"end_to_end_ms", three(s.total)},
                    {"first_failure", s.first_error}};
  std::printf("%s\n", out.dump(1).c_str());
}

}  // namespace

int RunBench(Arguments arguments) {
  Load load;
  bool json = false, quiet = false;
  Flags flags("bench", "Loads a running cluster and reports what its clients saw",
              "Open loop: requests leave at random times of the asked rate whether or not earlier ones are answered.\n"
              "Prompts are random token ids; answers have exactly --output-tokens tokens.\n\n"
              "  millrace bench --requests 1 --prompt-tokens 512 --output-tokens 256\n"
              "  millrace bench --requests 200 --rate 4 --json");
  DoorFlags way;
  AddDoorFlags(flags, &way);
  flags.Int("requests", &load.requests, 1, 100000, "Requests in all.");
  flags.Double("rate", &load.rate, 0, 100000, "Requests per second; 0 sends all at once.");
  flags.Int("prompt-tokens", &load.prompt_tokens, 1, 1 << 20, "Length of every prompt.");
  flags.Int("output-tokens", &load.output_tokens, 1, 1 << 20, "Length of every answer.");
  flags.Int("vocabulary", &load.vocabulary, 11, 1 << 24, "Ids are drawn from 10 up to this.");
  flags.Int("seed", &load.seed, 0, 1 << 30, "Of prompts and arrival times.");
  flags.Bool("json", &json, "One JSON object instead of a table.");
  flags.Bool("quiet", &quiet, "No progress.");
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "bench", arguments, &exit_code)) return exit_code;
  const absl::StatusOr<HttpDoor> door = OpenDoor(way);
  if (!door.ok()) return Fail("bench", kExitNoInput, door.status());
  load.address = way.address;
  load.door = *door;
  const absl::StatusOr<std::string> model = OnlyModel(load.address, load.door);
  if (!model.ok()) {
    return Fail("bench", kExitUnavailable, absl::StrCat(model.status().message(), "; is `millrace up` running?"));
  }
  load.model = *model;
  const Clock::time_point start = Clock::now();
  const std::vector<Outcome> outcomes = Run(load, quiet || json);
  Summary summary = Summarise(outcomes, Seconds(start));
  json ? PrintJson(load, summary) : PrintTable(load, summary);
  return summary.failed == 0 ? kExitOk : kExitFailure;
}

}  // namespace millrace::cli
