// SPDX-License-Identifier: Apache-2.0
// Sockets, status line, headers, the three kinds of body; and events.
#include "services/cli/http_client.h"

#include <fcntl.h>
#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"
#include "services/cli/command.h"

namespace millrace::cli {
namespace {

constexpr size_t kMaxHeadBytes = 64 << 10;
constexpr size_t kMaxBodyBytes = 256u << 20;

class Socket {
 public:
  ~Socket() {
    if (fd_ >= 0) close(fd_);
  }
  absl::Status Connect(const std::string& address, std::chrono::milliseconds timeout) {
    const size_t colon = address.rfind(':');
    if (colon == std::string::npos) return absl::InvalidArgumentError(absl::StrCat(address, ": expected host:port"));
    std::string host = address.substr(0, colon);
    if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* found = nullptr;
    if (const int error = getaddrinfo(host.c_str(), address.c_str() + colon + 1, &hints, &found); error != 0) {
      return absl::UnavailableError(absl::StrCat(address, ": ", gai_strerror(error)));
    }
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> list(found, freeaddrinfo);
    std::string why = "no address";
    for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
      fd_ = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
      if (fd_ < 0) continue;
      int error = connect(fd_, one->ai_addr, one->ai_addrlen) == 0 ? 0 : errno;
      if (error == EINPROGRESS) {
        error = ETIMEDOUT;
        if (Wait(POLLOUT, timeout).ok()) {
          socklen_t size = sizeof(error);
          getsockopt(fd_, SOL_SOCKET, SO_ERROR, &error, &size);
        }
      }
      if (error == 0) return absl::OkStatus();
      why = std::strerror(error);
      close(fd_);
      fd_ = -1;
    }
    return absl::UnavailableError(absl::StrCat("cannot reach ", address, ": ", why));
  }
  // Over the connection. Unavailable: the certificate is not believed, or what answers does not speak TLS.
  absl::Status StartTls(const std::string& address, const HttpDoor& door, std::chrono::milliseconds timeout) {
    context_.reset(SSL_CTX_new(TLS_client_method()));
    SSL_CTX_set_min_proto_version(context_.get(), TLS1_2_VERSION);
    SSL_CTX_set_mode(context_.get(), SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
    SSL_CTX_set_verify(context_.get(), SSL_VERIFY_PEER, nullptr);
    X509_VERIFY_PARAM_set_flags(SSL_CTX_get0_param(context_.get()),
                                X509_V_FLAG_PARTIAL_CHAIN);  // a pinned leaf will do
    const bool loaded = door.ca.empty() ? SSL_CTX_set_default_verify_paths(context_.get()) == 1
                                        : SSL_CTX_load_verify_locations(context_.get(), door.ca.c_str(), nullptr) == 1;
    if (!loaded) return absl::InvalidArgumentError(absl::StrCat(door.ca, ": holds no PEM certificate"));
    ssl_.reset(SSL_new(context_.get()));
    std::string host = address.substr(0, address.rfind(':'));
    if (host.size() > 2 && host.front() == '[') host = host.substr(1, host.size() - 2);
    if (!door.any_name && X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl_.get()), host.c_str()) != 1) {
      SSL_set1_host(ssl_.get(), host.c_str());
      SSL_set_tlsext_host_name(ssl_.get(), host.c_str());
    }
    SSL_set_fd(ssl_.get(), fd_);
    while (true) {
      ERR_clear_error();
      const int result = SSL_connect(ssl_.get());
      if (result == 1) return absl::OkStatus();
      if (const absl::Status status = WaitForTls(result, timeout); !status.ok()) {
        const long verified = SSL_get_verify_result(ssl_.get());
        return verified == X509_V_OK
                   ? status
                   : absl::UnavailableError(absl::StrCat(
                         address, ": its certificate is not believed: ", X509_verify_cert_error_string(verified)));
      }
    }
  }
  absl::Status Write(absl::string_view bytes, std::chrono::milliseconds timeout) {
    while (!bytes.empty() && ssl_ != nullptr) {
      ERR_clear_error();
      const int sent = SSL_write(ssl_.get(), bytes.data(), static_cast<int>(std::min<size_t>(bytes.size(), 1 << 20)));
      if (sent > 0) {
        bytes.remove_prefix(static_cast<size_t>(sent));
      } else {
        RETURN_IF_ERROR(WaitForTls(sent, timeout));
      }
    }
    while (!bytes.empty()) {
      const ssize_t sent = send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent >= 0) {
        bytes.remove_prefix(static_cast<size_t>(sent));
      } else if (errno == EAGAIN) {
        RETURN_IF_ERROR(Wait(POLLOUT, timeout));
      } else if (errno != EINTR) {
        return absl::UnavailableError(absl::StrCat("connection lost: ", std::strerror(errno)));
      }
    }
    return absl::OkStatus();
  }
  // Appends what is there; false at the end of the connection.
  absl::StatusOr<bool> Read(std::string& out, std::chrono::milliseconds timeout) {
    char buffer[16 << 10];
    while (ssl_ != nullptr) {
      ERR_clear_error();
      const int got = SSL_read(ssl_.get(), buffer, sizeof(buffer));
      if (got > 0) {
        out.append(buffer, static_cast<size_t>(got));
        return true;
      }
      if (SSL_get_error(ssl_.get(), got) == SSL_ERROR_ZERO_RETURN) return false;
      RETURN_IF_ERROR(WaitForTls(got, timeout));
    }
    while (true) {
      const ssize_t got = recv(fd_, buffer, sizeof(buffer), 0);
      if (got > 0) {
        out.append(buffer, static_cast<size_t>(got));
        return true;
      }
      if (got == 0) return false;
      if (errno == EAGAIN) {
        RETURN_IF_ERROR(Wait(POLLIN, timeout));
      } else if (errno != EINTR) {
        return absl::UnavailableError(absl::StrCat("connection lost: ", std::strerror(errno)));
      }
    }
  }

 private:
  template <typename T, void (*kFree)(T*)>
  struct Freer {
    void operator()(T* object) const { kFree(object); }
  };
  // OK: try again.
  absl::Status WaitForTls(int result, std::chrono::milliseconds timeout) {
    switch (SSL_get_error(ssl_.get(), result)) {
      case SSL_ERROR_WANT_READ:
        return Wait(POLLIN, timeout);
      case SSL_ERROR_WANT_WRITE:
        return Wait(POLLOUT, timeout);
      default:
        const char* const why = ERR_reason_error_string(ERR_peek_last_error());
        return absl::UnavailableError(absl::StrCat("connection lost: ", why != nullptr ? why : "closed"));
    }
  }
  absl::Status Wait(short events, std::chrono::milliseconds timeout) {
    pollfd entry{fd_, events, 0};
    const int ready = poll(&entry, 1, static_cast<int>(timeout.count()));
    if (ready == 0) return absl::DeadlineExceededError(absl::StrCat("nothing for ", timeout.count(), " ms"));
    if (ready < 0 && errno == EINTR) return absl::CancelledError("interrupted");
    return absl::OkStatus();
  }
  int fd_ = -1;
  std::unique_ptr<SSL_CTX, Freer<SSL_CTX, SSL_CTX_free>> context_;
  std::unique_ptr<SSL, Freer<SSL, SSL_free>> ssl_;  // null: plain
};

std::string Header(const HttpReply& reply, absl::string_view name) {
  for (const auto& [key, value] : reply.headers) {
    if (key == name) return value;
  }
  return "";
}

absl::Status ParseHead(absl::string_view head, HttpReply& reply) {
  const std::vector<absl::string_view> lines = absl::StrSplit(head, "\r\n");
  const std::vector<absl::string_view> first = absl::StrSplit(lines[0], absl::MaxSplits(' ', 2));
  if (first.size() < 2 || !absl::SimpleAtoi(first[1], &reply.status)) {
    return absl::UnavailableError("what answers there does not speak HTTP");
  }
  for (size_t i = 1; i < lines.size(); ++i) {
    const std::pair<absl::string_view, absl::string_view> field = absl::StrSplit(lines[i], absl::MaxSplits(':', 1));
    reply.headers.emplace_back(absl::AsciiStrToLower(field.first),
                               std::string(absl::StripAsciiWhitespace(field.second)));
  }
  return absl::OkStatus();
}

// Takes body bytes as they come, whatever their framing, and says when the body is whole.
class BodyReader {
 public:
  BodyReader(const HttpReply& reply, std::function<absl::Status(absl::string_view)> sink) : sink_(std::move(sink)) {
    chunked_ = Header(reply, "transfer-encoding") == "chunked";
    const std::string length = Header(reply, "content-length");
    if (!chunked_ && !length.empty()) has_length_ = absl::SimpleAtoi(length, &left_);
    if (has_length_ && left_ == 0) done_ = true;
  }
  bool done() const { return done_; }
  bool until_close() const { return !chunked_ && !has_length_; }

  // Consumes a prefix of `buffer`.
  absl::Status Push(std::string& buffer) {
    if (!chunked_) {
      const size_t take = has_length_ ? std::min<size_t>(buffer.size(), left_) : buffer.size();
      RETURN_IF_ERROR(sink_(absl::string_view(buffer).substr(0, take)));
      buffer.erase(0, take);
      if (has_length_ && (left_ -= take) == 0) done_ = true;
      return absl::OkStatus();
    }
    while (!done_) {
      if (left_ > 0) {  // inside a chunk
        const size_t take = std::min<size_t>(buffer.size(), left_);
        if (take == 0) return absl::OkStatus();
        RETURN_IF_ERROR(sink_(absl::string_view(buffer).substr(0, take)));
        buffer.erase(0, take);
        left_ -= take;
        after_chunk_ = left_ == 0;
        continue;
      }
      const size_t end = buffer.find("\r\n");
      if (end == std::string::npos) return absl::OkStatus();
      const std::string line = buffer.substr(0, end);
      buffer.erase(0, end + 2);
      if (after_chunk_) {  // the line end behind a chunk's data
        after_chunk_ = false;
      } else if (in_trailer_) {
        done_ = line.empty();
      } else {
        left_ = std::strtoull(line.c_str(), nullptr, 16);
        in_trailer_ = left_ == 0;
      }
    }
    return absl::OkStatus();
  }

 private:
  const std::function<absl::Status(absl::string_view)> sink_;
  bool chunked_ = false, has_length_ = false, done_ = false, after_chunk_ = false, in_trailer_ = false;
  uint64_t left_ = 0;
};

}  // namespace

absl::StatusOr<std::string> ReadApiKey(const std::string& file, const char* variable) {
  std::string key;
  if (!file.empty()) {
    ASSIGN_OR_RETURN(const std::string text, ReadInput(file, 4096));
    key = text.substr(0, text.find_first_of("\r\n"));
  } else if (const char* value = std::getenv(variable)) {
    key = value;
  }
  if (std::any_of(key.begin(), key.end(), [](char c) { return c <= ' ' || c > '~'; })) {
    return absl::InvalidArgumentError("the API key has characters that no header can carry");
  }
  return key;
}

absl::StatusOr<HttpReply> Send(const HttpCall& call) {
  Socket socket;
  RETURN_IF_ERROR(socket.Connect(call.address, call.connect_timeout));
  if (call.door.tls) RETURN_IF_ERROR(socket.StartTls(call.address, call.door, call.connect_timeout));
  std::string request = absl::StrCat(call.method, " ", call.path, " HTTP/1.1\r\nHost: ", call.address,
                                     "\r\nAccept: ", call.accept, "\r\nConnection: close\r\n");
  if (!call.door.api_key.empty()) absl::StrAppend(&request, "Authorization: Bearer ", call.door.api_key, "\r\n");
  if (!call.body.empty()) {
    absl::StrAppend(&request, "Content-Type: application/json\r\nContent-Length: ", call.body.size(), "\r\n");
  }
  absl::StrAppend(&request, "\r\n", call.body);
  RETURN_IF_ERROR(socket.Write(request, call.read_timeout));

  HttpReply reply;
  std::string buffer;
  size_t head_end = std::string::npos;
  while ((head_end = buffer.find("\r\n\r\n")) == std::string::npos) {
    if (buffer.size() > kMaxHeadBytes) return absl::UnavailableError("reply header is too long");
    ASSIGN_OR_RETURN(const bool more, socket.Read(buffer, call.read_timeout));
    if (!more) return absl::UnavailableError("the connection was closed before a reply came");
  }
  RETURN_IF_ERROR(ParseHead(absl::string_view(buffer).substr(0, head_end), reply));
  buffer.erase(0, head_end + 4);
  const bool stream = call.on_body != nullptr && reply.status / 100 == 2;
  BodyReader body(reply, [&](absl::string_view piece) -> absl::Status {
    if (stream) return call.on_body(piece) ? absl::OkStatus() : absl::CancelledError("cancelled");
    if (reply.body.size() + piece.size() > kMaxBodyBytes) return absl::ResourceExhaustedError("reply is too long");
    reply.body.append(piece.data(), piece.size());
    return absl::OkStatus();
  });
  while (!body.done()) {
    RETURN_IF_ERROR(body.Push(buffer));
    if (body.done()) break;
    ASSIGN_OR_RETURN(const bool more, socket.Read(buffer, call.read_timeout));
    if (more) continue;
    if (body.until_close()) break;
    return absl::UnavailableError("the connection was closed in the middle of the reply");
  }
  return reply;
}

bool SseReader::Push(absl::string_view bytes) {
  pending_.append(bytes.data(), bytes.size());
  size_t end = 0;
  while ((end = pending_.find("\n\n")) != std::string::npos) {
    std::string data;
    for (absl::string_view line : absl::StrSplit(absl::string_view(pending_).substr(0, end), '\n')) {
      if (line.substr(0, 5) != "data:") continue;  // comments keep the connection alive
      line.remove_prefix(5);
      if (!line.empty() && line[0] == ' ') line.remove_prefix(1);
      absl::StrAppend(&data, data.empty() ? "" : "\n", line);
    }
    pending_.erase(0, end + 2);
    if (!data.empty() && !on_event_(data)) return false;
  }
  return true;
}

}  // namespace millrace::cli
