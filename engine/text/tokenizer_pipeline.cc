// SPDX-License-Identifier: Apache-2.0
// The parts of tokenizer.json around the vocabulary, each either understood or refused; reads as a checklist.
#include "engine/text/tokenizer_pipeline.h"

#include <cstdint>
#include <iterator>

#include "absl/strings/escaping.h"
#include "engine/absl_view.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "engine/text/tokenizer_file.h"

namespace millrace::text {
namespace {

// The released patterns after NormalizePattern, in order.
constexpr std::string_view kReleasedPatterns[] = {
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
};

absl::Status CheckNoTruncation(JsonElement root) {
  for (const char* field : {"truncation", "padding"}) {
    if (!IsNullOrAbsent(root[field])) return BadTokenizer(field, Show(root[field]), "null");
  }
  return absl::OkStatus();
}

absl::Status CheckNormalizer(JsonElement root) {
  const auto normalizer = root["normalizer"];
  if (IsNullOrAbsent(normalizer)) return absl::OkStatus();
  simdjson::dom::array parts;
  if (IsString(normalizer["type"], "Sequence") && normalizer["normalizers"].get(parts) == simdjson::SUCCESS &&
      parts.size() == 0) {
    return absl::OkStatus();
  }
  return BadTokenizer("normalizer", Show(normalizer), "null or an empty Sequence");
}

absl::Status CheckPreTokenizer(JsonElement root) {
  const auto pre = root["pre_tokenizer"];
  simdjson::dom::array parts;
  if (!IsString(pre["type"], "Sequence") || pre["pretokenizers"].get(parts) != simdjson::SUCCESS) {
    return BadTokenizer("pre_tokenizer.type", Show(pre["type"]), "\"Sequence\" with pretokenizers");
  }
  constexpr size_t kSplits = std::size(kReleasedPatterns);
  if (parts.size() != kSplits + 1) {
    return BadTokenizer("pre_tokenizer.pretokenizers", Concat(parts.size(), " entries"), "3 Split and 1 ByteLevel");
  }
  for (size_t i = 0; i < kSplits; ++i) {
    const std::string field = Concat("pre_tokenizer.pretokenizers[", i, "]");
    const auto part = parts.at(i);
    if (!IsString(part["type"], "Split")) return BadTokenizer(field + ".type", Show(part["type"]), "\"Split\"");
    std::string_view pattern;
    if (part["pattern"]["Regex"].get(pattern) != simdjson::SUCCESS) {
      return BadTokenizer(field + ".pattern", Show(part["pattern"]), "a Regex");
    }
    if (NormalizePattern(pattern) != kReleasedPatterns[i]) {
      return BadTokenizer(field + ".pattern.Regex", Show(pattern), "the released pattern of DeepSeek-V4");
    }
    if (!IsString(part["behavior"], "Isolated"))
      return BadTokenizer(field + ".behavior", Show(part["behavior"]), "\"Isolated\"");
    if (!IsFalse(part["invert"])) return BadTokenizer(field + ".invert", Show(part["invert"]), "false");
  }
  const std::string field = Concat("pre_tokenizer.pretokenizers[", kSplits, "]");
  const auto last = parts.at(kSplits);
  if (!IsString(last["type"], "ByteLevel")) return BadTokenizer(field + ".type", Show(last["type"]), "\"ByteLevel\"");
  for (const char* flag : {"add_prefix_space", "use_regex"}) {
    if (!IsFalse(last[flag])) return BadTokenizer(Concat(field, ".", flag), Show(last[flag]), "false");
  }
  return absl::OkStatus();
}

// A ByteLevel post-processor only moves offsets; anything else would add tokens.
absl::Status CheckPostProcessor(JsonElement root) {
  const auto post = root["post_processor"];
  if (IsNullOrAbsent(post) || IsString(post["type"], "ByteLevel")) return absl::OkStatus();
  return BadTokenizer("post_processor", Show(post), "null or ByteLevel");
}

absl::Status CheckDecoder(JsonElement root) {
  if (IsString(root["decoder"]["type"], "ByteLevel")) return absl::OkStatus();
  return BadTokenizer("decoder", Show(root["decoder"]), "ByteLevel");
}

absl::Status CheckModel(JsonElement root) {
  const auto model = root["model"];
  // Old files do not write the type.
  if (!IsNullOrAbsent(model["type"]) && !IsString(model["type"], "BPE")) {
    return BadTokenizer("model.type", Show(model["type"]), "\"BPE\"");
  }
  for (const char* field : {"dropout", "unk_token"}) {
    if (!IsNullOrAbsent(model[field])) return BadTokenizer(Concat("model.", field), Show(model[field]), "null");
  }
  for (const char* field : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!IsNullOrAbsent(model[field]) && !IsString(model[field], "")) {
      return BadTokenizer(Concat("model.", field), Show(model[field]), "null or \"\"");
    }
  }
  for (const char* field : {"fuse_unk", "byte_fallback", "ignore_merges"}) {
    if (!IsNullOrAbsent(model[field]) && !IsFalse(model[field])) {
      return BadTokenizer(Concat("model.", field), Show(model[field]), "false");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckPipeline(JsonElement root) {
  RETURN_IF_ERROR(CheckNoTruncation(root));
  RETURN_IF_ERROR(CheckNormalizer(root));
  RETURN_IF_ERROR(CheckPreTokenizer(root));
  RETURN_IF_ERROR(CheckPostProcessor(root));
  RETURN_IF_ERROR(CheckDecoder(root));
  return CheckModel(root);
}

std::string NormalizePattern(std::string_view pattern) {
  std::string normalized;
  for (size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] != '\\' || i + 1 == pattern.size()) {
      normalized.push_back(pattern[i]);
      continue;
    }
    const char escaped = pattern[++i];
    switch (escaped) {
      case 'r':
        normalized.push_back('\r');
        break;
      case 'n':
        normalized.push_back('\n');
        break;
      case '"':
      case '/':
        normalized.push_back(escaped);
        break;
      default:
        normalized.append({'\\', escaped});
    }
  }
  return normalized;
}

absl::Status BadTokenizer(std::string_view field, std::string_view found, std::string_view expected) {
  return absl::InvalidArgumentError(Concat("tokenizer.json: ", field, ": found ", found, ", expected ", expected));
}

std::string Show(std::string_view text) {
  constexpr size_t kMax = 60;
  std::string shown = absl::Utf8SafeCEscape(AbslView(text.substr(0, kMax)));
  return Concat("\"", shown, text.size() > kMax ? "...\"" : "\"");
}
std::string Show(JsonElement known) {
  std::string_view text;
  if (known.get(text) == simdjson::SUCCESS) return Show(text);
  if (int64_t number; known.get(number) == simdjson::SUCCESS) return Concat(number);
  if (double number; known.get(number) == simdjson::SUCCESS) return Concat(number);
  if (bool flag; known.get(flag) == simdjson::SUCCESS) return flag ? "true" : "false";
  return known.is_object() ? "an object" : known.is_array() ? "an array" : "null";
}
std::string Show(const JsonResult& value) {
  JsonElement known;
  return value.get(known) == simdjson::SUCCESS ? Show(known) : "nothing";
}

bool IsNullOrAbsent(const JsonResult& value) {
  JsonElement known;
  return value.get(known) != simdjson::SUCCESS || known.is_null();
}
bool IsString(const JsonResult& value, std::string_view expected) {
  std::string_view text;
  return value.get(text) == simdjson::SUCCESS && text == expected;
}
bool IsFalse(const JsonResult& value) {
  bool flag = true;
  return value.get(flag) == simdjson::SUCCESS && !flag;
}

}  // namespace millrace::text
