// SPDX-License-Identifier: Apache-2.0
// What the HTTP server makes of the bytes of requests, through real sockets: framing, limits, timeouts, pipelining.
#include "services/router/http_server.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>

#include "absl/strings/str_cat.h"
#include "services/router/http_server_fixture.h"

namespace millrace::router {
namespace {

TEST_F(HttpServerTest, AmbiguousOrMalformedHeadsAreRefusedByName) {
  StartServer();
  const auto with = [](const std::string& headers) {
    return "POST /x HTTP/1.1\r\nHost: a\r\n" + headers + "\r\n12345";
  };
  struct Case {
    std::string bytes;
    int status;
    std::string code;
  };
  std::string many_fields = "GET /x HTTP/1.1\r\nHost: a\r\n";
  for (int i = 0; i < 10'000; ++i) absl::StrAppend(&many_fields, "a: b\r\n");
  const Case cases[] = {
      {"GET\r\n\r\n", 400, "malformed_request_line"},
      {std::string("\x16\x03\x01\x02\x00\x01\x00", 7), 400, "malformed_request_line"},
      {std::string("\x00\x01\x02\x03", 4), 400, "malformed_request_line"},
      {"GET /x\r\n\r\n", 400, "malformed_request_line"},
      {"GET /x HTTP/0.9\r\nHost: a\r\n\r\n", 400, "malformed_request_line"},
      {"GET  /x HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request_line"},
      {"GET /x  HTTP/1.1\r\nHost: a\r\n\r\n", 400, "malformed_request_line"},
      {"GET /x HTTP/1.1 \r\nHost: a\r\n\r\n", 400, "malformed_request_line"},
      {"GET /x HTTP/1.1\nHost: a\n\n", 400, "malformed_request_line"},
      {"GET /x HTTP/1.0\r\n\r\n", 400, "missing_host"},
      {"GET /x HTTP/1.1\r\n\r\n", 400, "missing_host"},
      {"GET /x HTTP/3.7\r\nHost: a\r\n\r\n", 505, "unsupported_http_version"},
      {"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505, "unsupported_http_version"},
      {"GET /" + std::string(4096, 'u') + " HTTP/1.1\r\nHost: a\r\n\r\n", 414, "uri_too_long"},
      {"GET /" + std::string(5000, 'u'), 414, "uri_too_long"},
      {"GET /x HTTP/1.1\r\nHost: a\r\nA: " + std::string(8193, 'v'), 431, "headers_too_large"},
      {many_fields, 431, "headers_too_large"},
      {with("Host: b\r\n"), 400, "malformed_header"},
      {with("Content-Length: 5\r\nTransfer-Encoding: chunked\r\n"), 400, "ambiguous_framing"},
      {with("Transfer-Encoding: chunked\r\nContent-Length: 5\r\n"), 400, "ambiguous_framing"},
      {with("Content-Length: 5\r\nContent-Length: 6\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: 5\r\nContent-Length: 5\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: 5, 5\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: +5\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: -1\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: 0x10\r\n"), 400, "invalid_content_length"},
      {with("Content-Length: \r\n"), 400, "invalid_content_length"},
      {with("Content-Length: 18446744073709551616\r\n"), 400, "invalid_content_length"},
      {with("Transfer-Encoding : chunked\r\n"), 400, "malformed_header"},
      {with("Transfer-Encoding: chunkedx\r\n"), 400, "ambiguous_framing"},
      {with("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n"), 400, "ambiguous_framing"},
      {with("Transfer-Encoding: gzip, chunked\r\n"), 501, "unsupported_transfer_encoding"},
      {with("Transfer-Encoding: identity\r\n"), 501, "unsupported_transfer_encoding"},
      {"POST /x HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "ambiguous_framing"},
      {with("A: b\nContent-Length: 5\r\n"), 400, "malformed_header"},
      {with("A: b\r\n folded\r\n"), 400, "malformed_header"},
      {with("\tA: b\r\n"), 400, "malformed_header"},
      {with(std::string("A: b\0c\r\n", 8)), 400, "malformed_header"},
      {with("A: b\rc\r\n"), 400, "malformed_header"},
      {with("A b: c\r\n"), 400, "malformed_header"},
      {with("no colon\r\n"), 400, "malformed_header"},
      {with(": empty\r\n"), 400, "malformed_header"},
      {with("Expect: 200-ok\r\nContent-Length: 5\r\n"), 417, "unsupported_expectation"},
      {with("Content-Length: 16777217\r\n"), 413, "body_too_large"},
  };
  for (const auto& test : cases) {
    TestClient client(port());
    client.Send(test.bytes);
    const TestReply reply = client.Read();
    EXPECT_EQ(reply.status, test.status) << test.bytes.substr(0, 120);
    EXPECT_EQ(CodeOf(reply), test.code) << test.bytes.substr(0, 120);
    EXPECT_EQ(reply.headers.count("x-request-id"), 1u);
    client.ShutdownSend();
    EXPECT_TRUE(client.WaitForClose()) << test.bytes.substr(0, 120);
  }
  EXPECT_EQ(requests_, 0);
}

TEST_F(HttpServerTest, LookAlikeAndUpgradeHeadersMeanNothing) {
  StartServer();
  EXPECT_EQ(Ask("GET /x HTTP/1.1\r\nHost: a\r\nContent_Length: 5\r\n\r\n").body, "GET /x 0  no-length");
  EXPECT_EQ(Ask("GET /x HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n").status, 200);
}

TEST_F(HttpServerTest, ChunkedBodiesAreReadOrRefused) {
  StartServer();
  const auto chunked = [](const std::string& body) {
    return "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + body;
  };
  EXPECT_EQ(Ask(chunked("5\r\nhello\r\n3;ext=1\r\nabc\r\n0\r\nTrailer: x\r\n\r\n")).body,
            "POST /x 8 helloabc no-length");
  EXPECT_EQ(Ask(chunked("FFFFFFFFFFFFFFFF1\r\n")).status, 400);
  EXPECT_EQ(Ask(chunked("-1\r\n")).status, 400);
  EXPECT_EQ(Ask(chunked("5\r\nhelloX3\r\nabc\r\n")).status, 400);
  EXPECT_EQ(Ask(chunked("5\nhello\r\n")).status, 400);
  EXPECT_EQ(Ask(chunked("5;" + std::string(1 << 20, 'e'))).status, 400);
  std::string tiny;
  for (int i = 0; i < 200'000; ++i) tiny += "1\r\nx\r\n";
  EXPECT_EQ(CodeOf(Ask(chunked(tiny))), "chunk_overhead");
}

TEST_F(HttpServerTest, BodyOverTheLimitIsRefusedAtTheLimit) {
  HttpLimits limits = ShortLimits();
  limits.max_body_bytes = 100'000;
  StartServer(limits);
  EXPECT_EQ(Ask(Post(std::string(100'000, 'b'))).status, 200);
  EXPECT_EQ(CodeOf(Ask(Post(std::string(100'001, 'b')))), "body_too_large");
  const std::string head = "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
  EXPECT_EQ(CodeOf(Ask(absl::StrCat(head, "186A1\r\n", std::string(100'001, 'b'), "\r\n0\r\n\r\n"))), "body_too_large");
}

TEST_F(HttpServerTest, BodiesShareABudget) {
  HttpLimits limits = ShortLimits();
  limits.max_body_bytes_total = 50'000;
  limits.body_idle_timeout = std::chrono::seconds(10);
  limits.body_rate_grace = std::chrono::seconds(10);
  StartServer(limits);
  TestClient first(port());
  first.Send(Post(std::string(40'000, 'b')).substr(0, 35'000));
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 1; }));
  std::this_thread::sleep_for(std::chrono::milliseconds(100));
  const TestReply refused = Ask(Post(std::string(40'000, 'b')));
  EXPECT_EQ(refused.status, 503);
  EXPECT_EQ(CodeOf(refused), "overloaded");
  first.Close();
  EXPECT_TRUE(Eventually([&] { return Ask(Post(std::string(40'000, 'b'))).status == 200; }));
}

TEST_F(HttpServerTest, SlowHeadersAndBodiesTimeOut) {
  StartServer();
  {
    TestClient client(port());
    client.Send("GET /x HT");
    EXPECT_EQ(CodeOf(client.Read()), "header_timeout");
  }
  {
    TestClient client(port());
    for (int i = 0; i < 100 && client.Send("a"); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(client.Read().status, 408);  // one byte at a time does not extend the deadline
  }
  {
    TestClient client(port());
    client.Send("POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n");
    EXPECT_EQ(CodeOf(client.Read()), "body_timeout");
  }
  {
    TestClient client(port());
    client.Send("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: 1048576\r\n\r\n");
    for (int i = 0; i < 100 && client.Send("b"); ++i) std::this_thread::sleep_for(std::chrono::milliseconds(20));
    EXPECT_EQ(CodeOf(client.Read()), "body_timeout");
  }
}

TEST_F(HttpServerTest, ExpectContinueIsAnsweredBeforeTheBody) {
  StartServer();
  TestClient client(port());
  client.Send("POST /x HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\n");
  ASSERT_TRUE(client.WaitFor("HTTP/1.1 100 Continue\r\n\r\n"));
  EXPECT_EQ(client.Read(1000, false).status, 100);
  client.Send("hello");
  EXPECT_EQ(client.Read().body, "POST /x 5 hello");
}

TEST_F(HttpServerTest, AnySplitIntoTwoSegmentsReadsTheSame) {
  StartServer();
  const std::string requests[] = {
      Post("hello"),
      "POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n"
      "0\r\n\r\n"};
  for (const auto& request : requests) {
    TestClient client(port());  // kept alive all along
    for (size_t split = 1; split < request.size(); ++split) {
      client.Send(request.substr(0, split));
      std::this_thread::sleep_for(std::chrono::microseconds(300));
      client.Send(request.substr(split));
      const TestReply reply = client.Read();
      ASSERT_EQ(reply.status, 200) << split;
      ASSERT_EQ(reply.body.substr(0, 15), "POST /x 5 hello") << split;
    }
  }
}

TEST_F(HttpServerTest, PipelinedRequestsAreServedInOrderWithBackPressure) {
  StartServer();
  constexpr int kRequests = 10'000;
  std::string all;
  for (int i = 0; i < kRequests; ++i) absl::StrAppend(&all, "GET /", i, " HTTP/1.1\r\nHost: a\r\n\r\n");
  TestClient client(port());
  std::thread sender([&] { client.Send(all); });
  for (int i = 0; i < kRequests; ++i) {
    const TestReply reply = client.Read();
    if (reply.status != 200 || reply.body != absl::StrCat("GET /", i, " 0  no-length")) {
      ADD_FAILURE() << i << ": " << reply.status << " " << reply.body;
      break;
    }
  }
  sender.join();
}

TEST_F(HttpServerTest, RequestsSentBeforeAHalfCloseAreAnswered) {
  StartServer();
  TestClient client(port());
  client.Send(absl::StrCat(kGet, kGet, kGet));
  client.ShutdownSend();
  for (int i = 0; i < 3; ++i) EXPECT_EQ(client.Read().status, 200) << i;
  EXPECT_TRUE(client.WaitForClose());
}

TEST_F(HttpServerTest, HeadHasNoBodyAndHttp10Closes) {
  StartServer();
  TestClient head(port());
  head.Send("HEAD /x HTTP/1.1\r\nHost: a\r\n\r\n");
  EXPECT_EQ(head.Read(1000, false).headers["content-length"], "20");
  head.Send(kGet);
  EXPECT_EQ(head.Read().body, "GET /x 0  no-length");

  TestClient old(port());
  old.Send("GET /x HTTP/1.0\r\nHost: a\r\n\r\n");
  EXPECT_EQ(old.Read().headers["connection"], "close");
  EXPECT_TRUE(old.WaitForClose());
}

}  // namespace
}  // namespace millrace::router
