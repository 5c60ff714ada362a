// SPDX-License-Identifier: Apache-2.0
// See config.h.
#include "services/common/config.h"

#include <google/protobuf/util/json_util.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <set>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "engine/status.h"
#include "engine/strict_json.h"

namespace millrace {
namespace {

constexpr size_t kMaxConfigBytes = 1 << 20;
constexpr uint32_t kMostTokens = std::numeric_limits<int32_t>::max();  // what a request's max_tokens can say

absl::Status Bad(absl::string_view field, absl::string_view found, absl::string_view allowed) {
  return absl::InvalidArgumentError(absl::StrCat(field, ": found ", found, ", allowed ", allowed));
}

// Fills `value` if it is 0 and checks its range.
template <typename T>
absl::Status Number(absl::string_view field, T value, T default_value, T low, T high, T& out) {
  out = value == 0 ? default_value : value;
  if (out < low || out > high) return Bad(field, absl::StrCat(value), absl::StrCat(low, " to ", high));
  return absl::OkStatus();
}

// NUMBER(message, field, default, low, high): completes and checks one numeric field of `message`.
#define NUMBER(path, message, field, fallback, low, high)                                                      \
  do {                                                                                                         \
    auto completed = (message).field();                                                                        \
    using FieldType = decltype(completed);                                                                     \
    RETURN_IF_ERROR(                                                                                           \
        Number<FieldType>(absl::StrCat(path, "." #field), (message).field(), fallback, low, high, completed)); \
    (message).set_##field(completed);                                                                          \
  } while (false)

absl::Status OneOf(absl::string_view field, absl::string_view value, const std::vector<absl::string_view>& allowed) {
  for (absl::string_view word : allowed) {
    if (value == word) return absl::OkStatus();
  }
  return Bad(field, absl::StrCat("\"", value, "\""), absl::StrJoin(allowed, ", "));
}

absl::Status CheckAddress(absl::string_view field, absl::string_view address, bool off_allowed,
                          bool port_zero_allowed) {
  if (off_allowed && address == "off") return absl::OkStatus();
  const size_t colon = address.rfind(':');
  int port = -1;
  if (colon == absl::string_view::npos || colon == 0 || !absl::SimpleAtoi(address.substr(colon + 1), &port) ||
      port < (port_zero_allowed ? 0 : 1) || port > 65535) {
    return Bad(field, absl::StrCat("\"", address, "\""),
               absl::StrCat("\"host:port\" with a port from ", port_zero_allowed ? 0 : 1, " to 65535",
                            off_allowed ? " or \"off\"" : ""));
  }
  return absl::OkStatus();
}

bool ValidName(absl::string_view name) {
  return !name.empty() && name.size() <= 128 && std::all_of(name.begin(), name.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-';
  });
}

// The two keys that every role has.
template <typename Section>
absl::Status CompleteLog(const std::string& path, Section& section) {
  if (section.log_level().empty()) section.set_log_level("info");
  RETURN_IF_ERROR(OneOf(path + ".log_level", section.log_level(), {"debug", "info", "warn", "error"}));
  if (section.log_format().empty()) return absl::OkStatus();  // chosen by where the log goes
  return OneOf(path + ".log_format", section.log_format(), {"json", "text"});
}

absl::Status CompleteModel(v1::ModelSection& model, const std::string& base_dir) {
  if (model.path().empty()) return Bad("model.path", "nothing", "the folder of a checkpoint");
  std::filesystem::path path(model.path());
  if (path.is_relative()) path = std::filesystem::path(base_dir) / path;
  model.set_path(path.lexically_normal().string());
  if (model.id().empty()) {
    const std::filesystem::path trimmed = path.has_filename() ? path : path.parent_path();
    model.set_id(trimmed.filename().string());
  }
  if (!model.numerics().empty()) RETURN_IF_ERROR(OneOf("model.numerics", model.numerics(), {"exact", "release"}));
  if (model.device().empty()) model.set_device("cpu");
  return OneOf("model.device", model.device(), {"cpu", "cuda"});
}

absl::Status CompleteLimits(v1::LimitSection& limits) {
  constexpr char kPath[] = "router.limits";
  NUMBER(kPath, limits, max_body_bytes, 16u << 20, 1u << 10, 1u << 30);
  NUMBER(kPath, limits, max_body_bytes_total, std::max<uint64_t>(64u << 20, limits.max_body_bytes()),
         limits.max_body_bytes(), 1ull << 34);
  NUMBER(kPath, limits, max_header_bytes, 16u << 10, 1u << 10, 1u << 20);
  NUMBER(kPath, limits, max_connections_per_address, 64, 1, 1u << 20);
  NUMBER(kPath, limits, header_timeout_ms, 10000, 100, 600000);
  NUMBER(kPath, limits, body_idle_timeout_ms, 10000, 100, 600000);
  NUMBER(kPath, limits, keep_alive_timeout_ms, 75000, 100, 3600000);
  NUMBER(kPath, limits, slow_reader_timeout_ms, 10000, 100, 600000);
  NUMBER(kPath, limits, write_buffer_bytes, 256u << 10, 4u << 10, 64u << 20);
  NUMBER(kPath, limits, max_timeout_ms, 3600000, 1, 3600000);
  NUMBER(kPath, limits, max_messages, 4096, 1, 1u << 20);
  NUMBER(kPath, limits, max_tools, 128, 1, 1u << 16);
  NUMBER(kPath, limits, max_n, 8, 1, 64);
  NUMBER(kPath, limits, max_stops, 4, 1, 64);
  return absl::OkStatus();
}

absl::Status CompleteRouter(v1::RouterSection& router) {
  if (router.control_listen().empty()) router.set_control_listen("127.0.0.1:8090");
  RETURN_IF_ERROR(CheckAddress("router.control_listen", router.control_listen(), false, true));
  if (router.control_address().empty()) router.set_control_address(router.control_listen());
  RETURN_IF_ERROR(CheckAddress("router.control_address", router.control_address(), false, true));
  if (router.http_listen().empty()) router.set_http_listen("127.0.0.1:8080");
  RETURN_IF_ERROR(CheckAddress("router.http_listen", router.http_listen(), true, true));
  if (router.operator_listen().empty()) router.set_operator_listen("127.0.0.1:8081");
  RETURN_IF_ERROR(CheckAddress("router.operator_listen", router.operator_listen(), true, true));
  if (router.grpc_listen().empty()) router.set_grpc_listen("127.0.0.1:8082");
  RETURN_IF_ERROR(CheckAddress("router.grpc_listen", router.grpc_listen(), true, true));
  std::set<std::string> listens;
  for (const std::string& listen :
       {router.control_listen(), router.http_listen(), router.operator_listen(), router.grpc_listen()}) {
    if (listen == "off" || absl::EndsWith(listen, ":0")) continue;
    if (!listens.insert(listen).second)
      return Bad("router", absl::StrCat(listen, " twice"), "one listener per address");
  }
  if (router.operator_hosts_size() > 64) {
    return Bad("router.operator_hosts", absl::StrCat(router.operator_hosts_size(), " names"), "64");
  }
  for (const std::string& host : router.operator_hosts()) {
    if (!ValidName(host)) return Bad("router.operator_hosts", host, "host names of 1 to 128 of [A-Za-z0-9._-]");
  }
  NUMBER("router", router, max_requests, 256, 1, 1u << 20);
  NUMBER("router", router, queue_timeout_ms, 10000, 1, 3600000);
  NUMBER("router", router, default_deadline_ms, 600000, 1, 3600000);
  NUMBER("router", router, max_tokens_limit, kMostTokens, 1, kMostTokens);
  NUMBER("router", router, default_max_tokens, router.max_tokens_limit(), 1, router.max_tokens_limit());
  NUMBER("router", router, max_connections, 1024, 1, 1u << 20);
  RETURN_IF_ERROR(CompleteLimits(*router.mutable_limits()));
  return CompleteLog("router", router);
}

absl::Status CompleteWorker(const std::string& path, const std::string& default_name, v1::WorkerSection& worker,
                            std::set<std::string>& names) {
  if (worker.name().empty()) worker.set_name(default_name);
  if (!ValidName(worker.name())) return Bad(path + ".name", worker.name(), "1 to 128 of [A-Za-z0-9._-]");
  if (!names.insert(worker.name()).second) return Bad(path + ".name", worker.name() + " twice", "unique names");
  if (worker.listen().empty()) worker.set_listen("127.0.0.1:0");
  RETURN_IF_ERROR(CheckAddress(path + ".listen", worker.listen(), false, true));
  if (!worker.advertise().empty()) RETURN_IF_ERROR(CheckAddress(path + ".advertise", worker.advertise(), false, false));
  NUMBER(path, worker, threads, 1, 1, 1024);
  if (worker.operator_listen().empty()) worker.set_operator_listen("off");
  RETURN_IF_ERROR(CheckAddress(path + ".operator_listen", worker.operator_listen(), true, true));
  return CompleteLog(path, worker);
}

absl::Status CompleteRoles(v1::ClusterConfig& config) {
  std::set<std::string> names;
  for (int i = 0; i < config.prefill_size(); ++i) {
    v1::PrefillSection& section = *config.mutable_prefill(i);
    const std::string path = absl::StrCat("prefill[", i, "]");
    RETURN_IF_ERROR(CompleteWorker(path + ".worker", absl::StrCat("prefill-", i), *section.mutable_worker(), names));
    NUMBER(path, section, cache_pages, 256, 1, 1ull << 32);
    NUMBER(path, section, max_sequences, 8, 1, 4096);
    NUMBER(path, section, max_batch_tokens, 512, 1, 1u << 16);
    NUMBER(path, section, max_queue, 64, 1, 1u << 16);
  }
  for (int i = 0; i < config.decode_size(); ++i) {
    v1::DecodeSection& section = *config.mutable_decode(i);
    const std::string path = absl::StrCat("decode[", i, "]");
    RETURN_IF_ERROR(CompleteWorker(path + ".worker", absl::StrCat("decode-", i), *section.mutable_worker(), names));
    NUMBER(path, section, cache_pages, 1024, 1, 1ull << 32);
    NUMBER(path, section, max_sequences, 32, 1, 4096);
    NUMBER(path, section, max_batch, 32, 1, 4096);
  }
  for (int i = 0; i < config.expert_size(); ++i) {
    v1::ExpertSection& section = *config.mutable_expert(i);
    const std::string path = absl::StrCat("expert[", i, "]");
    RETURN_IF_ERROR(CompleteWorker(path + ".worker", absl::StrCat("expert-", i), *section.mutable_worker(), names));
    NUMBER(path, section, waves, 2, 1, 64);
    NUMBER(path, section, max_queue, 256, 1, 1u << 16);
    if (section.device().empty()) section.set_device("cpu");
    RETURN_IF_ERROR(OneOf(path + ".device", section.device(), {"cpu", "cuda"}));
    if (section.device() != config.expert(0).device()) {
      return Bad(path + ".device", section.device(),
                 absl::StrCat(config.expert(0).device(), ", as expert[0]: members of a pool must give the same bits"));
    }
    if (section.device() == "cuda" && config.model().device() != "cuda") {
      return Bad(path + ".device", "cuda", "cpu, as model.device");
    }
  }
  return absl::OkStatus();
}

absl::Status CompleteTransferAndTimers(v1::TransferSection& transfer, v1::TimerSection& timers) {
  if (transfer.transport().empty()) transfer.set_transport("ucx");
  RETURN_IF_ERROR(OneOf("transfer.transport", transfer.transport(), {"ucx"}));
  if (transfer.expert_transport().empty()) transfer.set_expert_transport("kvtransfer");
  RETURN_IF_ERROR(OneOf("transfer.expert_transport", transfer.expert_transport(), {"kvtransfer", "grpc"}));
  if (transfer.device_memory().empty()) transfer.set_device_memory("staged");
  RETURN_IF_ERROR(OneOf("transfer.device_memory", transfer.device_memory(), {"staged", "direct"}));
  if (transfer.seal() && transfer.device_memory() == "direct") {
    return Bad("transfer.device_memory", "direct with transfer.seal", "staged: what is sealed is host memory");
  }
  NUMBER("transfer", transfer, max_inflight_bytes, 64ull << 20, 1ull << 16, 1ull << 40);
  if (transfer.listen_port() > 65535) {
    return Bad("transfer.listen_port", absl::StrCat(transfer.listen_port()), "0 (any free port) to 65535");
  }
  NUMBER("timers", timers, heartbeat_ms, 500, 50, 10000);
  NUMBER("timers", timers, dead_after_ms, 3000, 150, 60000);
  NUMBER("timers", timers, lease_ttl_ms, 10000, 1000, 60000);
  NUMBER("timers", timers, transfer_timeout_ms, 2000, 10, 600000);
  // A dead member is noticed by its connection; this is for one that hangs.
  NUMBER("timers", timers, expert_timeout_ms, 1000, 10, 600000);
  NUMBER("timers", timers, abort_timeout_ms, 500, 10, 60000);
  NUMBER("timers", timers, drain_grace_ms, 30000, 1, 3600000);
  NUMBER("timers", timers, watchdog_ms, 2000, 100, 3600000);
  NUMBER("timers", timers, startup_timeout_ms, 60000, 1000, 3600000);
  if (timers.dead_after_ms() < 3 * timers.heartbeat_ms()) {
    return Bad("timers.dead_after_ms", absl::StrCat(timers.dead_after_ms()),
               absl::StrCat("at least 3 * timers.heartbeat_ms = ", 3 * timers.heartbeat_ms()));
  }
  return absl::OkStatus();
}

std::vector<const v1::WorkerSection*> Workers(const v1::ClusterConfig& config) {
  std::vector<const v1::WorkerSection*> workers;
  for (const auto& section : config.prefill()) workers.push_back(&section.worker());
  for (const auto& section : config.decode()) workers.push_back(&section.worker());
  for (const auto& section : config.expert()) workers.push_back(&section.worker());
  return workers;
}

// The keys of a seal are agreed on in messages between processes. Whoever can change those messages can put its own
// keys there, so that a seal without their lock is none.
absl::Status CheckSeal(const v1::ClusterConfig& config) {
  if (!config.transfer().seal() || config.security().has_tls()) return absl::OkStatus();
  const auto check = [](absl::string_view field, const std::string& listen) {
    if (OnLoopback(listen)) return absl::OkStatus();
    return Bad("transfer.seal", absl::StrCat("true without security.tls while ", field, " is \"", listen, "\""),
               "true with security.tls, over which the seal's keys are agreed on and without which they would be "
               "anybody's, or every internal listener on loopback, or false");
  };
  RETURN_IF_ERROR(check("router.control_listen", config.router().control_listen()));
  for (const v1::WorkerSection* worker : Workers(config)) {
    RETURN_IF_ERROR(check(absl::StrCat("worker.listen of ", worker->name()), worker->listen()));
  }
  return absl::OkStatus();
}

// What leaves loopback has a lock, or the document says that it need not.
absl::Status CheckLocks(const v1::ClusterConfig& config) {
  const v1::SecuritySection& security = config.security();
  RETURN_IF_ERROR(CheckSeal(config));
  if (security.allow_insecure()) return absl::OkStatus();
  const auto check = [](absl::string_view field, const std::string& listen, bool locked, absl::string_view lock) {
    if (locked || listen == "off" || OnLoopback(listen)) return absl::OkStatus();
    return Bad(field, absl::StrCat("\"", listen, "\" without ", lock),
               absl::StrCat("a loopback address, or ", lock,
                            ", or security.allow_insecure where the network itself "
                            "keeps strangers out"));
  };
  RETURN_IF_ERROR(check("router.control_listen", config.router().control_listen(), security.has_tls(), "security.tls"));
  for (const v1::WorkerSection* worker : Workers(config)) {
    RETURN_IF_ERROR(check(worker->name() + ": worker.listen", worker->listen(), security.has_tls(), "security.tls"));
  }
  // It asks workers to drain.
  RETURN_IF_ERROR(check("router.operator_listen", config.router().operator_listen(), !security.api_keys_file().empty(),
                        "security.api_keys_file"));
  const std::string& blocks = config.transfer().listen_address();
  if (!config.transfer().seal() && !config.prefill().empty() &&
      (blocks.empty() || blocks == "0.0.0.0" || blocks == "::")) {
    return Bad("transfer.listen_address", blocks.empty() ? "nothing, which is every interface" : blocks,
               "the address or the interface of a network that only workers share, since blocks are not sealed, or "
               "transfer.seal, or security.allow_insecure");
  }
  return absl::OkStatus();
}

absl::Status CompleteSecurity(v1::ClusterConfig& config, const std::string& base_dir) {
  const auto path = [&](absl::string_view field, std::string* value) {
    if (value->empty()) return Bad(field, "nothing", "a file");
    if (std::filesystem::path(*value).is_relative()) {
      *value = (std::filesystem::path(base_dir) / *value).lexically_normal().string();
    }
    return absl::OkStatus();
  };
  v1::SecuritySection& security = *config.mutable_security();
  if (security.has_tls()) {
    v1::TlsSection& tls = *security.mutable_tls();
    RETURN_IF_ERROR(path("security.tls.certificate", tls.mutable_certificate()));
    RETURN_IF_ERROR(path("security.tls.key", tls.mutable_key()));
    RETURN_IF_ERROR(path("security.tls.ca", tls.mutable_ca()));
    if (tls.trust_domain().empty()) tls.set_trust_domain("cluster.local");
    NUMBER("security.tls", tls, reload_interval_ms, 10000, 1000, 3600000);
    if (tls.reload_interval_ms() % 1000 != 0) {
      return Bad("security.tls.reload_interval_ms", absl::StrCat(tls.reload_interval_ms()), "whole seconds");
    }
  }
  if (security.has_public_tls()) {
    RETURN_IF_ERROR(path("security.public_tls.certificate", security.mutable_public_tls()->mutable_certificate()));
    RETURN_IF_ERROR(path("security.public_tls.key", security.mutable_public_tls()->mutable_key()));
  }
  if (!security.api_keys_file().empty()) {
    RETURN_IF_ERROR(path("security.api_keys_file", security.mutable_api_keys_file()));
  }
  const std::vector<const v1::WorkerSection*> workers = Workers(config);
  if (config.transfer().listen_address().empty() &&
      std::all_of(workers.begin(), workers.end(), [](const auto* worker) { return OnLoopback(worker->listen()); })) {
    config.mutable_transfer()->set_listen_address("127.0.0.1");
  }
  return CheckLocks(config);
}

absl::Status CompleteObservability(v1::MetricsSection& metrics, v1::TracingSection& tracing) {
  for (const std::string& set : metrics.compatibility()) {
    RETURN_IF_ERROR(OneOf("metrics.compatibility", set, {"vllm", "sglang", "gateway"}));
  }
  if (!tracing.otlp_endpoint().empty()) {
    RETURN_IF_ERROR(CheckAddress("tracing.otlp_endpoint", tracing.otlp_endpoint(), false, false));
  }
  if (!(tracing.sample_ratio() >= 0 && tracing.sample_ratio() <= 1)) {
    return Bad("tracing.sample_ratio", absl::StrCat(tracing.sample_ratio()), "0 to 1");
  }
  NUMBER("tracing", tracing, max_queued_spans, 4096, 1, 1u << 20);
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<v1::ClusterConfig> LoadClusterConfig(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return absl::NotFoundError(absl::StrCat(path, ": cannot be read"));
  std::ostringstream text;
  text << in.rdbuf();
  auto config = ParseClusterConfig(text.str(), std::filesystem::path(path).parent_path().string());
  if (!config.ok()) return absl::Status(config.status().code(), absl::StrCat(path, ": ", config.status().message()));
  return config;
}

absl::StatusOr<v1::ClusterConfig> ParseClusterConfig(std::string_view json, const std::string& base_dir) {
  if (json.size() > kMaxConfigBytes) return absl::InvalidArgumentError("larger than 1 MiB");
  // Protobuf's parser lets the last of two equal keys win, so that a setting somebody reads is not the one in force.
  RETURN_IF_ERROR(ParseJsonObject(json, "document").status());
  v1::ClusterConfig config;
  const auto parsed =
      google::protobuf::util::JsonStringToMessage(google::protobuf::StringPiece(json.data(), json.size()), &config);
  if (!parsed.ok()) {
    // Protobuf draws the text around a syntax error over several lines; one line is enough here.
    std::string message(parsed.message().data(), parsed.message().size());
    std::replace(message.begin(), message.end(), '\n', ' ');
    return absl::InvalidArgumentError(message);
  }
  RETURN_IF_ERROR(CompleteModel(*config.mutable_model(), base_dir));
  RETURN_IF_ERROR(CompleteRouter(*config.mutable_router()));
  RETURN_IF_ERROR(CompleteRoles(config));
  RETURN_IF_ERROR(CompleteTransferAndTimers(*config.mutable_transfer(), *config.mutable_timers()));
  RETURN_IF_ERROR(CompleteSecurity(config, base_dir));
  RETURN_IF_ERROR(CompleteObservability(*config.mutable_metrics(), *config.mutable_tracing()));
  return config;
}

absl::StatusOr<std::vector<int>> ParseExpertSet(std::string_view text, int num_experts) {
  std::set<int> experts;
  for (absl::string_view part :
       absl::StrSplit(absl::string_view(text.data(), text.size()), ',', absl::SkipWhitespace())) {
    const std::vector<absl::string_view> ends = absl::StrSplit(part, '-');
    int first = -1, last = -1;
    if (ends.size() > 2 || !absl::SimpleAtoi(ends[0], &first) || !absl::SimpleAtoi(ends.back(), &last) || first < 0 ||
        last < first || last >= num_experts) {
      return absl::InvalidArgumentError(
          absl::StrCat("\"", part, "\": wanted an expert id or a range first-last, ids from 0 to ", num_experts - 1));
    }
    for (int expert = first; expert <= last; ++expert) {
      if (!experts.insert(expert).second) return absl::InvalidArgumentError(absl::StrCat("expert ", expert, " twice"));
    }
  }
  return std::vector<int>(experts.begin(), experts.end());
}

const v1::WorkerSection& WorkerConfig::worker() const {
  switch (role) {
    case v1::ROLE_PREFILL:
      return prefill().worker();
    case v1::ROLE_DECODE:
      return decode().worker();
    default:
      return expert().worker();
  }
}

absl::StatusOr<std::vector<int>> WorkerConfig::ExpertsOf(int num_experts) const {
  if (!expert().experts().empty()) {
    auto experts = ParseExpertSet(expert().experts(), num_experts);
    if (!experts.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("expert[", position, "].experts: ", experts.status().message()));
    }
    return experts;
  }
  const int members = cluster.expert_size();
  std::vector<int> share;
  for (int e = position * num_experts / members; e < (position + 1) * num_experts / members; ++e) share.push_back(e);
  if (share.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("expert: ", members, " members for ", num_experts, " experts leave ", worker().name(), " none"));
  }
  return share;
}

absl::Status OverrideAdvertise(WorkerConfig& config, std::string_view address) {
  std::string text(address);
  if (std::count(text.begin(), text.end(), ':') > 1 && text.front() != '[') text = absl::StrCat("[", text, "]");
  if (!absl::StrContains(text, ':') || text.back() == ']') absl::StrAppend(&text, ":0");
  RETURN_IF_ERROR(CheckAddress("--advertise", text, false, true));
  v1::ClusterConfig& cluster = config.cluster;
  v1::WorkerSection* const worker =
      config.role == v1::ROLE_PREFILL  ? cluster.mutable_prefill(config.position)->mutable_worker()
      : config.role == v1::ROLE_DECODE ? cluster.mutable_decode(config.position)->mutable_worker()
                                       : cluster.mutable_expert(config.position)->mutable_worker();
  worker->set_advertise(text);
  return absl::OkStatus();
}

absl::StatusOr<WorkerConfig> SelectWorker(const v1::ClusterConfig& cluster, v1::Role role, std::string_view name) {
  const int count = role == v1::ROLE_PREFILL  ? cluster.prefill_size()
                    : role == v1::ROLE_DECODE ? cluster.decode_size()
                    : role == v1::ROLE_EXPERT ? cluster.expert_size()
                                              : 0;
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) {
    WorkerConfig config{cluster, role, i};
    if (config.worker().name() == name || (name.empty() && count == 1)) return config;
    names.push_back(config.worker().name());
  }
  return absl::NotFoundError(absl::StrCat("no worker \"", absl::string_view(name.data(), name.size()),
                                          "\" of this role; the configuration has: ", absl::StrJoin(names, ", ")));
}

bool OnLoopback(std::string_view address) {
  const std::string_view host = address.substr(0, address.rfind(':'));
  const bool is_number = host.find_first_not_of("0123456789.") == std::string_view::npos;
  return (is_number && host.starts_with("127.")) || host == "localhost" || host == "[::1]" || host == "::1";
}

}  // namespace millrace
