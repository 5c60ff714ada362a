// SPDX-License-Identifier: Apache-2.0
// spdlog with a formatter that writes JSON, since a message may hold anything.
#include "services/cli/logging.h"

#include <unistd.h>

#include <ctime>
#include <memory>
#include <utility>

#include "nlohmann/json.hpp"
#include "services/cli/terminal.h"
#include "spdlog/formatter.h"
#include "spdlog/sinks/stdout_sinks.h"
#include "spdlog/spdlog.h"

namespace millrace::cli {
namespace {

class JsonFormatter final : public spdlog::formatter {
 public:
  explicit JsonFormatter(std::string name) : name_(std::move(name)) {}

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
    const nlohmann::ordered_json line = {{"time", stamp},
                                         {"level", std::string(level.data(), level.size())},
                                         {"role", name_},
                                         {"thread", message.thread_id},
                                         {"message", std::string(message.payload.data(), message.payload.size())}};
    const std::string text = line.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
    out.append(text.data(), text.data() + text.size());
    out.push_back('\n');
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(name_); }

 private:
  const std::string name_;
};

}  // namespace

void SetUpLogging(const std::string& name, const std::string& level) {
  auto logger = spdlog::stderr_logger_mt(name);
  if (!IsTerminal(STDERR_FILENO)) logger->set_formatter(std::make_unique<JsonFormatter>(name));
  logger->set_level(level == "debug"   ? spdlog::level::debug
                    : level == "warn"  ? spdlog::level::warn
                    : level == "error" ? spdlog::level::err
                                       : spdlog::level::info);
  logger->flush_on(spdlog::level::trace);  // a process that is killed has logged what it knew
  spdlog::set_default_logger(std::move(logger));
}

}  // namespace millrace::cli
