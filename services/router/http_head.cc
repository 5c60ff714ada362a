// SPDX-License-Identifier: Apache-2.0
// See http_head.h. Line by line, in the order of RFC 9112, always on the strict side of its options.
#include "services/router/http_head.h"

#include <charconv>
#include <string>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "engine/status.h"
#include "services/common/error.h"

namespace millrace::router {
namespace {

absl::string_view View(std::string_view text) { return {text.data(), text.size()}; }

absl::Status Refuse(int http_status, std::string_view code, absl::string_view message) {
  return MakeError(absl::StatusCode::kInvalidArgument, message,
                   {.code = std::string(code), .http_status = http_status});
}

absl::Status BadLine() { return Refuse(400, "malformed_request_line", "The request line is not HTTP/1.1."); }
absl::Status BadHeader(absl::string_view why) { return Refuse(400, "malformed_header", why); }

// RFC 9110 token characters.
bool IsTokenChar(unsigned char c) {
  if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z')) return true;
  return c != 0 && std::string_view("!#$%&'*+-.^_`|~").find(static_cast<char>(c)) != std::string_view::npos;
}

bool IsToken(std::string_view text) {
  if (text.empty()) return false;
  for (const char c : text) {
    if (!IsTokenChar(c)) return false;
  }
  return true;
}

std::string_view TrimBlanks(std::string_view text) {
  while (!text.empty() && (text.front() == ' ' || text.front() == '\t')) text.remove_prefix(1);
  while (!text.empty() && (text.back() == ' ' || text.back() == '\t')) text.remove_suffix(1);
  return text;
}

class HeadChecker {
 public:
  explicit HeadChecker(const HttpLimits& limits) : limits_(limits) {}

  absl::StatusOr<HttpHead> Check(std::string_view data) {
    size_t start = 0;
    while (true) {
      const size_t line_feed = data.find('\n', start);
      if (line_feed == std::string_view::npos) {
        RETURN_IF_ERROR(CheckUnfinishedLine(data.substr(start), start));
        return HttpHead{};
      }
      std::string_view line = data.substr(start, line_feed - start);
      if (line_feed + 1 > limits_.max_header_bytes && start != 0) return TooLarge();
      if (line.empty() || line.back() != '\r') {
        return start == 0 ? BadLine() : BadHeader("Lines must end with CR LF.");
      }
      line.remove_suffix(1);
      if (start == 0) {
        RETURN_IF_ERROR(CheckRequestLine(line));
      } else if (line.empty()) {
        RETURN_IF_ERROR(CheckWhole());
        head_.bytes = line_feed + 1;
        return head_;
      } else {
        RETURN_IF_ERROR(CheckField(line));
      }
      start = line_feed + 1;
    }
  }

 private:
  // Half a line can already be too long, or plainly not HTTP: do not wait for its end.
  absl::Status CheckUnfinishedLine(std::string_view line, size_t start) {
    if (start == 0) {
      const std::string_view method = line.substr(0, line.find(' '));
      if (!method.empty() && !IsToken(method) && method != "\r") return BadLine();
      if (line.find('\0') != std::string_view::npos || method.size() > kMaxMethodBytes) return BadLine();
      if (line.size() > limits_.max_uri_bytes + kMaxMethodBytes + 12) {
        return Refuse(414, "uri_too_long", UriMessage());
      }
      return absl::OkStatus();
    }
    if (line.size() > limits_.max_header_line_bytes || start + line.size() > limits_.max_header_bytes) {
      return TooLarge();
    }
    return absl::OkStatus();
  }

  absl::Status CheckRequestLine(std::string_view line) {
    const size_t method_end = line.find(' ');
    if (method_end == std::string_view::npos) return BadLine();
    if (!IsToken(line.substr(0, method_end)) || method_end > kMaxMethodBytes) return BadLine();
    const size_t target_end = line.rfind(' ');
    if (target_end <= method_end + 1) return BadLine();  // no version, or an empty target
    const std::string_view target = line.substr(method_end + 1, target_end - method_end - 1);
    if (target.size() > limits_.max_uri_bytes) return Refuse(414, "uri_too_long", UriMessage());
    for (const unsigned char c : target) {
      if (c <= 0x20 || c >= 0x7f) return BadLine();
    }
    const std::string_view version = line.substr(target_end + 1);
    const auto digit = [](char c) { return c >= '0' && c <= '9'; };
    if (version.size() != 8 || version.substr(0, 5) != "HTTP/" || !digit(version[5]) || version[6] != '.' ||
        !digit(version[7]) || version[5] == '0') {
      return BadLine();
    }
    if (version != "HTTP/1.1" && version != "HTTP/1.0") {
      return Refuse(505, "unsupported_http_version", "This server speaks HTTP/1.1.");
    }
    is_http10_ = version == "HTTP/1.0";
    return absl::OkStatus();
  }

  absl::Status CheckField(std::string_view line) {
    if (++fields_ > limits_.max_header_fields || line.size() > limits_.max_header_line_bytes) return TooLarge();
    const size_t colon = line.find(':');
    if (colon == std::string_view::npos) return BadHeader("A header line has no colon.");
    const std::string_view name = line.substr(0, colon);
    // Also refuses folded lines, which start with a blank, and a blank before the colon.
    if (!IsToken(name)) return BadHeader("A header name holds a character it may not.");
    for (const unsigned char c : line.substr(colon + 1)) {
      if ((c < 0x20 && c != '\t') || c == 0x7f) return BadHeader("A header value holds a control character.");
    }
    return CheckMeaning(View(name), TrimBlanks(line.substr(colon + 1)));
  }

  absl::Status CheckMeaning(absl::string_view name, std::string_view value) {
    if (absl::EqualsIgnoreCase(name, "host")) {
      if (has_host_) return BadHeader("More than one Host header.");
      has_host_ = true;
    } else if (absl::EqualsIgnoreCase(name, "content-length")) {
      uint64_t length = 0;
      const auto result = std::from_chars(value.data(), value.data() + value.size(), length);
      const bool all_digits = value.find_first_not_of("0123456789") == std::string_view::npos;
      if (head_.content_length || value.empty() || !all_digits || result.ec != std::errc()) {
        return Refuse(400, "invalid_content_length", "Content-Length must be one decimal number.");
      }
      head_.content_length = length;
    } else if (absl::EqualsIgnoreCase(name, "transfer-encoding")) {
      if (head_.chunked) return Refuse(400, "ambiguous_framing", "More than one Transfer-Encoding.");
      RETURN_IF_ERROR(CheckTransferEncoding(View(value)));
      head_.chunked = true;
    } else if (absl::EqualsIgnoreCase(name, "expect")) {
      if (!absl::EqualsIgnoreCase(View(value), "100-continue")) {
        return Refuse(417, "unsupported_expectation", "Only Expect: 100-continue is supported.");
      }
      head_.expects_continue = true;
    }
    return absl::OkStatus();
  }

  // A coding we do not undo is 501 if it exists and 400 if it does not.
  absl::Status CheckTransferEncoding(absl::string_view value) {
    if (absl::EqualsIgnoreCase(value, "chunked")) return absl::OkStatus();
    for (const absl::string_view known : {"identity", "gzip", "x-gzip", "deflate", "compress", "x-compress"}) {
      if (absl::StartsWithIgnoreCase(value, known) &&
          (value.size() == known.size() || value[known.size()] == ',' || value[known.size()] == ' ')) {
        return Refuse(501, "unsupported_transfer_encoding", "Only Transfer-Encoding: chunked is supported.");
      }
    }
    return Refuse(400, "ambiguous_framing", "Unknown Transfer-Encoding.");
  }

  absl::Status CheckWhole() {
    if (!has_host_) return Refuse(400, "missing_host", "The Host header is missing.");
    if (head_.chunked && head_.content_length) {
      return Refuse(400, "ambiguous_framing", "Content-Length and Transfer-Encoding together.");
    }
    if (head_.chunked && is_http10_) return Refuse(400, "ambiguous_framing", "HTTP/1.0 has no Transfer-Encoding.");
    return absl::OkStatus();
  }

  absl::Status TooLarge() const {
    return Refuse(
        431, "headers_too_large",
        absl::StrCat("Headers exceed ", limits_.max_header_bytes, " bytes in total, ", limits_.max_header_line_bytes,
                     " in one line or ", limits_.max_header_fields, " fields."));
  }

  std::string UriMessage() const { return absl::StrCat("The URI exceeds ", limits_.max_uri_bytes, " bytes."); }

  static constexpr size_t kMaxMethodBytes = 32;

  const HttpLimits& limits_;
  HttpHead head_;
  size_t fields_ = 0;
  bool has_host_ = false;
  bool is_http10_ = false;
};

}  // namespace

absl::StatusOr<HttpHead> CheckHttpHead(std::string_view data, const HttpLimits& limits) {
  return HeadChecker(limits).Check(data);
}

}  // namespace millrace::router
