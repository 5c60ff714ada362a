// SPDX-License-Identifier: Apache-2.0
// Writes the reference pages from the code: not part of `millrace`, run by a test and by whoever changed a metric or a
// key of the configuration.
//
//   reference_docs ROOT            docs/metrics.md whole, and the tables between marks in docs/configuration.md
//   reference_docs ROOT --check    says which differ from what would be written; exit 1 if any does
//
// Metrics are the catalogue's (services/common/metric_catalogue). Keys are those of config.proto with its comments; a
// default is what the reader fills in, or what the comment says it is computed from ("default: ..."); a range is what
// the reader answers to a value that cannot be right. So a page cannot say what the code does not do.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/descriptor.pb.h>
#include <google/protobuf/util/json_util.h>

#include <cstdio>
#include <fstream>
#include <iostream>
#include <memory>
#include <regex>
#include <sstream>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "services/common/config.h"
#include "services/common/metric_aliases.h"
#include "services/common/metric_catalogue.h"

namespace millrace {
namespace {

using google::protobuf::FieldDescriptor;
using Json = nlohmann::json;

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string Escape(absl::string_view cell) { return absl::StrReplaceAll(cell, {{"|", "\\|"}}); }

// --- Metrics ---

const char* TypeWord(MetricType type) {
  return type == MetricType::kCounter ? "counter" : type == MetricType::kGauge ? "gauge" : "histogram";
}

std::string MetricsPage() {
  std::string page =
      "# Metrics\n\n"
      "<!-- Written by reference_docs from services/common/metric_catalogue.cc and metric_aliases.cc; do not edit. "
      "-->\n\n"
      "What `/metrics` on the operator ports says, in Prometheus' text format. Base units; counters end in `_total`; "
      "a\n"
      "histogram has `_bucket`, `_sum` and `_count`. Labels take values from fixed sets, never from a client: `role` "
      "and\n"
      "`worker` name the process, the others are words of the code. A counter with labels of its own is absent until "
      "it\n"
      "first counts. A process exposes at most 3,000 series. Which of them to watch is "
      "[operations.md](operations.md).\n\n"
      "| metric | type | unit | labels | exposed by | meaning |\n|---|---|---|---|---|---|\n";
  std::string reserved;
  for (const MetricDescription& metric : MetricCatalogue()) {
    const std::string labels = absl::StrReplaceAll(metric.labels, {{" ", ", "}});
    const std::string where = std::string(metric.where) == "worker" ? "prefill, decode, expert"
                                                                    : absl::StrReplaceAll(metric.where, {{" ", ", "}});
    const std::string start =
        absl::StrCat("| `", metric.name, "` | ", TypeWord(metric.type), " | ", metric.unit, " | ", labels, " | ");
    if (std::string(metric.where) == "reserved") {
      absl::StrAppend(&reserved, start, Escape(metric.help), " |\n");
    } else {
      absl::StrAppend(&page, start, where, " | ", Escape(metric.help), " |\n");
    }
  }
  absl::StrAppend(
      &page,
      "\n## Reserved\n\nNames kept for what nothing exposes yet, so that a dashboard written against them "
      "stays right.\n\n| metric | type | unit | labels | meaning |\n|---|---|---|---|---|\n",
      reserved,
      "\n## Names of other servers\n\nWith `metrics.compatibility` in the configuration the router says some of the "
      "same numbers under other\nservers' names as well, all with the label `model_name`. `gateway` is what "
      "the Gateway API inference extension's\nendpoint picker reads unless it is told otherwise.\n\n"
      "| name | set | from |\n|---|---|---|\n");
  for (const MetricAlias& alias : MetricAliases()) {
    const char* how = "";
    switch (alias.how) {
      case MetricAlias::kSame:
        break;
      case MetricAlias::kUsage:
        how = ", role decode: owned over all";
        break;
      case MetricAlias::kRunning:
        how = " less `millrace_router_generations_queued`";
        break;
      case MetricAlias::kCacheConfig:
        how = ", role decode: block_size and num_gpu_blocks as labels";
        break;
    }
    absl::StrAppend(&page, "| `", alias.alias, "` | ", absl::StrReplaceAll(alias.sets, {{" ", ", "}}), " | `",
                    alias.name, "`", how, " |\n");
  }
  return page;
}

// --- Configuration ---

// A document in which every section is there and every default can be seen.
Json Sample() {
  return {{"model", {{"path", "/models/NAME"}}},
          {"prefill", {Json::object()}},
          {"decode", {Json::object()}},
          {"expert", {Json::object()}}};
}

// "prefill[0].worker" in a document.
Json& At(Json& document, const std::string& path) {
  Json* at = &document;
  for (absl::string_view part : absl::StrSplit(path, '.')) {
    const bool list = absl::EndsWith(part, "[0]");
    Json& next = (*at)[std::string(part.substr(0, part.size() - (list ? 3 : 0)))];
    at = list ? &next[0] : &next;
  }
  return *at;
}

// What the reader says is allowed, learnt from how it refuses a value that cannot be right; empty: it takes anything.
std::string RangeOf(const std::string& path, const FieldDescriptor& field) {
  Json absurd;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_UINT32:
      absurd = 4294967295u;
      break;
    case FieldDescriptor::CPPTYPE_UINT64:
      absurd = "18446744073709551615";
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      absurd = 1e300;
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      absurd = "\x01?";
      break;
    case FieldDescriptor::CPPTYPE_BOOL:
      return "true, false";
    default:
      return "";
  }
  if (field.is_repeated()) absurd = Json::array({absurd});
  Json document = Sample();
  At(document, path)[std::string(field.name())] = absurd;
  const auto parsed = ParseClusterConfig(document.dump(), "/");
  if (parsed.ok()) return "";
  const std::string message(parsed.status().message());
  const size_t allowed = message.find(", allowed ");
  if (allowed == std::string::npos || !absl::StrContains(message, field.name())) return "";
  return absl::StrReplaceAll(message.substr(allowed + std::string(", allowed ").size()), {{" to ", " … "}});
}

struct Comment {
  std::string meaning, fallback;
};

// The comment behind a field, with its continuation on lines of their own, which protoc does not count to it. Split
// from "what it is; default: what it becomes; more" into its parts.
Comment ReadComment(const FieldDescriptor& field, const std::vector<std::string>& source) {
  google::protobuf::SourceLocation location;
  field.GetSourceLocation(&location);
  size_t at = static_cast<size_t>(location.end_line);
  std::string text = source[at].substr(std::min(source[at].find("//"), source[at].size() - 2) + 2);
  while (++at < source.size() && absl::StartsWith(source[at], "        ")) {
    const absl::string_view line = absl::StripLeadingAsciiWhitespace(source[at]);
    if (!absl::StartsWith(line, "//")) break;
    absl::StrAppend(&text, line.substr(2));
  }
  text = std::regex_replace(text, std::regex("\\s+"), " ");
  text = std::string(absl::StripAsciiWhitespace(text));
  Comment comment{text, ""};
  std::smatch match;
  if (std::regex_search(text, match, std::regex("(; |^)default:? ([^;]*?)(;|\\.$|$)"))) {
    comment.fallback = match[2];
    comment.meaning = match.prefix().str() + (match[3] == ";" ? ";" + match.suffix().str() : match.suffix().str());
    if (absl::StartsWith(comment.meaning, "; ")) comment.meaning.erase(0, 2);
  }
  return comment;
}

// What the reader fills in; empty: nothing.
std::string FilledIn(const Json& defaults, const std::string& path, const FieldDescriptor& field) {
  Json document = defaults;
  const Json& section = At(document, path);
  const auto found = section.find(std::string(field.name()));
  if (found == section.end() || found->is_null() || found->is_array()) return "";
  return found->is_string() ? found->get<std::string>() : found->dump();
}

bool ConfigurationTable(const google::protobuf::Descriptor& message, const std::string& path, const Json& defaults,
                        const std::vector<std::string>& source, std::string& table) {
  bool sound = true;
  absl::StrAppend(&table, "| key | default | allowed | meaning |\n|---|---|---|---|\n");
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) continue;  // has a table of its own
    const Comment comment = ReadComment(field, source);
    std::string filled = FilledIn(defaults, path, field);
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_BOOL && filled.empty()) filled = "false";
    const bool both_numbers = !filled.empty() && !comment.fallback.empty() &&
                              filled.find_first_not_of("0123456789") == std::string::npos &&
                              comment.fallback.find_first_not_of("0123456789") == std::string::npos;
    if (both_numbers && filled != comment.fallback) {
      std::fprintf(stderr, "config.proto: %s.%s: the comment says default %s, the reader fills in %s\n", path.c_str(),
                   field.name().c_str(), comment.fallback.c_str(), filled.c_str());
      sound = false;
    }
    if (comment.meaning.empty() && comment.fallback.empty()) {
      std::fprintf(stderr, "config.proto: %s.%s has no comment\n", path.c_str(), field.name().c_str());
      sound = false;
    }
    const std::string fallback = !comment.fallback.empty() ? comment.fallback
                                 : filled.empty()          ? ""
                                                           : absl::StrCat("`", filled, "`");
    absl::StrAppend(&table, "| `", field.name(), "` | ", Escape(fallback), " | ", Escape(RangeOf(path, field)), " | ",
                    Escape(comment.meaning), " |\n");
  }
  return sound;
}

// Replaces what is between "<!-- generated: NAME -->" and "<!-- end -->" by the table of that name.
bool FillMarks(const std::string& root, std::string& page) {
  const std::vector<std::string> source = absl::StrSplit(ReadFile(root + "/proto/millrace/v1/config.proto"), '\n');
  // Written by protoc with the places in the source, which the linked descriptors lack.
  google::protobuf::FileDescriptorSet set;
  google::protobuf::DescriptorPool pool;
  const google::protobuf::FileDescriptor* file = nullptr;
  if (set.ParseFromString(ReadFile(MILLRACE_CONFIG_DESCRIPTOR)) && set.file_size() == 1)
    file = pool.BuildFile(set.file(0));
  const auto filled = ParseClusterConfig(Sample().dump(), "/");
  if (file == nullptr || !filled.ok()) {
    std::fprintf(stderr, "config.proto or the sample document cannot be read: %s\n",
                 filled.status().ToString().c_str());
    return false;
  }
  std::string text;
  google::protobuf::util::JsonPrintOptions print;
  print.preserve_proto_field_names = true;
  (void)google::protobuf::util::MessageToJsonString(*filled, &text, print);
  const Json defaults = Json::parse(text);

  bool sound = true;
  std::vector<std::string> written;
  std::string out;
  size_t at = 0;
  static constexpr absl::string_view kBegin = "<!-- generated: ", kEnd = "<!-- end -->";
  for (;;) {
    const size_t begin = page.find(kBegin.data(), at);
    if (begin == std::string::npos) break;
    const size_t name_end = page.find(" -->\n", begin), end = page.find(kEnd.data(), begin);
    if (name_end == std::string::npos || end == std::string::npos || name_end > end) {
      std::fprintf(stderr, "docs/configuration.md: a mark without an end\n");
      return false;
    }
    const std::string name = page.substr(begin + kBegin.size(), name_end - begin - kBegin.size());
    out += page.substr(at, name_end + 5 - at);
    // "router" is a section; "worker" is what every role's entries have.
    const bool worker = name == "worker";
    const FieldDescriptor* section =
        file->FindMessageTypeByName("ClusterConfig")->FindFieldByName(worker ? "prefill" : name);
    if (section == nullptr) {
      std::fprintf(stderr, "docs/configuration.md: no section %s in config.proto\n", name.c_str());
      return false;
    }
    const google::protobuf::Descriptor* message = section->message_type();
    std::string path = std::string(section->name()) + (section->is_repeated() ? "[0]" : "");
    if (worker) {
      message = message->FindFieldByName("worker")->message_type();
      path += ".worker";
    }
    sound = ConfigurationTable(*message, path, defaults, source, out) && sound;
    written.push_back(name);
    at = end;
  }
  page = out + page.substr(at);
  const google::protobuf::Descriptor& cluster = *file->FindMessageTypeByName("ClusterConfig");
  for (int i = 0; i < cluster.field_count(); ++i) {
    const std::string name(cluster.field(i)->name());
    if (std::find(written.begin(), written.end(), name) != written.end()) continue;
    std::fprintf(stderr, "docs/configuration.md: no table of %s\n", name.c_str());
    sound = false;
  }
  return sound;
}

int Run(const std::string& root, bool check) {
  std::string configuration = ReadFile(root + "/docs/configuration.md");
  bool sound = FillMarks(root, configuration);
  const std::pair<std::string, std::string> pages[] = {{"docs/metrics.md", MetricsPage()},
                                                       {"docs/configuration.md", configuration}};
  for (const auto& [name, text] : pages) {
    const std::string path = absl::StrCat(root, "/", name);
    if (ReadFile(path) == text) continue;
    if (check) {
      std::fprintf(stderr, "%s differs from what `reference_docs %s` writes\n", name.c_str(), root.c_str());
      sound = false;
    } else {
      std::ofstream(path, std::ios::binary) << text;
      std::printf("wrote %s\n", name.c_str());
    }
  }
  return sound ? 0 : 1;
}

}  // namespace
}  // namespace millrace

int main(int argc, char** argv) {
  const bool check = argc == 3 && std::string(argv[2]) == "--check";
  if (argc != 2 && !check) {
    std::fprintf(stderr, "usage: reference_docs ROOT [--check]\n");
    return 64;
  }
  return millrace::Run(argv[1], check);
}
