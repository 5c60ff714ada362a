// SPDX-License-Identifier: Apache-2.0
// gRPC calls to generations and back: one reactor per call, which is also the sink of its generation.
#include "services/router/router_service.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <deque>
#include <optional>
#include <random>
#include <string_view>
#include <utility>

#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/grpc_status.h"
#include "services/common/http_status.h"
#include "services/router/choice_text.h"
#include "services/router/http_server.h"
#include "services/router/inference_request.h"

namespace millrace::router {

// A caller's name for a request, unique among tenants -> how to cancel that call. Shared with reactors, which may
// outlive the service's last method call.
class RouterService::Running {
 public:
  // False: an id that is running already.
  bool Add(const std::string& id, const void* call, std::function<void()> cancel) {
    absl::MutexLock lock(&mutex_);
    return calls_.emplace(id, Call{call, std::move(cancel)}).second;
  }
  // Only its own entry: the id may be another call's by now.
  void Remove(const std::string& id, const void* call) {
    absl::MutexLock lock(&mutex_);
    const auto found = calls_.find(id);
    if (found != calls_.end() && found->second.call == call) calls_.erase(found);
  }
  bool Cancel(const std::string& id) {
    std::function<void()> cancel;
    {
      absl::MutexLock lock(&mutex_);
      const auto found = calls_.find(id);
      if (found == calls_.end()) return false;
      cancel = found->second.cancel;
    }
    cancel();
    return true;
  }

 private:
  struct Call {
    const void* call;
    std::function<void()> cancel;
  };
  absl::Mutex mutex_;
  std::map<std::string, Call> calls_ ABSL_GUARDED_BY(mutex_);
};

namespace {

// Events that wait for a slow reader: beyond the first bound the sequence pauses, at the second the call ends.
constexpr size_t kPauseAtEvents = 1024;
constexpr size_t kEndAtEvents = 4096;

// grpc_status.h says it in the status; what gRPC itself understands goes beside it.
grpc::Status PublicStatus(grpc::CallbackServerContext* context, const absl::Status& status) {
  if (const auto retry_after_s = ToHttpError(status).retry_after_s) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms", absl::StrCat(int64_t{*retry_after_s} * 1000));
  }
  return ToPublicGrpcStatus(status);
}

// Ids are a tenant's own: nobody can occupy, abort or find out another's.
std::string RunningId(const std::string& tenant, const std::string& request_id) {
  return absl::StrCat(tenant, "/", request_id);
}

void FillToken(const GeneratedToken& from, v1::Token* to) {
  to->set_index(static_cast<uint64_t>(from.index));
  to->set_id(static_cast<uint32_t>(from.id));
  to->set_logprob(from.logprob);
  for (const TokenLogprob& top : from.top_logprobs) {
    v1::TokenLogprob* entry = to->add_top_logprobs();
    entry->set_id(static_cast<uint32_t>(top.id));
    entry->set_logprob(top.logprob);
  }
}

void FillDelta(const text::CompletionDelta& delta, v1::GenerateEvent* event) {
  event->mutable_tokens()->set_text(delta.content);
}
void FillDelta(const text::CompletionDelta& delta, v1::ChatEvent* event) {
  v1::ChatDelta* out = event->mutable_delta();
  out->set_content(delta.content);
  out->set_reasoning_content(delta.reasoning);
  for (const text::ToolCallDelta& call : delta.tool_calls) {
    v1::ToolCallDelta* entry = out->add_tool_calls();
    entry->set_index(static_cast<uint32_t>(call.index));
    if (call.starts) {
      entry->set_id("call_" + NewRequestId().substr(4));
      entry->set_name(call.name);
    }
    entry->set_arguments_delta(call.arguments);
  }
}
v1::Token* AddToken(v1::GenerateEvent* event) { return event->mutable_tokens()->add_tokens(); }
v1::Token* AddToken(v1::ChatEvent* event) { return event->mutable_delta()->add_tokens(); }
bool Empty(const v1::GenerateEvent& event) { return event.tokens().text().empty() && event.tokens().tokens().empty(); }
bool Empty(const v1::ChatEvent& event) {
  return event.delta().content().empty() && event.delta().reasoning_content().empty() &&
         event.delta().tool_calls().empty() && event.delta().tokens().empty();
}

// One call. Referenced by gRPC until OnDone and by the generation as its sink.
template <typename Event>
class CallReactor final : public grpc::ServerWriteReactor<Event>, public GenerationSink {
 public:
  CallReactor(grpc::CallbackServerContext* context, std::shared_ptr<RouterService::Running> running, bool all_tokens,
              TraceLog* traces)
      : context_(context), running_(std::move(running)), all_tokens_(all_tokens), traces_(traces) {}

  // Never fails: what is wrong becomes the call's status.
  void Start(std::shared_ptr<CallReactor> self, const std::string& tenant, std::shared_ptr<Permit> permit,
             std::string request_id, absl::StatusOr<ApiRequest> request, const text::Tokenizer& tokenizer,
             GenerationService& generations) {
    self_ = std::move(self);
    permit_ = std::move(permit);
    if (request_id.empty()) request_id = NewRequestId();
    BeginTrace(request_id);
    if (!request.ok()) return End(request.status());
    running_id_ = RunningId(tenant, request_id);
    const std::weak_ptr<CallReactor> weak = self_;
    if (!running_->Add(running_id_, this, [weak] {
          if (const auto call = weak.lock()) call->CancelGeneration();
        })) {
      return End(MakeError(absl::StatusCode::kAlreadyExists, "a request with this id is running",
                           {.code = "duplicate_request_id", .param = "request_id"}));
    }
    request_id_ = request_id;
    request_ = *std::move(request);
    text_.emplace(request_, tokenizer);
    Charge(static_cast<int64_t>(request_.prompts.front().size()));

    GenerationRequest generation;
    // Unique even if the caller uses an id again.
    generation.request_id = request_id;
    generation.trace = trace_;
    generation.prompt_ids = request_.prompts.front();
    generation.sampling = request_.sampling;
    if (!request_.has_seed) generation.sampling.seed = std::random_device{}();
    seed_ = generation.sampling.seed;
    generation.max_tokens = request_.max_tokens;
    generation.min_tokens = request_.min_tokens;
    generation.ignore_eos = request_.ignore_eos;
    generation.num_logprobs = request_.num_logprobs;
    generation.cache_salt = TenantSalt(tenant, request_.cache_salt);
    const auto left = context_->deadline() - std::chrono::system_clock::now();
    if (left < std::chrono::hours(2)) {  // no deadline reads as one far away
      generation.deadline =
          std::chrono::steady_clock::now() + std::chrono::duration_cast<std::chrono::steady_clock::duration>(left);
    }
    auto started = generations.Start(std::move(generation), self_);
    absl::MutexLock lock(&mutex_);
    if (!started.ok()) return EndLocked(started.status());
    if (!ended_) generation_ = *std::move(started);
  }

  void OnAdmitted(GenerationAdmission admission) override {
    absl::MutexLock lock(&mutex_);
    usage_.set_cached_prompt_tokens(static_cast<uint64_t>(admission.cached_prompt_tokens));
  }

  void OnToken(GeneratedToken token) override {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    ++completion_tokens_;
    Charge(1);
    Event event;
    FillDelta(text_->Push(token.id), &event);
    if (all_tokens_ || request_.num_logprobs >= 0) FillToken(token, AddToken(&event));
    if (!Empty(event)) Queue(std::move(event));
    if (text_->stopped()) Complete(v1::FINISH_REASON_STOP);
  }

  void OnFinish(GenerationEnd end, GenerationUsage usage) override {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    usage_.set_cached_prompt_tokens(static_cast<uint64_t>(usage.cached_prompt_tokens));
    Complete(end == GenerationEnd::kLength ? v1::FINISH_REASON_LENGTH : v1::FINISH_REASON_STOP);
  }

  void OnError(absl::Status status) override {
    absl::MutexLock lock(&mutex_);
    EndLocked(std::move(status));
  }

  void OnWriteDone(bool ok) override {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (!ok) {
      events_.clear();  // nobody reads them; the call may have ended already, and still has to be finished below
      EndLocked(absl::CancelledError("the caller has gone"));
    }
    if (paused_ && events_.size() < kPauseAtEvents / 2 && generation_ != nullptr) {
      paused_ = false;
      generation_->SetPaused(false);
    }
    WriteNext();
  }

  void OnCancel() override { CancelGeneration(); }

  void OnDone() override {
    CancelGeneration();
    self_.reset();
  }

  void CancelGeneration() {
    std::unique_ptr<Generation> generation;
    {
      absl::MutexLock lock(&mutex_);
      generation = std::move(generation_);
      EndLocked(absl::CancelledError("cancelled"));
    }
  }

 private:
  void BeginTrace(const std::string& request_id) {
    if (traces_ == nullptr) return;
    const auto& metadata = context_->client_metadata();
    const auto header = metadata.find("traceparent");
    const std::string_view parent =
        header == metadata.end() ? "" : std::string_view(header->second.data(), header->second.size());
    trace_ = traces_->Begin(request_id, all_tokens_ ? "millrace.v1.Inference/Generate" : "millrace.v1.Inference/Chat",
                            parent, MonotonicNow());
  }
  void Complete(v1::FinishReason reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    Event rest;
    FillDelta(text_->Finish(), &rest);
    if (!Empty(rest)) Queue(std::move(rest));
    if (reason == v1::FINISH_REASON_STOP && text_->num_tool_calls() > 0) reason = v1::FINISH_REASON_TOOL_CALLS;
    Event last;
    v1::GenerationEnd* end = last.mutable_end();
    end->set_reason(reason);
    usage_.set_prompt_tokens(request_.prompts.front().size());
    usage_.set_completion_tokens(static_cast<uint64_t>(completion_tokens_));
    usage_.set_reasoning_tokens(static_cast<uint64_t>(text_->reasoning_tokens()));
    *end->mutable_usage() = usage_;
    end->set_seed(seed_);
    end->set_request_id(request_id_);
    Queue(std::move(last));
    EndLocked(absl::OkStatus());
  }

  void Charge(int64_t tokens) {
    if (permit_ != nullptr) permit_->ChargeTokens(tokens, std::chrono::steady_clock::now());
  }

  void End(absl::Status status) {
    absl::MutexLock lock(&mutex_);
    EndLocked(std::move(status));
  }
  // Nothing is queued any more; an error overtakes what is queued, a good end does not.
  void EndLocked(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (ended_) return;
    ended_ = true;
    running_->Remove(running_id_, this);  // there is nothing left to abort
    if (permit_ != nullptr) permit_->Release();
    if (trace_ != nullptr) {
      if (!request_.prompts.empty()) {
        trace_->AddNumber(0, "input_tokens", static_cast<int64_t>(request_.prompts.front().size()));
      }
      trace_->AddNumber(0, "output_tokens", completion_tokens_);
      trace_->Close(MonotonicNow(), status.code());
    }
    if (!status.ok()) events_.clear();
    end_ = std::move(status);
    WriteNext();
  }
  void Queue(Event event) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    events_.push_back(std::move(event));
    if (events_.size() >= kEndAtEvents) {
      if (generation_ != nullptr) generation_->Cancel();
      return EndLocked(
          MakeError(absl::StatusCode::kResourceExhausted, "the caller reads too slowly", {.code = "slow_consumer"}));
    }
    if (events_.size() >= kPauseAtEvents && !paused_ && generation_ != nullptr) {
      paused_ = true;
      generation_->SetPaused(true);
    }
    WriteNext();
  }
  void WriteNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    if (writing_ || finished_) return;
    if (!events_.empty()) {
      outgoing_ = std::move(events_.front());
      events_.pop_front();
      writing_ = true;
      this->StartWrite(&outgoing_);
    } else if (ended_) {
      finished_ = true;
      this->Finish(end_.ok() ? grpc::Status::OK : PublicStatus(context_, end_));
    }
  }

  grpc::CallbackServerContext* const context_;
  const std::shared_ptr<RouterService::Running> running_;
  const bool all_tokens_;
  TraceLog* const traces_;
  std::shared_ptr<RequestTrace> trace_;  // set before anything can end the call
  std::shared_ptr<CallReactor> self_;    // until OnDone
  std::shared_ptr<Permit> permit_;       // null: no keys are asked for
  std::string request_id_, running_id_;
  ApiRequest request_;
  uint64_t seed_ = 0;

  absl::Mutex mutex_;
  std::optional<ChoiceText> text_ ABSL_GUARDED_BY(mutex_);
  std::unique_ptr<Generation> generation_ ABSL_GUARDED_BY(mutex_);
  std::deque<Event> events_ ABSL_GUARDED_BY(mutex_);
  Event outgoing_ ABSL_GUARDED_BY(mutex_);
  v1::Usage usage_ ABSL_GUARDED_BY(mutex_);
  int64_t completion_tokens_ ABSL_GUARDED_BY(mutex_) = 0;
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  bool writing_ ABSL_GUARDED_BY(mutex_) = false;
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool finished_ ABSL_GUARDED_BY(mutex_) = false;
  bool paused_ ABSL_GUARDED_BY(mutex_) = false;
};

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(status.ok() ? grpc::Status::OK : PublicStatus(context, status));
  return reactor;
}

}  // namespace

RouterService::RouterService(RouterServiceOptions options)
    : options_(std::move(options)), running_(std::make_shared<Running>()) {}

RouterService::~RouterService() = default;

absl::StatusOr<std::string> RouterService::Authenticate(const grpc::CallbackServerContext& context) const {
  if (options_.keys == nullptr) return std::string();
  const auto& metadata = context.client_metadata();
  const auto found = metadata.find("authorization");
  std::optional<std::string_view> given;
  if (found != metadata.end()) given.emplace(found->second.data(), found->second.size());
  return options_.keys->Authenticate(given, ApiKeys::Door::kPublic);
}

template <typename Event, typename Parse>
grpc::ServerWriteReactor<Event>* RouterService::StartCall(grpc::CallbackServerContext* context,
                                                          const std::string& request_id, bool all_tokens, Parse parse) {
  auto call = std::make_shared<CallReactor<Event>>(context, running_, all_tokens, options_.traces);
  const absl::StatusOr<std::string> tenant = Authenticate(*context);
  absl::StatusOr<std::shared_ptr<Permit>> permit = std::shared_ptr<Permit>();
  if (tenant.ok() && options_.keys != nullptr) permit = options_.keys->Admit(*tenant, std::chrono::steady_clock::now());
  absl::StatusOr<ApiRequest> request = !tenant.ok()   ? tenant.status()
                                       : !permit.ok() ? absl::StatusOr<ApiRequest>(permit.status())
                                                      : parse();
  call->Start(call, tenant.value_or(""), permit.value_or(nullptr), request_id, std::move(request),
              *options_.model.tokenizer, *options_.generations);
  return call.get();
}

grpc::ServerWriteReactor<v1::GenerateEvent>* RouterService::Generate(grpc::CallbackServerContext* context,
                                                                     const v1::GenerateRequest* request) {
  return StartCall<v1::GenerateEvent>(context, request->request_id(), /*all_tokens=*/true,
                                      [&] { return FromGenerate(*request, options_.model, options_.limits); });
}

grpc::ServerWriteReactor<v1::ChatEvent>* RouterService::Chat(grpc::CallbackServerContext* context,
                                                             const v1::ChatRequest* request) {
  return StartCall<v1::ChatEvent>(context, request->request_id(), /*all_tokens=*/false,
                                  [&] { return FromChat(*request, options_.model, options_.limits); });
}

absl::Status RouterService::CheckModel(const std::string& model) const {
  if (model.empty() || model == options_.model.id) return absl::OkStatus();
  return MakeError(absl::StatusCode::kNotFound, absl::StrCat("no model ", QuoteInput(model), " is served here"),
                   {.code = "model_not_found", .param = "model"});
}

grpc::ServerUnaryReactor* RouterService::Tokenize(grpc::CallbackServerContext* context,
                                                  const v1::TokenizeRequest* request, v1::TokenizeResponse* response) {
  if (absl::Status status = Authenticate(*context).status(); !status.ok()) return Answer(context, status);
  if (absl::Status status = CheckModel(request->model()); !status.ok()) return Answer(context, status);
  const auto ids = options_.model.tokenizer->Encode(request->text(), text::SpecialTokens::kMatch);
  if (!ids.ok()) return Answer(context, ids.status());
  response->mutable_ids()->Assign(ids->begin(), ids->end());
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* RouterService::Detokenize(grpc::CallbackServerContext* context,
                                                    const v1::DetokenizeRequest* request,
                                                    v1::DetokenizeResponse* response) {
  if (absl::Status status = Authenticate(*context).status(); !status.ok()) return Answer(context, status);
  if (absl::Status status = CheckModel(request->model()); !status.ok()) return Answer(context, status);
  for (int i = 0; i < request->ids_size(); ++i) {
    const int32_t id = request->ids(i);
    if (id < 0 || id >= options_.model.vocab_size) {
      const std::string field = absl::StrCat("ids[", i, "]");
      return Answer(context,
                    InvalidRequest("invalid_token_id", field,
                                   absl::StrCat(field, ": ", id, " is not below ", options_.model.vocab_size)));
    }
    const std::string_view bytes = options_.model.tokenizer->TokenBytes(id);
    response->mutable_text()->append(bytes.data(), bytes.size());
  }
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* RouterService::Abort(grpc::CallbackServerContext* context, const v1::AbortRequest* request,
                                               v1::AbortResponse* response) {
  const absl::StatusOr<std::string> tenant = Authenticate(*context);
  if (!tenant.ok()) return Answer(context, tenant.status());
  if (request->request_id().empty()) {
    return Answer(context, InvalidRequest("missing_field", "request_id", "request_id: missing"));
  }
  response->set_was_running(running_->Cancel(RunningId(*tenant, request->request_id())));
  return Answer(context, absl::OkStatus());
}

grpc::ServerUnaryReactor* RouterService::ListModels(grpc::CallbackServerContext* context, const v1::ListModelsRequest*,
                                                    v1::ListModelsResponse* response) {
  if (absl::Status status = Authenticate(*context).status(); !status.ok()) return Answer(context, status);
  v1::ModelInfo* info = response->add_models();
  info->set_id(options_.model.id);
  info->set_max_context_tokens(static_cast<uint64_t>(options_.model.context_length));
  info->set_vocab_size(static_cast<uint32_t>(options_.model.vocab_size));
  info->set_numerics(options_.numerics);
  info->set_ready(options_.generations->Ready().ok());
  return Answer(context, absl::OkStatus());
}

}  // namespace millrace::router
