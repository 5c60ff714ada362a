// SPDX-License-Identifier: Apache-2.0
// `millrace run`: one request, the whole model in this process, no cluster.
//
// The reference that every cluster answer is compared with: requests are read by the HTTP front's own parser, tokens
// are drawn by the workers' own code, text is made by the front's own pipeline. What is missing is everything between.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "engine/engine.h"
#include "engine/status.h"
#include "nlohmann/json.hpp"
#include "services/cli/command.h"
#include "services/cli/model_loading.h"
#include "services/cli/terminal.h"
#include "services/common/generation_spec.h"
#include "services/router/choice_text.h"
#include "services/router/generation_wire.h"
#include "services/router/json_reader.h"
#include "services/router/openai_request.h"

namespace millrace::cli {
namespace {

using router::Json;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

struct RunFlags {
  ModelFlags model;
  std::string request, prompt, raw, effort;
  bool greedy = false, json = false, thinking = false;
  int64_t max_tokens = 0, seed = -1;
  double temperature = -1;
};

// The request body that the flags describe: a file's content, or one made around a text.
absl::StatusOr<Json> RequestBody(const RunFlags& flags, bool& is_chat) {
  Json body = Json::object();
  is_chat = true;
  if (!flags.request.empty()) {
    ASSIGN_OR_RETURN(const std::string text, ReadInput(flags.request));
    absl::StatusOr<Json> parsed = router::ReadJson(text);
    if (!parsed.ok()) {
      return absl::InvalidArgumentError(absl::StrCat(flags.request, ": ", parsed.status().message()));
    }
    if (parsed->is_array()) {
      body["messages"] = *std::move(parsed);
    } else {
      body = *std::move(parsed);
    }
    is_chat = !body.is_object() || !body.contains("prompt");
  } else if (!flags.raw.empty()) {
    body["prompt"] = flags.raw;
    is_chat = false;
  } else {
    body["messages"] = Json::array({Json{{"role", "user"}, {"content", flags.prompt}}});
  }
  if (!body.is_object()) return body;  // the parser says what it should have been
  if (flags.greedy) body["temperature"] = 0;
  if (flags.temperature >= 0) body["temperature"] = flags.temperature;
  if (flags.seed >= 0) body["seed"] = flags.seed;
  if (flags.max_tokens > 0) {
    body.erase("max_completion_tokens");
    body["max_tokens"] = flags.max_tokens;
  }
  if (flags.thinking && is_chat) body["thinking"] = Json{{"type", "enabled"}};
  if (!flags.effort.empty() && is_chat) body["reasoning_effort"] = flags.effort;
  return body;
}

struct Outcome {
  std::vector<int32_t> ids;
  std::vector<float> logprobs;
  text::CompletionDelta message;  // everything, joined
  std::string finish_reason;
  double prefill_s = 0, decode_s = 0;
};

// Reasoning and content as they come, on a terminal or a pipe; nothing with --json.
class Printer {
 public:
  explicit Printer(bool enabled) : enabled_(enabled), colour_(IsTerminal(STDOUT_FILENO)) {}
  void Show(const text::CompletionDelta& delta) {
    if (!enabled_) return;
    if (!delta.reasoning.empty()) {
      std::fputs(colour_ ? "\033[2m" : "", stdout);
      Write(delta.reasoning);
      std::fputs(colour_ ? "\033[0m" : "", stdout);
      reasoning_ = true;
    }
    if (!delta.content.empty()) {
      if (std::exchange(reasoning_, false)) std::fputs("\n\n", stdout);
      Write(delta.content);
    }
    for (const text::ToolCallDelta& call : delta.tool_calls) {
      if (call.starts) Write(absl::StrCat("\n[", call.name, "] "));
      Write(call.arguments);
    }
    std::fflush(stdout);
  }
  void End() {
    if (enabled_) std::fputs("\n", stdout);
  }

 private:
  static void Write(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }
  const bool enabled_, colour_;
  bool reasoning_ = false;
};

void Append(text::CompletionDelta& all, const text::CompletionDelta& delta) {
  all.reasoning += delta.reasoning;
  all.content += delta.content;
  for (const text::ToolCallDelta& call : delta.tool_calls) {
    if (call.starts || all.tool_calls.empty()) {
      all.tool_calls.push_back(call);
    } else {
      all.tool_calls[call.index].arguments += call.arguments;
    }
  }
}

absl::StatusOr<Outcome> Generate(Engine& engine, const text::Tokenizer& tokenizer, const router::ApiRequest& request,
                                 const router::GenerationRequest& generation, Printer& printer) {
  const v1::GenerationSpec spec = router::ToSpec(generation, {engine.config().eos_token_id});
  const std::vector<int32_t>& prompt = generation.prompt_ids;
  ASSIGN_OR_RETURN(const SequenceId sequence,
                   engine.NewSequence(static_cast<int64_t>(prompt.size()) + generation.max_tokens));
  TokenDraw draw(spec, prompt);
  router::ChoiceText text(request, tokenizer);
  Outcome outcome;
  const auto take = [&](const SampledToken& sampled) -> absl::StatusOr<v1::FinishReason> {
    if (!sampled.finite) return absl::InternalError("the model's logits are not finite");
    v1::Token token;
    const v1::FinishReason finish = draw.Accept(sampled, token);
    outcome.ids.push_back(static_cast<int32_t>(token.id()));
    outcome.logprobs.push_back(token.logprob());
    const text::CompletionDelta delta = text.Push(outcome.ids.back());
    printer.Show(delta);
    Append(outcome.message, delta);
    return finish;
  };

  Clock::time_point start = Clock::now();
  v1::FinishReason finish = v1::FINISH_REASON_UNSPECIFIED;
  const size_t step = static_cast<size_t>(engine.options().max_batch_tokens);
  for (size_t begin = 0; begin < prompt.size(); begin += step) {
    Chunk chunk;
    chunk.sequence = sequence;
    chunk.tokens = absl::MakeConstSpan(prompt).subspan(begin, step);
    if (begin + step >= prompt.size()) chunk.sampling = &draw.Request();
    ASSIGN_OR_RETURN(const std::vector<ChunkOutput> outputs, engine.Forward({&chunk, 1}));
    if (chunk.sampling != nullptr) {
      ASSIGN_OR_RETURN(finish, take(outputs[0].sampled));
    }
  }
  outcome.prefill_s = SecondsSince(start);
  start = Clock::now();
  while (finish == v1::FINISH_REASON_UNSPECIFIED && !text.stopped()) {
    const int32_t last = outcome.ids.back();
    Chunk chunk;
    chunk.sequence = sequence;
    chunk.tokens = {&last, 1};
    chunk.sampling = &draw.Request();
    ASSIGN_OR_RETURN(const std::vector<ChunkOutput> outputs, engine.Forward({&chunk, 1}));
    ASSIGN_OR_RETURN(finish, take(outputs[0].sampled));
  }
  outcome.decode_s = SecondsSince(start);
  const text::CompletionDelta rest = text.Finish();
  printer.Show(rest);
  Append(outcome.message, rest);
  engine.Release(sequence);
  outcome.finish_reason = !text.stopped() && finish == v1::FINISH_REASON_LENGTH ? "length"
                          : text.num_tool_calls() > 0                           ? "tool_calls"
                                                                                : "stop";
  return outcome;
}

Json MessageJson(const text::CompletionDelta& message) {
  Json json = {{"role", "assistant"}};
  if (!message.reasoning.empty()) json["reasoning_content"] = message.reasoning;
  json["content"] = message.content;
  for (const text::ToolCallDelta& call : message.tool_calls) {
    json["tool_calls"].push_back(
        Json{{"type", "function"}, {"function", Json{{"name", call.name}, {"arguments", call.arguments}}}});
  }
  return json;
}

void DeclareFlags(Flags& flags, RunFlags& run) {
  run.model.Declare(flags);
  flags.String("request", &run.request, "FILE",
               "A request as /v1/chat/completions or /v1/completions takes it, or a list of messages; - is standard "
               "input.");
  flags.String("prompt", &run.prompt, "TEXT", "One user message.");
  flags.String("raw", &run.raw, "TEXT", "Text to continue as it is, special tokens included.");
  flags.Int("max-tokens", &run.max_tokens, 1, 1 << 24, "Most tokens of the answer. Default: the request's, else 1024.");
  flags.Bool("greedy", &run.greedy, "Always the likeliest token.");
  flags.Double("temperature", &run.temperature, 0, 2, "Overrides the request's.");
  flags.Int("seed", &run.seed, 0, INT64_MAX, "Overrides the request's. Default: drawn, and printed with --json.");
  flags.Bool("thinking", &run.thinking, "Let the model think first.");
  flags.Enum("effort", &run.effort, {"none", "low", "high", "max"}, "How hard to think.");
  flags.Bool("json", &run.json, "Print one object: ids, logprobs, text, message, finish_reason, usage, seed, timings.");
}

}  // namespace

int RunRun(Arguments arguments) {
  RunFlags run;
  Flags flags("run", "Answers one request with the whole model in this process",
              "Give exactly one of --request, --prompt and --raw. Tokens and log-probabilities are those of any\n"
              "cluster that serves the same checkpoint with the same numerics, bit for bit.\n\n"
              "  millrace run deploy/demo/model --prompt 'Introduce yourself.'\n"
              "  millrace run deploy/demo/model --request request.json --greedy --json");
  DeclareFlags(flags, run);
  int exit_code = kExitOk;
  if (!ParseOrExplain(flags, "run", arguments, &exit_code)) return exit_code;
  run.max_tokens = flags.Given("max-tokens") ? run.max_tokens : 0;
  if (flags.Given("request") + flags.Given("prompt") + flags.Given("raw") != 1) {
    return Fail("run", kExitUsage, "give exactly one of --request FILE, --prompt TEXT and --raw TEXT");
  }

  const Clock::time_point start = Clock::now();
  const auto checkpoint = OpenCheckpoint(run.model);
  if (!checkpoint.ok()) return Fail("run", ModelExitCode(checkpoint.status()), checkpoint.status());
  const ModelConfig& config = (*checkpoint)->config();
  const auto tokenizer = LoadTokenizer(run.model.model, config);
  if (!tokenizer.ok()) return Fail("run", ModelExitCode(tokenizer.status()), tokenizer.status());

  router::ServedModel served;
  served.id = std::filesystem::path(run.model.model).lexically_normal().filename().string();
  served.context_length = static_cast<int32_t>(std::min<int64_t>(config.max_position_embeddings, INT32_MAX));
  served.vocab_size = static_cast<int32_t>(config.vocab_size);
  served.tokenizer = tokenizer->get();
  served.chat_defaults = DefaultChatOptions(config);
  served.default_max_tokens = 1024;
  bool is_chat = true;
  absl::StatusOr<Json> body = RequestBody(run, is_chat);
  if (!body.ok()) return Fail("run", kExitNoInput, body.status());
  if (body->is_object()) (*body)["model"] = served.id;  // whatever name a cluster gives it
  const absl::StatusOr<router::ApiRequest> request =
      is_chat ? router::ParseChatRequest(*body, served, {}) : router::ParseCompletionRequest(*body, served, {});
  if (!request.ok()) return Fail("run", kExitNoInput, request.status());
  if (request->n != 1) return Fail("run", kExitNoInput, "n: run draws one choice; send the request to a cluster");
  if (request->prompts.size() != 1) {
    return Fail("run", kExitNoInput, "prompt: run answers one prompt; send the request to a cluster");
  }

  router::GenerationRequest generation;
  generation.request_id = "run";
  generation.prompt_ids = request->prompts.front();
  generation.sampling = request->sampling;
  if (!request->has_seed) generation.sampling.seed = std::random_device{}();
  generation.max_tokens = request->max_tokens;
  generation.min_tokens = request->min_tokens;
  generation.ignore_eos = request->ignore_eos;
  generation.num_logprobs = std::max(request->num_logprobs, 0);
  const auto engine =
      LoadEngine(run.model, *checkpoint,
                 {.context_tokens = static_cast<int64_t>(generation.prompt_ids.size()) + generation.max_tokens});
  if (!engine.ok()) return Fail("run", ModelExitCode(engine.status()), engine.status());
  const double load_s = SecondsSince(start);

  Printer printer(!run.json);
  const absl::StatusOr<Outcome> outcome = Generate(**engine, **tokenizer, *request, generation, printer);
  if (!outcome.ok()) return Fail("run", kExitSoftware, outcome.status());
  printer.End();
  const double decoded = static_cast<double>(outcome->ids.size()) - 1;
  const double prompt_tokens = static_cast<double>(generation.prompt_ids.size());
  if (run.json) {
    const Json object = {
        {"ids", outcome->ids},
        {"logprobs", outcome->logprobs},
        {"text", (*tokenizer)->Decode(outcome->ids, /*skip_special=*/request->is_chat)},
        {"message", MessageJson(outcome->message)},
        {"finish_reason", outcome->finish_reason},
        {"usage", {{"prompt_tokens", generation.prompt_ids.size()}, {"completion_tokens", outcome->ids.size()}}},
        {"seed", generation.sampling.seed},
        {"numerics", std::string(NumericsName((*engine)->options().numerics))},
        {"kernel_set", (*engine)->KernelSet()},
        {"timings",
         {{"load_s", load_s},
          {"prefill_s", outcome->prefill_s},
          {"decode_s", outcome->decode_s},
          {"prefill_tokens_per_s", outcome->prefill_s > 0 ? prompt_tokens / outcome->prefill_s : 0},
          {"decode_tokens_per_s", outcome->decode_s > 0 ? decoded / outcome->decode_s : 0}}}};
    std::printf("%s\n", object.dump(-1, ' ', false, Json::error_handler_t::replace).c_str());
  } else if (!run.model.quiet && IsTerminal(STDERR_FILENO)) {
    std::fprintf(stderr, "%s\n",
                 absl::StrFormat("%d prompt tokens in %s, %d tokens at %.0f a second", generation.prompt_ids.size(),
                                 HumanSeconds(outcome->prefill_s), outcome->ids.size(),
                                 outcome->decode_s > 0 ? decoded / outcome->decode_s : 0.0)
                     .c_str());
  }
  return kExitOk;
}

}  // namespace millrace::cli
