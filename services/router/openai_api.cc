// SPDX-License-Identifier: Apache-2.0
// From a request to the answer of its route. What happens to a generation that passed is openai_session.cc; what the
// operator alone may see and do is operator_replies.cc.
#include "services/router/openai_api.h"

#include <openssl/rand.h>

#include <algorithm>
#include <atomic>
#include <boost/asio/post.hpp>
#include <boost/asio/thread_pool.hpp>
#include <chrono>
#include <mutex>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/http_status.h"
#include "services/router/http_routes.h"
#include "services/router/openai_headers.h"
#include "services/router/openai_response.h"
#include "services/router/openai_session.h"
#include "services/router/operator_access.h"
#include "services/router/operator_replies.h"

namespace millrace::router {
namespace {

using text::Concat;
using Headers = std::vector<std::pair<std::string, std::string>>;

// Smaller bodies are parsed where they arrive: a hop costs more than they do.
constexpr size_t kParseElsewhereBytes = 32u << 10;
constexpr std::string_view kUnmatched = "unmatched";  // the route of what has none, in metrics

}  // namespace

class OpenAiApi::Core : public std::enable_shared_from_this<OpenAiApi::Core> {
 public:
  explicit Core(OpenAiApiOptions options)
      : options_(std::move(options)), parsers_(std::max(1, options_.parse_threads)) {
    CHECK(options_.generations && options_.registry && options_.metrics && options_.model.tokenizer);
  }

  void Join() { parsers_.join(); }

  void Handle(Listener listener, HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    const bool is_public = listener == Listener::kPublic;
    Headers headers;
    auto request_id = ReadRequestId(request, options_.limits);
    headers.emplace_back("x-request-id", request_id.ok() ? *request_id : NewRequestId());
    if (is_public && !options_.cors_allow_origin.empty()) {
      headers.emplace_back("Access-Control-Allow-Origin", options_.cors_allow_origin);
    }

    const RouteMatch match = MatchRoute(listener, request);
    const std::string_view name = match.route != nullptr ? match.route->name : kUnmatched;
    if (!is_public && !IsProbe(request)) {
      const absl::Status access = CheckOperatorAccess(request, options_.operator_hosts);
      if (!access.ok()) return Answer(access, name, headers, *exchange);
    }
    std::string tenant;
    const bool locked = is_public ? !match.methods.empty() && NeedsKey(request) : request.method == "POST";
    if (options_.keys != nullptr && locked) {
      auto admitted = Authenticate(request, is_public ? ApiKeys::Door::kPublic : ApiKeys::Door::kOperator);
      if (!admitted.ok()) return Answer(admitted.status(), name, headers, *exchange);
      tenant = *std::move(admitted);
    }
    if (match.methods.empty()) {
      return Answer(MakeError(absl::StatusCode::kNotFound, "There is no such route.", {.code = "not_found"}), name,
                    headers, *exchange);
    }
    if (match.route == nullptr) return AnswerMethod(request, match.methods, headers, *exchange);
    if (!request_id.ok()) return Answer(request_id.status(), name, headers, *exchange);
    if (match.route->kind == Route::kChat || match.route->kind == Route::kCompletions) {
      return Generate(*match.route, *std::move(request_id), std::move(tenant), std::move(request), std::move(headers),
                      std::move(exchange));
    }
    exchange->BodyConsumed();
    Answer(Reply(match, request), name, headers, *exchange);
  }

  void BeginDrain() { draining_ = true; }

  bool has_keys() const { return options_.keys != nullptr; }
  absl::StatusOr<std::string> Authenticate(const HttpRequest& request, ApiKeys::Door door) const {
    return options_.keys->Authenticate(request.Header("authorization"), door);
  }

  int num_requests() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int>(live_ids_.size());
  }

 private:
  static bool IsProbe(const HttpRequest& request) { return request.path == "/healthz" || request.path == "/readyz"; }
  // Probes have no key, and a browser asks whether it may send one without sending it.
  static bool NeedsKey(const HttpRequest& request) { return !IsProbe(request) && request.method != "OPTIONS"; }

  // ---- Small answers.

  void Answer(absl::StatusOr<HttpResponse> reply, std::string_view route, const Headers& headers,
              HttpExchange& exchange) {
    HttpResponse response;
    if (reply.ok()) {
      response = *std::move(reply);
      response.headers.insert(response.headers.end(), headers.begin(), headers.end());
    } else {
      response = ErrorResponse(reply.status(), headers[0].second, headers);
    }
    options_.metrics->CountRequest(route, response.status);
    exchange.Respond(std::move(response));
  }

  absl::StatusOr<HttpResponse> Reply(const RouteMatch& match, const HttpRequest& request) {
    switch (match.route->kind) {
      case Route::kModels:
        return HttpResponse{.body = DumpJson({{"object", "list"}, {"data", Json::array({ModelJson()})}})};
      case Route::kModel:
        if (match.name == options_.model.id) return HttpResponse{.body = DumpJson(ModelJson())};
        return MakeError(absl::StatusCode::kNotFound, "There is no model of that name.",
                         {.code = "model_not_found", .param = "model"});
      case Route::kHealth:
        return Text("ok\n");
      case Route::kReady:
        RETURN_IF_ERROR(Ready());
        return Text("ready\n");
      case Route::kMetrics:
        return HttpResponse{.content_type = std::string(kMetricsContentType),
                            .body = RenderMetrics(*options_.registry, options_.metric_names)};
      case Route::kStatus:
        return StatusReply(request, StatusJson());
      case Route::kPage:
        return PageReply(request.path);
      case Route::kRequests:
        return RequestsReply(options_.traces);
      case Route::kRequest:
        return ExplanationReply(options_.traces, match.name);
      case Route::kDrain:
        return DrainReply(request, match.name, options_.drain_worker);
      case Route::kChat:
      case Route::kCompletions:
        break;
    }
    CHECK(false, "generations are answered by a session");
    return HttpResponse{};
  }

  void AnswerMethod(const HttpRequest& request, const std::vector<std::string_view>& methods, const Headers& headers,
                    HttpExchange& exchange) {
    const std::string allowed =
        absl::StrJoin(methods, ", ", [](std::string* out, std::string_view method) { out->append(method); });
    if (request.method == "OPTIONS" && !options_.cors_allow_origin.empty()) {
      return Answer(HttpResponse{.status = 204,
                                 .content_type = "",
                                 .headers = {{"Access-Control-Allow-Methods", allowed},
                                             {"Access-Control-Allow-Headers", "*, Authorization"},
                                             {"Access-Control-Max-Age", "600"}}},
                    "preflight", headers, exchange);
    }
    Headers with_allow = headers;
    with_allow.emplace_back("Allow", allowed);
    Answer(MakeError(absl::StatusCode::kInvalidArgument, Concat("This route takes ", allowed, "."),
                     {.code = "method_not_allowed", .http_status = 405}),
           kUnmatched, with_allow, exchange);
  }

  static HttpResponse Text(std::string text) {
    return {.content_type = "text/plain; charset=utf-8", .body = std::move(text)};
  }

  Json ModelJson() const {
    return {{"id", options_.model.id},
            {"object", "model"},
            {"created", options_.model.created_unix_s},
            {"owned_by", "millrace"},
            {"max_model_len", options_.model.context_length}};
  }

  absl::Status Ready() const {
    if (draining_) {
      return MakeError(absl::StatusCode::kUnavailable, "This server is shutting down.",
                       {.code = "draining", .retry_after_s = 5});
    }
    return options_.generations->Ready();
  }

  Json StatusJson() const {
    Json status;
    status["version"] = options_.version;
    status["model"] = options_.model.id;
    status["uptime_ms"] =
        std::chrono::duration_cast<std::chrono::milliseconds>(std::chrono::steady_clock::now() - started_).count();
    const absl::Status ready = Ready();
    status["ready"] = ready.ok();
    if (!ready.ok()) status["why_not_ready"] = std::string(ready.message());  // operators may read everything
    status["requests"] = num_requests();
    if (options_.status) status["cluster"] = options_.status();
    return status;
  }

  // ---- Generation.

  void Generate(const Route& route, std::string request_id, std::string tenant, HttpRequest request, Headers headers,
                std::shared_ptr<HttpExchange> exchange) {
    const std::string name(route.name);
    const auto refuse = [&](const absl::Status& status) { Answer(status, name, headers, *exchange); };
    if (const auto status = CheckMediaType(request); !status.ok()) return refuse(status);
    const auto timeout = ReadTimeout(request, options_.limits);
    if (!timeout.ok()) return refuse(timeout.status());
    if (draining_) return refuse(Ready());
    std::shared_ptr<Permit> permit;
    if (options_.keys != nullptr) {
      auto admitted = options_.keys->Admit(tenant, request.received_at);
      if (!admitted.ok()) {
        options_.metrics->CountRefusal("quota");
        return refuse(admitted.status());
      }
      permit = *std::move(admitted);
    }
    // Ids are a tenant's own: nobody can occupy another's, or find out that it is in use.
    const std::string live_id = Concat(tenant, "/", request_id);
    if (const auto status = Register(live_id); !status.ok()) {
      if (absl::IsResourceExhausted(status)) options_.metrics->CountRefusal("overloaded");
      return refuse(status);
    }

    SessionContext context;
    context.exchange = exchange;
    context.generations = options_.generations;
    context.metrics = options_.metrics;
    context.model = &options_.model;
    context.limits = options_.limits;
    context.route = name;
    context.request_id = request_id;
    context.generation_id = NewRequestId();
    context.headers = std::move(headers);
    context.received_at = request.received_at;
    context.deadline = request.received_at + *timeout;
    if (options_.traces != nullptr) {
      context.trace =
          options_.traces->Begin(request_id, absl::StrCat("POST ", name), request.Header("traceparent").value_or(""),
                                 FromSteady(request.received_at));
    }
    // Freed with its last copy, whichever way the request ends.
    context.on_end = [live = std::make_shared<LiveId>(shared_from_this(), live_id), permit]() mutable {
      live->Release();
      if (permit != nullptr) permit->Release();
    };
    context.tenant = std::move(tenant);
    context.permit = std::move(permit);

    const auto kind = route.kind;
    if (request.body.size() < kParseElsewhereBytes) return ParseAndStart(kind, request.body, std::move(context));
    boost::asio::post(
        parsers_, [self = shared_from_this(), kind, body = std::move(request.body),
                   context = std::move(context)]() mutable { self->ParseAndStart(kind, body, std::move(context)); });
  }

  // Any thread; what follows is posted to the strand, in the order of the parts.
  void ParseAndStart(Route::Kind kind, std::string& body, SessionContext context) {
    auto parsed = Parse(kind, body);
    std::string().swap(body);
    auto exchange = context.exchange;
    exchange->Post([self = shared_from_this(), parsed = std::move(parsed), context = std::move(context)]() mutable {
      context.exchange->BodyConsumed();
      if (!parsed.ok()) {
        self->Answer(parsed.status(), context.route, context.headers, *context.exchange);
        if (context.trace != nullptr) {
          context.trace->Close(MonotonicNow(), parsed.status().code(), ToHttpError(parsed.status()).http_status);
        }
        return context.on_end();
      }
      if (!parsed->ignored.empty()) {
        context.headers.emplace_back("x-ignored-params", IgnoredHeader(parsed->ignored));
      }
      if (!parsed->has_seed) {
        uint64_t seed = 0;
        CHECK(RAND_bytes(reinterpret_cast<unsigned char*>(&seed), sizeof seed) == 1);
        parsed->sampling.seed = seed >> 1;  // a value that the seed field would take
      }
      context.headers.emplace_back("x-seed", absl::StrCat(static_cast<int64_t>(parsed->sampling.seed)));
      StartSession(std::move(context), *std::move(parsed));
    });
  }

  absl::StatusOr<ApiRequest> Parse(Route::Kind kind, std::string_view body) const {
    Json json;
    ASSIGN_OR_RETURN(json, ReadJson(body, options_.limits.json));
    return kind == Route::kChat ? ParseChatRequest(json, options_.model, options_.limits)
                                : ParseCompletionRequest(json, options_.model, options_.limits);
  }

  absl::Status Register(const std::string& request_id) {
    const std::lock_guard lock(mutex_);
    if (live_ids_.size() >= options_.limits.max_requests) {
      return MakeError(absl::StatusCode::kResourceExhausted, "Too many requests at once; try again later.",
                       {.code = "overloaded", .retry_after_s = 1});
    }
    if (live_ids_.insert(request_id).second) return absl::OkStatus();
    return MakeError(absl::StatusCode::kAlreadyExists, "A request with this x-request-id is still being answered.",
                     {.code = "duplicate_request_id", .param = "x-request-id"});
  }

  void Unregister(const std::string& request_id) {
    const std::lock_guard lock(mutex_);
    live_ids_.erase(request_id);
  }

  class LiveId {
   public:
    LiveId(std::shared_ptr<Core> core, std::string id) : core_(std::move(core)), id_(std::move(id)) {}
    ~LiveId() { Release(); }
    void Release() {
      if (core_) std::exchange(core_, nullptr)->Unregister(id_);
    }

   private:
    std::shared_ptr<Core> core_;
    const std::string id_;
  };

  const OpenAiApiOptions options_;
  const std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  std::atomic<bool> draining_{false};
  mutable std::mutex mutex_;
  std::set<std::string> live_ids_;  // guarded by mutex_
  boost::asio::thread_pool parsers_;
};

OpenAiApi::OpenAiApi(OpenAiApiOptions options) : core_(std::make_shared<Core>(std::move(options))) {}
OpenAiApi::~OpenAiApi() { core_->Join(); }

HttpHandler OpenAiApi::PublicHandler() {
  return [core = core_](HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    core->Handle(Listener::kPublic, std::move(request), std::move(exchange));
  };
}

HttpGate OpenAiApi::PublicGate() {
  if (!core_->has_keys()) return nullptr;
  return [core = core_](const HttpRequest& head) { return core->Authenticate(head, ApiKeys::Door::kPublic).status(); };
}

HttpHandler OpenAiApi::OperatorHandler() {
  return [core = core_](HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    core->Handle(Listener::kOperator, std::move(request), std::move(exchange));
  };
}

void OpenAiApi::BeginDrain() { core_->BeginDrain(); }
int OpenAiApi::num_requests() const { return core_->num_requests(); }

}  // namespace millrace::router
