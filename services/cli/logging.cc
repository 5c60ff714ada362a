// SPDX-License-Identifier: Apache-2.0
// spdlog with a formatter that writes JSON, since a message may hold anything.
#include "services/cli/logging.h"

#include <unistd.h>

#include <ctime>
#include <memory>
#include <utility>

#include "nlohmann/json.hpp"
#include "services/cli/terminal.h"
#include "services/common/log_scope.h"
#include "spdlog/formatter.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace millrace::cli {
namespace {

class JsonFormatter final : public spdlog::formatter {
 public:
  JsonFormatter(std::string role, std::string name) : role_(std::move(role)), name_(std::move(name)) {}

  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    using std::chrono::duration_cast;
    const auto since_epoch = message.time.time_since_epoch();
    const std::time_t seconds = duration_cast<std::chrono::seconds>(since_epoch).count();
    const auto micros = duration_cast<std::chrono::microseconds>(since_epoch).count() % 1000000;
    std::tm utc{};
    gmtime_r(&seconds, &utc);
    char stamp[40];
    const size_t length = std::strftime(stamp, sizeof(stamp), "%Y-%m-%dT%H:%M:%S", &utc);
    std::snprintf(stamp + length, sizeof(stamp) - length, ".%06dZ", static_cast<int>(micros));
    const auto level = spdlog::level::to_string_view(message.level);
    nlohmann::ordered_json line = {{"time", stamp},
                                   {"level", std::string(level.data(), level.size())},
                                   {"role", role_},
                                   {"worker", name_},
                                   {"thread", message.thread_id}};
    if (const LogScope* about = LogScope::current()) {  // lines are formatted on the thread that writes them
      if (!about->request_id().empty()) line["request_id"] = about->request_id();
      if (!about->trace_id().empty()) line["trace_id"] = about->trace_id();
    }
    line["message"] = std::string(message.payload.data(), message.payload.size());
    const std::string text = line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    out.append(text.data(), text.data() + text.size());
    out.push_back('\n');
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(role_, name_); }

 private:
  const std::string role_, name_;
};

}  // namespace

void SetUpLogging(const LogOptions& options) {
  const std::string& level = options.level;
  auto logger = spdlog::stderr_logger_mt(options.name);
  if (options.format.empty() ? !IsTerminal(STDERR_FILENO) : options.format == "json") {
    logger->set_formatter(std::make_unique<JsonFormatter>(options.role, options.name));
  }
  logger->set_level(level == "debug"   ? spdlog::level::debug
                    : level == "warn"  ? spdlog::level::warn
                    : level == "error" ? spdlog::level::err
                                       : spdlog::level::info);
  logger->flush_on(spdlog::level::trace);  // a process that is killed has logged what it knew
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace millrace::cli
