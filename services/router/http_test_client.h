// SPDX-License-Identifier: Apache-2.0
// A client for tests that sends exactly the bytes it is told to and reads replies with a deadline; no library in
// between that would repair either.
//
// Thread: one client, one thread.
#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

namespace millrace::router {

struct TestReply {
  int status = 0;                              // 0: none came
  std::map<std::string, std::string> headers;  // names in lower case
  std::string body;
  bool complete = false;  // all of the body came
};

class TestClient {
 public:
  explicit TestClient(uint16_t port, int receive_buffer = 0) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    if (receive_buffer != 0) ::setsockopt(fd_, SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    connected_ = ::connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0;
    const int on = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
  }
  ~TestClient() { Close(); }
  TestClient(const TestClient&) = delete;
  TestClient& operator=(const TestClient&) = delete;

  bool connected() const { return connected_; }

  // False if the server closed before it was all sent.
  bool Send(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
      if (sent <= 0) return false;
      bytes.remove_prefix(static_cast<size_t>(sent));
    }
    return true;
  }

  void ShutdownSend() { ::shutdown(fd_, SHUT_WR); }
  void Close() {
    if (fd_ >= 0) ::close(fd_);
    fd_ = -1;
  }

  // Reads until `text` is in what has arrived and not been taken as a reply.
  bool WaitFor(std::string_view text, int timeout_ms = 10'000) {
    const auto end = Deadline(timeout_ms);
    while (buffer_.find(text) == std::string::npos) {
      if (!Receive(end)) return false;
    }
    return true;
  }

  // True if the server closes within the time.
  bool WaitForClose(int timeout_ms = 10'000) {
    const auto end = Deadline(timeout_ms);
    while (Receive(end)) {
    }
    return closed_;
  }

  const std::string& buffer() const { return buffer_; }

  // The next reply. `body_expected` false for HEAD.
  TestReply Read(int timeout_ms = 10'000, bool body_expected = true) {
    TestReply reply;
    const auto end = Deadline(timeout_ms);
    size_t head_end = 0;
    while ((head_end = buffer_.find("\r\n\r\n")) == std::string::npos) {
      if (!Receive(end)) return reply;
    }
    ParseHead(buffer_.substr(0, head_end + 2), reply);
    buffer_.erase(0, head_end + 4);
    if (!body_expected || reply.status == 204) {
      reply.complete = true;
    } else if (reply.headers.count("transfer-encoding") != 0) {
      reply.complete = ReadChunks(reply.body, end);
    } else if (const auto it = reply.headers.find("content-length"); it != reply.headers.end()) {
      const size_t length = std::stoul(it->second);
      while (buffer_.size() < length && Receive(end)) {
      }
      reply.complete = buffer_.size() >= length;
      reply.body = buffer_.substr(0, length);
      buffer_.erase(0, reply.body.size());
    } else {
      while (Receive(end)) {
      }
      reply.complete = closed_;
      reply.body.swap(buffer_);
    }
    return reply;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static Clock::time_point Deadline(int timeout_ms) { return Clock::now() + std::chrono::milliseconds(timeout_ms); }

  bool Receive(Clock::time_point end) {
    const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(end - Clock::now()).count();
    pollfd poll_fd{fd_, POLLIN, 0};
    if (closed_ || left <= 0 || ::poll(&poll_fd, 1, static_cast<int>(left)) <= 0) return false;
    char bytes[65536];
    const ssize_t received = ::recv(fd_, bytes, sizeof bytes, 0);
    if (received <= 0) {
      closed_ = true;
      return false;
    }
    buffer_.append(bytes, static_cast<size_t>(received));
    return true;
  }

  static void ParseHead(std::string_view head, TestReply& reply) {
    if (head.size() >= 12) reply.status = std::atoi(std::string(head.substr(9, 3)).c_str());
    size_t at = head.find("\r\n") + 2;
    while (at < head.size()) {
      const size_t line_end = head.find("\r\n", at);
      const std::string_view line = head.substr(at, line_end - at);
      const size_t colon = line.find(':');
      std::string name(line.substr(0, colon));
      std::transform(name.begin(), name.end(), name.begin(), ::tolower);
      reply.headers[name] = std::string(line.substr(colon + 2));
      at = line_end + 2;
    }
  }

  bool ReadChunks(std::string& body, Clock::time_point end) {
    while (true) {
      size_t line_end = 0;
      while ((line_end = buffer_.find("\r\n")) == std::string::npos) {
        if (!Receive(end)) return false;
      }
      const size_t length = std::stoul(buffer_.substr(0, line_end), nullptr, 16);
      while (buffer_.size() < line_end + 2 + length + 2) {
        if (!Receive(end)) return false;
      }
      body += buffer_.substr(line_end + 2, length);
      buffer_.erase(0, line_end + 2 + length + 2);
      if (length == 0) return true;
    }
  }

  int fd_;
  bool connected_ = false;
  bool closed_ = false;
  std::string buffer_;
};

}  // namespace millrace::router
