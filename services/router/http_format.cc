// SPDX-License-Identifier: Apache-2.0
// See http_format.h.
#include "services/router/http_format.h"

#include <ctime>

#include "absl/strings/str_cat.h"
#include "services/common/http_status.h"

namespace millrace::router {
namespace {

std::string HttpDate() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[40];
  const size_t length = std::strftime(text, sizeof text, "%a, %d %b %Y %H:%M:%S GMT", &parts);
  return std::string(text, length);
}

}  // namespace

std::string FormatHttpHead(const HttpResponse& response, bool keep_alive) {
  std::string head =
      absl::StrCat("HTTP/1.1 ", response.status, " ",
                   absl::string_view(HttpReason(response.status).data(), HttpReason(response.status).size()),
                   "\r\nDate: ", HttpDate(), "\r\nConnection: ", keep_alive ? "keep-alive" : "close");
  if (!response.content_type.empty()) absl::StrAppend(&head, "\r\nContent-Type: ", response.content_type);
  for (const auto& [name, value] : response.headers) absl::StrAppend(&head, "\r\n", name, ": ", value);
  return head;
}

std::string FormatHttpResponse(const HttpResponse& response, bool keep_alive, bool head_only) {
  std::string bytes = FormatHttpHead(response, keep_alive);
  if (response.status != 204) absl::StrAppend(&bytes, "\r\nContent-Length: ", response.body.size());
  absl::StrAppend(&bytes, "\r\n\r\n");
  if (!head_only) bytes += response.body;
  return bytes;
}

}  // namespace millrace::router
