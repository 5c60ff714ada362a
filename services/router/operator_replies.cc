// SPDX-License-Identifier: Apache-2.0
// See operator_replies.h.
#include "services/router/operator_replies.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/router/explanation.h"
#include "services/router/openai_headers.h"
#include "services/router/openai_response.h"
#include "services/router/status_page.h"

namespace millrace::router {
namespace {

constexpr size_t kMaxListedRequests = 50;

HttpResponse PageFile(const EmbeddedFile& file) {
  HttpResponse response{.content_type = std::string(file.content_type), .body = std::string(file.content)};
  for (const auto& [name, value] : kStatusPageHeaders) response.headers.emplace_back(name, value);
  response.headers.emplace_back("Vary", "Accept");
  return response;
}

}  // namespace

HttpResponse StatusReply(const HttpRequest& request, const Json& status) {
  const auto accept = request.Header("accept");
  if (accept && absl::StrContains(text::AbslView(*accept), "text/html")) return PageFile(StatusPageFiles()[0]);
  return {.headers = {{"Cache-Control", "no-store"}, {"Vary", "Accept"}, {"X-Content-Type-Options", "nosniff"}},
          .body = DumpJson(status) + "\n"};
}

absl::StatusOr<HttpResponse> PageReply(std::string_view path) {
  const auto files = StatusPageFiles();
  const auto found = std::find_if(files.begin(), files.end(), [&](const auto& file) { return file.path == path; });
  if (found == files.end()) {
    return MakeError(absl::StatusCode::kNotFound, "There is no such route.", {.code = "not_found"});
  }
  return PageFile(*found);
}

HttpResponse RequestsReply(const TraceLog* traces) {
  Json list;
  list["requests"] = Json::array();
  if (traces != nullptr) {
    for (const std::string& id : traces->RequestIds(kMaxListedRequests)) {
      const auto trace = traces->Find(id);
      if (trace) list["requests"].push_back(ExplanationSummaryJson(*trace, MonotonicNow()));
    }
  }
  return {.body = DumpJson(list) + "\n"};
}

absl::StatusOr<HttpResponse> ExplanationReply(const TraceLog* traces, const std::string& id) {
  const auto trace = traces != nullptr ? traces->Find(id) : std::nullopt;
  if (trace) return HttpResponse{.body = DumpJson(ExplanationJson(*trace, MonotonicNow())) + "\n"};
  return MakeError(absl::StatusCode::kNotFound,
                   "There is no record of that request: it is unknown, or later ones have taken its place.",
                   {.code = "request_not_found"});
}

absl::StatusOr<HttpResponse> DrainReply(const HttpRequest& request, const std::string& name,
                                        const std::function<absl::Status(const std::string& name)>& drain) {
  // A page in the operator's browser can post forms here, but not this type without asking first.
  RETURN_IF_ERROR(CheckMediaType(request));
  const absl::Status status = drain(name);
  if (absl::IsNotFound(status)) {
    return MakeError(absl::StatusCode::kNotFound, "There is no worker of that name.", {.code = "worker_not_found"});
  }
  RETURN_IF_ERROR(status);
  return HttpResponse{.status = 202, .body = DumpJson({{"worker", name}, {"asked_to_drain", true}})};
}

}  // namespace millrace::router
