// SPDX-License-Identifier: Apache-2.0
// See openai_api.h. What happens to a request that passed is openai_session.cc.
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

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/http_status.h"
#include "services/router/explanation.h"
#include "services/router/openai_response.h"
#include "services/router/openai_session.h"
#include "services/router/status_page.h"

namespace millrace::router {
namespace {

using text::AbslView;
using text::Concat;
using Headers = std::vector<std::pair<std::string, std::string>>;

// Smaller bodies are parsed where they arrive: a hop costs more than they do.
constexpr size_t kParseElsewhereBytes = 32u << 10;
constexpr size_t kMaxIgnoredNames = 32;

struct Route {
  std::string_view method;
  std::string_view path;
  enum Kind { kChat, kCompletions, kModels, kHealth, kReady, kMetrics, kStatus, kRequests } kind;
};
constexpr Route kPublicRoutes[] = {
    {"POST", "/v1/chat/completions", Route::kChat},
    {"POST", "/v1/completions", Route::kCompletions},
    {"GET", "/v1/models", Route::kModels},
    {"GET", "/healthz", Route::kHealth},
    {"GET", "/readyz", Route::kReady},
};
constexpr Route kOperatorRoutes[] = {
    {"GET", "/", Route::kStatus},
    {"GET", "/requests", Route::kRequests},
    {"POST", "/v1/chat/completions", Route::kChat},  // for the status page, so that no other origin need be allowed
    {"GET", "/metrics", Route::kMetrics},
    {"GET", "/healthz", Route::kHealth},
    {"GET", "/readyz", Route::kReady},
};
constexpr std::string_view kModelPrefix = "/v1/models/";
// On the operator's port: POST /workers/NAME/drain.
constexpr std::string_view kWorkerPrefix = "/workers/";
constexpr std::string_view kDrainSuffix = "/drain";
constexpr std::string_view kRequestPrefix = "/requests/";
constexpr size_t kMaxListedRequests = 50;

absl::Status NotFound() {
  return MakeError(absl::StatusCode::kNotFound, "There is no such route.", {.code = "not_found"});
}

// Bytes of a path segment with %XX undone; nothing if malformed. Only ever compared with the model's name.
std::optional<std::string> PercentDecode(std::string_view text) {
  std::string decoded;
  const auto hex = [](char c) {
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
  };
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      decoded += text[i];
      continue;
    }
    if (i + 2 >= text.size() || hex(text[i + 1]) < 0 || hex(text[i + 2]) < 0) return std::nullopt;
    decoded += static_cast<char>(hex(text[i + 1]) * 16 + hex(text[i + 2]));
    i += 2;
  }
  return decoded;
}

// application/json, with no charset or UTF-8; nothing compressed.
absl::Status CheckMediaType(const HttpRequest& request) {
  const auto unsupported = [](absl::string_view message) {
    return MakeError(absl::StatusCode::kInvalidArgument, message,
                     {.code = "unsupported_media_type", .http_status = 415});
  };
  const auto encoding = request.Header("content-encoding");
  if (encoding && !absl::EqualsIgnoreCase(AbslView(*encoding), "identity")) {
    return unsupported("Compressed request bodies are not supported.");
  }
  const auto type = request.Header("content-type");
  if (!type) return unsupported("Content-Type must be application/json.");
  const std::vector<std::string> parts = absl::StrSplit(AbslView(*type), ';');
  if (!absl::EqualsIgnoreCase(absl::StripAsciiWhitespace(parts[0]), "application/json")) {
    return unsupported("Content-Type must be application/json.");
  }
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::string parameter = absl::AsciiStrToLower(absl::StripAsciiWhitespace(parts[i]));
    if (!absl::StartsWith(parameter, "charset=")) continue;
    if (parameter != "charset=utf-8" && parameter != "charset=\"utf-8\"") {
      return unsupported("The only charset is utf-8.");
    }
  }
  return absl::OkStatus();
}

// The client's request id, or one of ours.
absl::StatusOr<std::string> ReadRequestId(const HttpRequest& request, const ApiLimits& limits) {
  const auto given = request.Header("x-request-id");
  if (!given) return NewRequestId();
  const bool printable = std::all_of(given->begin(), given->end(), [](char c) { return c > ' ' && c < 0x7f; });
  if (given->empty() || given->size() > limits.max_request_id_bytes || !printable) {
    return InvalidRequest("invalid_request_id", "x-request-id",
                          Concat("x-request-id: must have 1 to ", limits.max_request_id_bytes,
                                 " printable ASCII characters without spaces."));
  }
  return std::string(*given);
}

absl::StatusOr<std::chrono::milliseconds> ReadTimeout(const HttpRequest& request, const ApiLimits& limits) {
  const auto given = request.Header("x-request-timeout-ms");
  if (!given) return limits.default_timeout;
  int64_t timeout_ms = 0;
  const bool digits = !given->empty() && given->find_first_not_of("0123456789") == std::string_view::npos;
  if (!digits || given->size() > 10 || !absl::SimpleAtoi(AbslView(*given), &timeout_ms) || timeout_ms < 1) {
    return InvalidRequest("invalid_value", "x-request-timeout-ms",
                          "x-request-timeout-ms: expected a whole number of milliseconds, at least 1.");
  }
  return std::min(std::chrono::milliseconds(timeout_ms), limits.max_timeout);
}

// Names of ignored fields in a header: whatever could break it is replaced.
std::string IgnoredHeader(std::vector<std::string> names) {
  const bool cut = names.size() > kMaxIgnoredNames;
  if (cut) names.resize(kMaxIgnoredNames);
  for (auto& name : names) {
    name.resize(std::min<size_t>(name.size(), 64));
    for (char& c : name) {
      if (!absl::ascii_isalnum(c) && c != '_' && c != '-' && c != '.') c = '?';
    }
  }
  return absl::StrCat(absl::StrJoin(names, ", "), cut ? ", ..." : "");
}

const EmbeddedFile* FindPageFile(std::string_view path) {
  const auto files = StatusPageFiles();
  const auto found = std::find_if(files.begin(), files.end(), [&](const auto& file) { return file.path == path; });
  return found == files.end() ? nullptr : &*found;
}

}  // namespace

class OpenAiApi::Core : public std::enable_shared_from_this<OpenAiApi::Core> {
 public:
  explicit Core(OpenAiApiOptions options)
      : options_(std::move(options)), parsers_(std::max(1, options_.parse_threads)) {
    CHECK(options_.generations && options_.registry && options_.metrics && options_.model.tokenizer);
  }

  void Join() { parsers_.join(); }

  template <size_t kCount>
  void Handle(const Route (&routes)[kCount], bool is_public, HttpRequest request,
              std::shared_ptr<HttpExchange> exchange) {
    Headers headers;
    auto request_id = ReadRequestId(request, options_.limits);
    headers.emplace_back("x-request-id", request_id.ok() ? *request_id : NewRequestId());
    if (is_public && !options_.cors_allow_origin.empty()) {
      headers.emplace_back("Access-Control-Allow-Origin", options_.cors_allow_origin);
    }

    std::vector<std::string> allowed;
    const bool is_model = is_public && AbslView(request.path).size() > kModelPrefix.size() &&
                          absl::StartsWith(request.path, AbslView(kModelPrefix));
    if (is_model) allowed = {"GET"};
    const Route* match = nullptr;
    for (const Route& route : routes) {
      if (route.path != request.path) continue;
      allowed.emplace_back(route.method);
      if (route.method == request.method || (route.method == "GET" && request.method == "HEAD")) match = &route;
    }
    const std::optional<std::string> drained = is_public ? std::nullopt : WorkerToDrain(request);
    if (drained) allowed = {"POST"};
    const EmbeddedFile* const file = is_public ? nullptr : FindPageFile(request.path);
    const bool explains = !is_public && absl::StartsWith(request.path, AbslView(kRequestPrefix)) &&
                          request.path.size() > kRequestPrefix.size();
    if (file != nullptr || explains) allowed = {"GET"};
    if (drained && request.method == "POST") return DrainWorker(*drained, request, headers, *exchange);
    const bool reads = request.method == "GET" || request.method == "HEAD";
    if (is_model && reads) return AnswerModel(request, headers, *exchange);
    if (explains && reads) return AnswerExplanation(request, headers, *exchange);
    if (file != nullptr && reads) return AnswerPage(*file, headers, *exchange);
    if (allowed.empty()) return Answer(NotFound(), "unmatched", headers, *exchange);
    if (match == nullptr) return AnswerMethod(request, allowed, headers, *exchange);
    if (!request_id.ok()) return Answer(request_id.status(), RouteName(*match), headers, *exchange);
    switch (match->kind) {
      case Route::kChat:
      case Route::kCompletions:
        return Generate(*match, *std::move(request_id), std::move(request), std::move(headers), std::move(exchange));
      case Route::kModels:
        return AnswerModels(headers, *exchange);
      case Route::kHealth:
        return AnswerText("ok\n", "/healthz", headers, *exchange);
      case Route::kReady:
        return AnswerReady(headers, *exchange);
      case Route::kMetrics:
        return AnswerMetrics(headers, *exchange);
      case Route::kStatus:
        return AnswerStatus(request, headers, *exchange);
      case Route::kRequests:
        return AnswerRequests(headers, *exchange);
    }
  }

  void BeginDrain() { draining_ = true; }

  int num_requests() const {
    const std::lock_guard lock(mutex_);
    return static_cast<int>(live_ids_.size());
  }

 private:
  static std::string RouteName(const Route& route) { return std::string(route.path); }

  // ---- Small answers.

  void Send(HttpResponse response, std::string_view route, const Headers& headers, HttpExchange& exchange) {
    response.headers.insert(response.headers.end(), headers.begin(), headers.end());
    options_.metrics->CountRequest(route, response.status);
    exchange.Respond(std::move(response));
  }

  void Answer(const absl::Status& status, std::string_view route, const Headers& headers, HttpExchange& exchange) {
    HttpResponse response = ErrorResponse(status, headers[0].second, headers);
    options_.metrics->CountRequest(route, response.status);
    exchange.Respond(std::move(response));
  }

  void AnswerText(std::string text, std::string_view route, const Headers& headers, HttpExchange& exchange) {
    Send({.content_type = "text/plain; charset=utf-8", .body = std::move(text)}, route, headers, exchange);
  }

  void AnswerMethod(const HttpRequest& request, const std::vector<std::string>& allowed, const Headers& headers,
                    HttpExchange& exchange) {
    const bool cors = !options_.cors_allow_origin.empty();
    if (request.method == "OPTIONS" && cors) {
      HttpResponse response{.status = 204, .content_type = ""};
      response.headers.emplace_back("Access-Control-Allow-Methods", absl::StrJoin(allowed, ", "));
      response.headers.emplace_back("Access-Control-Allow-Headers", "*, Authorization");
      response.headers.emplace_back("Access-Control-Max-Age", "600");
      return Send(std::move(response), "preflight", headers, exchange);
    }
    HttpResponse response = ErrorResponse(
        MakeError(absl::StatusCode::kInvalidArgument, Concat("This route takes ", absl::StrJoin(allowed, ", "), "."),
                  {.code = "method_not_allowed", .http_status = 405}),
        headers[0].second, {});
    response.headers.emplace_back("Allow", absl::StrJoin(allowed, ", "));
    Send(std::move(response), "unmatched", headers, exchange);
  }

  Json ModelJson() const {
    return {{"id", options_.model.id},
            {"object", "model"},
            {"created", options_.model.created_unix_s},
            {"owned_by", "millrace"},
            {"max_model_len", options_.model.context_length}};
  }

  void AnswerModels(const Headers& headers, HttpExchange& exchange) {
    Json list;
    list["object"] = "list";
    list["data"] = Json::array();
    list["data"].push_back(ModelJson());
    Send({.body = DumpJson(list)}, "/v1/models", headers, exchange);
  }

  void AnswerModel(const HttpRequest& request, const Headers& headers, HttpExchange& exchange) {
    const auto id = PercentDecode(std::string_view(request.path).substr(kModelPrefix.size()));
    if (id == options_.model.id) {
      return Send({.body = DumpJson(ModelJson())}, "/v1/models/{id}", headers, exchange);
    }
    Answer(MakeError(absl::StatusCode::kNotFound, "There is no model of that name.",
                     {.code = "model_not_found", .param = "model"}),
           "/v1/models/{id}", headers, exchange);
  }

  absl::Status Ready() const {
    if (draining_) {
      return MakeError(absl::StatusCode::kUnavailable, "This server is shutting down.",
                       {.code = "draining", .retry_after_s = 5});
    }
    return options_.generations->Ready();
  }

  void AnswerReady(const Headers& headers, HttpExchange& exchange) {
    const absl::Status ready = Ready();
    if (!ready.ok()) return Answer(ready, "/readyz", headers, exchange);
    AnswerText("ready\n", "/readyz", headers, exchange);
  }

  void AnswerMetrics(const Headers& headers, HttpExchange& exchange) {
    Send({.content_type = std::string(kMetricsContentType),
          .body = RenderMetrics(*options_.registry, options_.metric_names)},
         "/metrics", headers, exchange);
  }

  void AnswerStatus(const HttpRequest& request, const Headers& headers, HttpExchange& exchange) {
    const auto accept = request.Header("accept");
    if (accept && absl::StrContains(AbslView(*accept), "text/html")) {
      return AnswerPage(StatusPageFiles()[0], headers, exchange);
    }
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
    HttpResponse response{.body = DumpJson(status) + "\n"};
    response.headers = {{"Cache-Control", "no-store"}, {"Vary", "Accept"}, {"X-Content-Type-Options", "nosniff"}};
    Send(std::move(response), "/", headers, exchange);
  }

  void AnswerRequests(const Headers& headers, HttpExchange& exchange) {
    Json list;
    list["requests"] = Json::array();
    if (options_.traces != nullptr) {
      for (const std::string& id : options_.traces->RequestIds(kMaxListedRequests)) {
        const auto trace = options_.traces->Find(id);
        if (trace) list["requests"].push_back(ExplanationSummaryJson(*trace, MonotonicNow()));
      }
    }
    Send({.body = DumpJson(list) + "\n"}, "/requests", headers, exchange);
  }

  void AnswerExplanation(const HttpRequest& request, const Headers& headers, HttpExchange& exchange) {
    const auto id = PercentDecode(std::string_view(request.path).substr(kRequestPrefix.size()));
    const auto trace = id && options_.traces != nullptr ? options_.traces->Find(*id) : std::nullopt;
    if (trace)
      return Send({.body = DumpJson(ExplanationJson(*trace, MonotonicNow())) + "\n"}, "/requests/{id}", headers,
                  exchange);
    Answer(MakeError(absl::StatusCode::kNotFound,
                     "There is no record of that request: it is unknown, or later ones have taken its place.",
                     {.code = "request_not_found"}),
           "/requests/{id}", headers, exchange);
  }

  void AnswerPage(const EmbeddedFile& file, const Headers& headers, HttpExchange& exchange) {
    HttpResponse response{.content_type = std::string(file.content_type), .body = std::string(file.content)};
    for (const auto& [name, value] : kStatusPageHeaders) response.headers.emplace_back(name, value);
    response.headers.emplace_back("Vary", "Accept");
    Send(std::move(response), "/page", headers, exchange);
  }

  std::optional<std::string> WorkerToDrain(const HttpRequest& request) const {
    std::string_view path = request.path;
    if (!options_.drain_worker || !absl::StartsWith(AbslView(path), AbslView(kWorkerPrefix)) ||
        !absl::EndsWith(AbslView(path), AbslView(kDrainSuffix)) ||
        path.size() <= kWorkerPrefix.size() + kDrainSuffix.size()) {
      return std::nullopt;
    }
    path.remove_prefix(kWorkerPrefix.size());
    path.remove_suffix(kDrainSuffix.size());
    return std::string(path);
  }

  void DrainWorker(const std::string& name, const HttpRequest& request, const Headers& headers,
                   HttpExchange& exchange) {
    exchange.BodyConsumed();
    // A page in the operator's browser can post forms here, but not this type without asking first.
    absl::Status status = CheckMediaType(request);
    if (status.ok()) status = options_.drain_worker(name);
    if (absl::IsNotFound(status)) {
      status = MakeError(absl::StatusCode::kNotFound, "There is no worker of that name.", {.code = "worker_not_found"});
    }
    if (!status.ok()) return Answer(status, "/workers/{name}/drain", headers, exchange);
    Send({.status = 202, .body = DumpJson({{"worker", name}, {"asked_to_drain", true}})}, "/workers/{name}/drain",
         headers, exchange);
  }

  // ---- Generation.

  void Generate(const Route& route, std::string request_id, HttpRequest request, Headers headers,
                std::shared_ptr<HttpExchange> exchange) {
    const std::string name = RouteName(route);
    const auto refuse = [&](const absl::Status& status) { Answer(status, name, headers, *exchange); };
    if (const auto status = CheckMediaType(request); !status.ok()) return refuse(status);
    const auto timeout = ReadTimeout(request, options_.limits);
    if (!timeout.ok()) return refuse(timeout.status());
    if (draining_) return refuse(Ready());
    if (const auto status = Register(request_id); !status.ok()) {
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
    context.on_end = [live = std::make_shared<LiveId>(shared_from_this(), request_id)]() mutable { live->Release(); };

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
    core->Handle(kPublicRoutes, /*is_public=*/true, std::move(request), std::move(exchange));
  };
}

HttpHandler OpenAiApi::OperatorHandler() {
  return [core = core_](HttpRequest request, std::shared_ptr<HttpExchange> exchange) {
    core->Handle(kOperatorRoutes, /*is_public=*/false, std::move(request), std::move(exchange));
  };
}

void OpenAiApi::BeginDrain() { core_->BeginDrain(); }
int OpenAiApi::num_requests() const { return core_->num_requests(); }

}  // namespace millrace::router
