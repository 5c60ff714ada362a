// SPDX-License-Identifier: Apache-2.0
// Errors keep their code, field and retry time through absl::Status, and say no more in public than they should.
#include "services/common/http_status.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace millrace {
namespace {

TEST(ApiError, TravelsInsideAStatus) {
  const absl::Status status =
      MakeError(absl::StatusCode::kResourceExhausted, "Queue is full.",
                {.code = "overloaded", .param = "model", .http_status = 429, .retry_after_s = 3.2});
  const auto error = GetApiError(status);
  ASSERT_TRUE(error.has_value());
  EXPECT_EQ(error->code, "overloaded");
  EXPECT_EQ(error->param, "model");
  EXPECT_EQ(error->http_status, 429);
  EXPECT_DOUBLE_EQ(*error->retry_after_s, 3.2);
  EXPECT_EQ(ToHttpError(status).retry_after_s, 4);
}

TEST(ApiError, StatusOfThePartsBehindUsIsNotQuotedToTheCaller) {
  const HttpError http = ToHttpError(absl::InternalError("open /srv/weights/x.safetensors: no such file"));
  EXPECT_EQ(http.http_status, 500);
  EXPECT_EQ(http.code, "internal_error");
  EXPECT_EQ(http.message.find("/srv"), std::string::npos);
}

TEST(HttpStatus, EveryStatusCodeHasARow) {
  const std::pair<absl::Status, int> cases[] = {
      {absl::InvalidArgumentError("x"), 400},    {absl::OutOfRangeError("x"), 400},
      {absl::UnauthenticatedError("x"), 401},    {absl::PermissionDeniedError("x"), 403},
      {absl::NotFoundError("x"), 404},           {absl::AlreadyExistsError("x"), 409},
      {absl::ResourceExhaustedError("x"), 429},  {absl::CancelledError("x"), 499},
      {absl::UnimplementedError("x"), 501},      {absl::AbortedError("x"), 503},
      {absl::UnavailableError("x"), 503},        {absl::DeadlineExceededError("x"), 504},
      {absl::FailedPreconditionError("x"), 500}, {absl::DataLossError("x"), 500},
      {absl::InternalError("x"), 500},           {absl::UnknownError("x"), 500},
  };
  for (const auto& [status, http_status] : cases) {
    const HttpError http = ToHttpError(status);
    EXPECT_EQ(http.http_status, http_status) << status;
    EXPECT_FALSE(http.code.empty());
    EXPECT_FALSE(http.message.empty());
    EXPECT_NE(HttpReason(http.http_status), "Unknown");
  }
}

TEST(HttpStatus, RetryableErrorsSayWhenToComeBack) {
  EXPECT_TRUE(ToHttpError(absl::ResourceExhaustedError("")).retry_after_s.has_value());
  EXPECT_TRUE(ToHttpError(absl::UnavailableError("")).retry_after_s.has_value());
  EXPECT_FALSE(ToHttpError(absl::InvalidArgumentError("")).retry_after_s.has_value());
}

TEST(HttpStatus, BodyHasTheShapeClientLibrariesParse) {
  const HttpError http = ToHttpError(InvalidRequest("invalid_type", "messages[0].content", "Expected a string."));
  const auto body = nlohmann::json::parse(http.ToJson("req-1"));
  EXPECT_EQ(body["error"]["message"], "Expected a string.");
  EXPECT_EQ(body["error"]["type"], "invalid_request_error");
  EXPECT_EQ(body["error"]["param"], "messages[0].content");
  EXPECT_EQ(body["error"]["code"], "invalid_type");
  EXPECT_EQ(body["error"]["request_id"], "req-1");
  EXPECT_FALSE(body["error"].contains("delivered_tokens"));
  EXPECT_EQ(nlohmann::json::parse(http.ToJson("r", 7))["error"]["delivered_tokens"], 7);
}

TEST(QuoteInput, EscapesAndCuts) {
  EXPECT_EQ(QuoteInput("plain"), "'plain'");
  EXPECT_EQ(QuoteInput("a\n'\xff"), "'a\\x0a\\x27\\xff'");
  EXPECT_LE(QuoteInput(std::string(1000, 'x')).size(), 70u);
}

}  // namespace
}  // namespace millrace
