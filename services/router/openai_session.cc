// SPDX-License-Identifier: Apache-2.0
// See openai_session.h.
#include "services/router/openai_session.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include "absl/strings/str_cat.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/http_status.h"
#include "services/router/choice_text.h"
#include "services/router/openai_response.h"
#include "services/router/sse.h"

namespace millrace::router {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// What a trace says of an HTTP status.
absl::StatusCode TraceCode(int http_status) {
  if (http_status < 400) return absl::StatusCode::kOk;
  if (http_status == 499) return absl::StatusCode::kCancelled;
  return http_status < 500 ? absl::StatusCode::kInvalidArgument : absl::StatusCode::kInternal;
}

// The id without its prefix, so that reply ids look like OpenAI's.
std::string ReplyId(bool is_chat, const std::string& generation_id) {
  const size_t dash = generation_id.find('-');
  return absl::StrCat(is_chat ? "chatcmpl-" : "cmpl-", generation_id.substr(dash == std::string::npos ? 0 : dash + 1));
}

class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(SessionContext context, ApiRequest request)
      : context_(std::move(context)),
        request_(std::move(request)),
        writer_(request_.is_chat, ReplyId(request_.is_chat, context_.generation_id), context_.model->id,
                static_cast<int64_t>(std::time(nullptr)), request_.include_usage) {
    context_.metrics->requests_running().Increment();
    context_.metrics->requests_waiting().Increment();
  }

  ~Session() { End(499); }  // a server that stops drops what was posted, and with it the session

  void Start();

  void OnAdmitted(int32_t index, GenerationAdmission admission);
  void OnToken(int32_t index, GeneratedToken token);
  void OnFinish(int32_t index, GenerationEnd end, GenerationUsage usage);
  void OnError(int32_t index, const absl::Status& status);

 private:
  struct Choice {
    Choice(const ApiRequest& request, const text::Tokenizer& tokenizer) : text(request, tokenizer) {}
    std::unique_ptr<Generation> generation;
    ChoiceText text;
    ReplyChoice reply;
    bool role_sent = false;
    bool done = false;
    int64_t tokens = 0;
    int64_t cached_tokens = 0;
    Clock::time_point first_token_at, last_token_at;
    std::vector<GeneratedToken> unsent_logprobs;  // in a stream since the last chunk, else of the whole choice
    int64_t text_offset = 0;
    std::vector<std::string> call_ids;
  };

  void BeginStream();
  void SendRole(Choice& choice);
  void Deliver(Choice& choice, text::CompletionDelta delta);
  void FinishChoice(Choice& choice, std::string_view reason);
  void FinishAll();
  void Fail(const absl::Status& status);
  void OnSlowReader();
  void OnTimer();
  void ArmTimer();
  void WriteEvent(std::string_view json);
  std::string EchoOf(const Choice& choice) const {
    return request_.echoes.empty() ? "" : request_.echoes[choice.reply.index / request_.n];
  }
  Json TakeLogprobs(Choice& choice);
  ReplyUsage Usage() const;
  int64_t DeliveredTokens() const;
  void CancelAll();
  void End(int code);

  const SessionContext context_;
  const ApiRequest request_;
  const ReplyWriter writer_;
  std::vector<Choice> choices_;
  size_t choices_done_ = 0;
  bool stream_begun_ = false;
  bool first_token_seen_ = false;
  bool ended_ = false;
  Clock::time_point last_write_at_ = Clock::now();
};

// Carries one choice's calls to the strand.
class ChoiceSink : public GenerationSink {
 public:
  ChoiceSink(std::shared_ptr<Session> session, std::shared_ptr<HttpExchange> exchange, int32_t index)
      : session_(std::move(session)), exchange_(std::move(exchange)), index_(index) {}

  void OnAdmitted(GenerationAdmission admission) override {
    exchange_->Post([session = session_, index = index_, admission] { session->OnAdmitted(index, admission); });
  }
  void OnToken(GeneratedToken token) override {
    exchange_->Post([session = session_, index = index_, token = std::move(token)]() mutable {
      session->OnToken(index, std::move(token));
    });
  }
  void OnFinish(GenerationEnd end, GenerationUsage usage) override {
    exchange_->Post([session = session_, index = index_, end, usage] { session->OnFinish(index, end, usage); });
  }
  void OnError(absl::Status status) override {
    exchange_->Post(
        [session = session_, index = index_, status = std::move(status)] { session->OnError(index, status); });
  }

 private:
  const std::shared_ptr<Session> session_;
  const std::shared_ptr<HttpExchange> exchange_;
  const int32_t index_;
};

void Session::Start() {
  HttpExchange::Callbacks callbacks;
  callbacks.on_gone = [self = shared_from_this()] { self->End(499); };
  callbacks.on_pause = [self = shared_from_this()](bool paused) {
    for (auto& choice : self->choices_) {
      if (choice.generation) choice.generation->SetPaused(paused);
    }
  };
  callbacks.on_slow_reader = [self = shared_from_this()] { self->OnSlowReader(); };
  callbacks.on_timer = [self = shared_from_this()] { self->OnTimer(); };
  context_.exchange->SetCallbacks(std::move(callbacks));
  ArmTimer();

  // As OpenAI numbers them: all choices of the first prompt, then those of the next.
  const int32_t num_choices = static_cast<int32_t>(request_.prompts.size()) * request_.n;
  choices_.reserve(num_choices);
  for (int32_t i = 0; i < num_choices; ++i) {
    choices_.emplace_back(request_, *context_.model->tokenizer);
    choices_[i].reply.index = i;
    choices_[i].reply.content = EchoOf(choices_[i]);
    choices_[i].text_offset = 0;
  }
  for (int32_t i = 0; i < num_choices; ++i) {
    GenerationRequest generation;
    generation.request_id = context_.request_id;
    generation.trace = context_.trace;
    generation.choice = i % request_.n;  // with one seed, a prompt has the answers that it has when sent alone
    generation.prompt_ids = request_.prompts[i / request_.n];
    generation.sampling = request_.sampling;
    generation.max_tokens = request_.max_tokens;
    generation.min_tokens = request_.min_tokens;
    generation.ignore_eos = request_.ignore_eos;
    generation.num_logprobs = request_.num_logprobs;
    generation.cache_salt = request_.cache_salt;
    generation.deadline = context_.deadline;
    auto started = context_.generations->Start(std::move(generation),
                                               std::make_shared<ChoiceSink>(shared_from_this(), context_.exchange, i));
    if (!started.ok()) return Fail(started.status());
    choices_[i].generation = *std::move(started);
  }
}

void Session::OnAdmitted(int32_t index, GenerationAdmission admission) {
  if (ended_) return;
  Choice& choice = choices_[index];
  choice.cached_tokens = admission.cached_prompt_tokens;
  if (!request_.stream) return;
  BeginStream();
  SendRole(choice);
}

void Session::OnToken(int32_t index, GeneratedToken token) {
  if (ended_) return;
  Choice& choice = choices_[index];
  if (choice.done) return;  // drawn before the cancel that a stop string sent
  if (token.index != choice.tokens) {
    return Fail(absl::InternalError(
        absl::StrCat("choice ", index, ": token ", token.index, " where ", choice.tokens, " was next")));
  }
  const auto now = Clock::now();
  if (!first_token_seen_) {
    first_token_seen_ = true;
    context_.metrics->requests_waiting().Decrement();
    context_.metrics->ObserveTimeToFirstToken(SecondsSince(context_.received_at));
  } else if (choice.tokens > 0) {
    context_.metrics->ObserveInterToken(std::chrono::duration<double>(now - choice.last_token_at).count());
  }
  if (choice.tokens == 0) choice.first_token_at = now;
  choice.last_token_at = now;
  ++choice.tokens;
  text::CompletionDelta delta = choice.text.Push(token.id);
  if (request_.num_logprobs >= 0) choice.unsent_logprobs.push_back(std::move(token));
  Deliver(choice, std::move(delta));
  if (!ended_ && choice.text.stopped()) {
    choice.generation.reset();  // cancels
    FinishChoice(choice, "stop");
  }
}

void Session::OnFinish(int32_t index, GenerationEnd end, GenerationUsage usage) {
  if (ended_ || choices_[index].done) return;
  Choice& choice = choices_[index];
  choice.cached_tokens = usage.cached_prompt_tokens;
  if (usage.completion_tokens != choice.tokens) {
    return Fail(absl::DataLossError(
        absl::StrCat("choice ", index, ": ", usage.completion_tokens, " tokens drawn, ", choice.tokens, " received")));
  }
  FinishChoice(choice, end == GenerationEnd::kLength ? "length" : "stop");
}

void Session::OnError(int32_t index, const absl::Status& status) {
  if (ended_ || choices_[index].done) return;
  Fail(status);
}

void Session::BeginStream() {
  if (stream_begun_) return;
  stream_begun_ = true;
  HttpResponse head = SseHead();
  head.headers.insert(head.headers.end(), context_.headers.begin(), context_.headers.end());
  context_.exchange->StartStream(std::move(head));
}

void Session::SendRole(Choice& choice) {
  if (choice.role_sent) return;
  choice.role_sent = true;
  if (request_.is_chat) {
    WriteEvent(writer_.RoleChunk(choice.reply.index));
  } else if (!EchoOf(choice).empty()) {
    WriteEvent(writer_.DeltaChunk(choice.reply.index, {.content = EchoOf(choice)}, {}, nullptr));
  }
}

void Session::Deliver(Choice& choice, text::CompletionDelta delta) {
  for (const auto& call : delta.tool_calls) {
    while (choice.call_ids.size() <= static_cast<size_t>(call.index)) {
      const std::string id = NewRequestId();
      choice.call_ids.push_back(absl::StrCat("call_", id.substr(id.find('-') + 1)));
    }
  }
  if (request_.stream) {
    if (delta.empty()) return;
    BeginStream();
    SendRole(choice);
    return WriteEvent(writer_.DeltaChunk(choice.reply.index, delta, choice.call_ids, TakeLogprobs(choice)));
  }
  ReplyChoice& reply = choice.reply;
  reply.content += delta.content;
  reply.reasoning += delta.reasoning;
  for (auto& call : delta.tool_calls) {
    if (reply.tool_calls.size() <= static_cast<size_t>(call.index)) reply.tool_calls.resize(call.index + 1);
    auto& whole = reply.tool_calls[call.index];
    if (call.starts) whole.id = choice.call_ids[call.index], whole.name = call.name;
    whole.arguments += call.arguments;
  }
}

void Session::FinishChoice(Choice& choice, std::string_view reason) {
  choice.done = true;
  Deliver(choice, choice.text.Finish());
  if (ended_) return;  // the last piece was one too many for a slow reader
  // A call that was cut off by the length limit is not a call to make.
  if (reason == "stop" && choice.text.num_tool_calls() > 0) reason = "tool_calls";
  if (!choice.text.tool_calls_readable()) context_.metrics->CountUnreadableToolCall();
  choice.generation.reset();
  choice.reply.finish_reason = std::string(reason);
  if (request_.stream) {
    BeginStream();
    SendRole(choice);
    WriteEvent(writer_.FinishChunk(choice.reply.index, reason, TakeLogprobs(choice)));
  } else {
    choice.reply.logprobs = TakeLogprobs(choice);
  }
  if (!ended_ && ++choices_done_ == choices_.size()) FinishAll();
}

void Session::FinishAll() {
  const ReplyUsage usage = Usage();
  for (const Choice& choice : choices_) {
    context_.metrics->ObserveCompletionTokens(choice.tokens);
    if (choice.tokens < 2) continue;
    const std::chrono::duration<double> after_first = choice.last_token_at - choice.first_token_at;
    context_.metrics->ObserveTimePerOutputToken(after_first.count() / static_cast<double>(choice.tokens - 1));
  }
  context_.metrics->ObservePromptTokens(usage.prompt_tokens);
  if (request_.stream) {
    if (request_.include_usage) WriteEvent(writer_.UsageChunk(usage));
    if (ended_) return;
    context_.exchange->Write(kSseDone);
    context_.exchange->EndStream(/*close=*/false);
  } else {
    std::vector<ReplyChoice> replies;
    for (Choice& choice : choices_) replies.push_back(std::move(choice.reply));
    HttpResponse response{.body = writer_.Whole(replies, usage)};
    response.headers = context_.headers;
    context_.exchange->Respond(std::move(response));
  }
  End(200);
}

void Session::Fail(const absl::Status& status) {
  if (ended_) return;
  const HttpError error = ToHttpError(status);
  if (stream_begun_) {
    context_.exchange->Write(SseEvent(error.ToJson(context_.request_id, DeliveredTokens())));
    context_.exchange->EndStream(/*close=*/true);
  } else {
    context_.exchange->Respond(ErrorResponse(status, context_.request_id, context_.headers));
  }
  End(error.http_status);
}

// The events that the client never fetched are gone, so how many tokens it has is not known here.
void Session::OnSlowReader() {
  if (ended_) return;
  const HttpError error = ToHttpError(MakeError(absl::StatusCode::kAborted, "The client reads too slowly.",
                                                {.code = "slow_consumer", .http_status = 408}));
  CancelAll();
  context_.exchange->DropUnsent();
  context_.exchange->Write(SseEvent(error.ToJson(context_.request_id)));
  context_.exchange->EndStream(/*close=*/true);
  End(error.http_status);
}

void Session::OnTimer() {
  if (ended_) return;
  const auto now = Clock::now();
  // The cluster keeps deadlines itself and answers first; this is for when it does not.
  if (now >= context_.deadline + context_.limits.deadline_grace) {
    return Fail(absl::DeadlineExceededError("no answer from the cluster by the deadline"));
  }
  if (request_.stream && now >= last_write_at_ + context_.limits.ping_interval) {
    BeginStream();
    context_.exchange->Write(kSsePing);
    last_write_at_ = now;
  }
  if (!ended_) ArmTimer();
}

void Session::ArmTimer() {
  auto due = context_.deadline + context_.limits.deadline_grace;
  if (request_.stream) due = std::min(due, last_write_at_ + context_.limits.ping_interval);
  const auto delay = std::chrono::ceil<std::chrono::milliseconds>(due - Clock::now());
  context_.exchange->SetTimer(std::max(delay, std::chrono::milliseconds(1)));
}

void Session::WriteEvent(std::string_view json) {
  if (ended_) return;
  last_write_at_ = Clock::now();
  context_.exchange->Write(SseEvent(json));
}

Json Session::TakeLogprobs(Choice& choice) {
  if (request_.num_logprobs < 0 || choice.unsent_logprobs.empty()) return nullptr;
  Json logprobs = writer_.LogprobsJson(choice.unsent_logprobs, *context_.model->tokenizer, choice.text_offset);
  choice.unsent_logprobs.clear();
  return logprobs;
}

ReplyUsage Session::Usage() const {
  ReplyUsage usage;
  for (size_t i = 0; i < request_.prompts.size(); ++i) {
    usage.prompt_tokens += static_cast<int64_t>(request_.prompts[i].size());
    usage.cached_tokens += choices_[i * request_.n].cached_tokens;  // the others find what the first left in the cache
  }
  for (const Choice& choice : choices_) {
    usage.completion_tokens += choice.tokens;
    usage.reasoning_tokens += choice.text.reasoning_tokens();
  }
  return usage;
}

int64_t Session::DeliveredTokens() const {
  int64_t tokens = 0;
  for (const Choice& choice : choices_) tokens += choice.tokens;
  return tokens;
}

void Session::CancelAll() {
  for (Choice& choice : choices_) choice.generation.reset();
}

void Session::End(int code) {
  if (ended_) return;
  ended_ = true;
  CancelAll();
  if (!first_token_seen_) context_.metrics->requests_waiting().Decrement();
  context_.metrics->requests_running().Decrement();
  context_.metrics->CountRequest(context_.route, code);
  context_.metrics->ObserveDuration(code, SecondsSince(context_.received_at));
  if (context_.trace != nullptr) {
    int64_t prompt_tokens = 0;
    for (const auto& prompt : request_.prompts) prompt_tokens += static_cast<int64_t>(prompt.size());
    context_.trace->AddNumber(0, "input_tokens", prompt_tokens);
    context_.trace->AddNumber(0, "output_tokens", DeliveredTokens());
    context_.trace->Close(MonotonicNow(), TraceCode(code), code);
  }
  context_.on_end();
}

}  // namespace

void StartSession(SessionContext context, ApiRequest request) {
  std::make_shared<Session>(std::move(context), std::move(request))->Start();
}

HttpResponse ErrorResponse(const absl::Status& status, const std::string& request_id,
                           const std::vector<std::pair<std::string, std::string>>& headers) {
  const HttpError error = ToHttpError(status);
  HttpResponse response{.status = error.http_status, .headers = headers, .body = error.ToJson(request_id)};
  if (error.retry_after_s) response.headers.emplace_back("Retry-After", absl::StrCat(*error.retry_after_s));
  return response;
}

}  // namespace millrace::router
