// SPDX-License-Identifier: Apache-2.0
// config.json: what is accepted, and that everything else is refused by key, found and allowed (W22 to W24).
#include "engine/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <string>

#include "engine/model/preset_config.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

using ::testing::HasSubstr;
using Json = nlohmann::json;

// The error of the tiny preset after `change`, or "" if it is accepted.
std::string ErrorAfter(const std::function<void(Json&)>& change, ModelPreset preset = ModelPreset::kTiny) {
  Json config = Json::parse(PresetConfigJson(preset));
  change(config);
  const auto parsed = ModelConfig::Parse(config.dump());
  if (parsed.ok()) return "";
  EXPECT_EQ(parsed.status().code(), absl::StatusCode::kInvalidArgument);
  const std::string error(parsed.status().message());
  EXPECT_EQ(error.find('\n'), std::string::npos) << "one line";
  return error;
}

std::string ErrorWith(const char* key, Json value, ModelPreset preset = ModelPreset::kTiny) {
  return ErrorAfter([&](Json& c) { c[key] = value; }, preset);
}

std::string ParseError(const std::string& text) {
  const auto parsed = ModelConfig::Parse(text);
  return parsed.ok() ? "" : std::string(parsed.status().message());
}

TEST(ModelConfig, ReadsFlash) {
  const auto c = ModelConfig::Parse(PresetConfigJson(ModelPreset::kFlash));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->hidden_size, 4096);
  EXPECT_EQ(c->num_hidden_layers, 43);
  EXPECT_EQ(c->layer_kinds.size(), 43u);
  EXPECT_EQ(std::count(c->layer_kinds.begin(), c->layer_kinds.end(), LayerKind::kCsa), 21);
  EXPECT_EQ(std::count(c->layer_kinds.begin(), c->layer_kinds.end(), LayerKind::kHca), 20);
  EXPECT_EQ(c->ratio(0), 0);
  EXPECT_EQ(c->ratio(2), 4);
  EXPECT_EQ(c->ratio(41), 128);
  EXPECT_EQ(c->ratio(42), 4);
  EXPECT_TRUE(c->hash_routed(2));
  EXPECT_FALSE(c->hash_routed(3));
  EXPECT_EQ(c->index_topk, 512);
  EXPECT_EQ(c->routed_scaling_factor, 1.5);
  ASSERT_TRUE(c->yarn.has_value());
  EXPECT_EQ(c->yarn->original_max_position_embeddings, 65536);
  EXPECT_TRUE(c->has_mtp());
  EXPECT_EQ(c->weight_format, WeightFormat::kFp8);
  EXPECT_FALSE(c->dspark);
}

TEST(ModelConfig, ReadsPro) {
  const auto c = ModelConfig::Parse(PresetConfigJson(ModelPreset::kPro));
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->layer_kinds.size(), 61u);
  EXPECT_EQ(std::count(c->layer_kinds.begin(), c->layer_kinds.end(), LayerKind::kCsa), 30);
  EXPECT_EQ(std::count(c->layer_kinds.begin(), c->layer_kinds.end(), LayerKind::kHca), 31);
  EXPECT_EQ(c->ratio(0), 128);
  EXPECT_EQ(c->num_attention_heads, 128);
  EXPECT_EQ(c->index_topk, 1024);
}

TEST(ModelConfig, ReadsLaterConfigsWithDspark) {
  EXPECT_EQ(ErrorAfter(
                [](Json& c) {
                  c["dspark_block_size"] = 5;
                  c["dspark_markov_rank"] = 256;
                  c["dspark_noise_token_id"] = 128799;
                  c["dspark_target_layer_ids"] = {40, 41, 42};
                  for (int i = 0; i < 2; ++i) c["compress_ratios"].push_back(0);
                  ASSERT_EQ(c["compress_ratios"].size(), 46u);
                },
                ModelPreset::kFlash),
            "");
}

// A test that cuts a released model short changes num_hidden_layers alone.
TEST(ModelConfig, TruncatesCompressRatiosToTheBackbone) {
  Json config = Json::parse(PresetConfigJson(ModelPreset::kFlash));
  config["num_hidden_layers"] = 4;
  const auto c = ModelConfig::Parse(config.dump());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->layer_kinds,
            (std::vector<LayerKind>{LayerKind::kWindow, LayerKind::kWindow, LayerKind::kCsa, LayerKind::kHca}));
}

TEST(ModelConfig, ReadsTheDemoAndTinyA) {
  for (const char* dir : {"deploy/demo/model", "tests/data/tiny-a"}) {
    const auto c = ModelConfig::Load(dir);
    ASSERT_TRUE(c.ok()) << dir << c.status();
  }
  EXPECT_EQ(ModelConfig::Load("/nonexistent").status().code(), absl::StatusCode::kNotFound);
}

TEST(ModelConfig, AbsentExpertDtypeIsFp4AsInTheFirstPreview) {
  EXPECT_EQ(ErrorAfter([](Json& c) { c.erase("expert_dtype"); }), "");
  EXPECT_EQ(ErrorWith("expert_dtype", "fp8"), "config.json: expert_dtype: found \"fp8\", allowed \"fp4\"");
}

TEST(ModelConfig, LayerTypesMeanTheSameAsCompressRatios) {
  const Json types = {"sliding_attention",           "compressed_sparse_attention",  "heavily_compressed_attention",
                      "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"};
  EXPECT_EQ(ErrorWith("layer_types", types), "");
  Json config = Json::parse(PresetConfigJson(ModelPreset::kTiny));
  const auto released = ModelConfig::Parse(config.dump());
  config.erase("compress_ratios");
  config["layer_types"] = types;
  const auto c = ModelConfig::Parse(config.dump());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_EQ(c->layer_kinds, released->layer_kinds);
}

TEST(ModelConfigMalformed, W22MissingKey) {
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "compress_ratios", "n_routed_experts",
                          "hc_eps", "rope_theta", "compress_rope_theta", "sliding_window", "model_type"}) {
    EXPECT_THAT(ErrorAfter([&](Json& c) { c.erase(key); }),
                HasSubstr(std::string("config.json: ") + key + ": found nothing, allowed "));
  }
}

TEST(ModelConfigMalformed, W22SizesOutOfRange) {
  for (const Json& bad : {Json(-128), Json(0), Json(1e30), Json(uint64_t{1} << 63), Json(100), Json(256.0), Json("256"),
                          Json(true), Json(nullptr), Json::array({256})}) {
    EXPECT_THAT(ErrorWith("hidden_size", bad),
                AllOf(HasSubstr("config.json: hidden_size: found "), HasSubstr("allowed a multiple of 32")))
        << bad;
  }
  EXPECT_EQ(ErrorWith("hidden_size", -128),
            "config.json: hidden_size: found -128, allowed a multiple of 32 from 32 to 65536");
  EXPECT_THAT(ErrorWith("o_groups", 3), HasSubstr("o_groups: found 3, allowed a divisor of num_attention_heads, 4"));
  EXPECT_THAT(ErrorWith("n_routed_experts", 0), HasSubstr("n_routed_experts: found 0, allowed"));
  EXPECT_THAT(ErrorWith("num_experts_per_tok", 9),
              HasSubstr("num_experts_per_tok: found 9, allowed at most n_routed_experts, 8"));
  EXPECT_THAT(ErrorWith("sliding_window", 0), HasSubstr("sliding_window: found 0, allowed an integer equal to 128"));
  EXPECT_THAT(ErrorWith("num_hash_layers", 7), HasSubstr("num_hash_layers: found 7, allowed at most"));
  EXPECT_THAT(ErrorWith("eos_token_id", 512), HasSubstr("eos_token_id: found 512, allowed below vocab_size, 512"));
  EXPECT_THAT(ErrorWith("index_topk", 1025), HasSubstr("index_topk: found 1025"));
  EXPECT_THAT(ErrorWith("rms_norm_eps", 0), HasSubstr("rms_norm_eps: found 0, allowed"));
  EXPECT_THAT(ErrorWith("rope_theta", "10000"), HasSubstr("rope_theta: found \"10000\", allowed a number"));
}

TEST(ModelConfigMalformed, W22RatioNotOfThisModel) {
  EXPECT_EQ(ErrorAfter([](Json& c) { c["compress_ratios"][3] = 8; }),
            "config.json: compress_ratios[3]: found 8, allowed 0, 4 or 128");
  EXPECT_THAT(ErrorAfter([](Json& c) { c["compress_ratios"][3] = 4.0; }), HasSubstr("compress_ratios[3]: found 4.0"));
  EXPECT_THAT(ErrorWith("compress_ratios", {0, 4}),
              HasSubstr("compress_ratios: found 2 entries, allowed an array of at least 6"));
  EXPECT_THAT(ErrorWith("compress_ratios", "0"), HasSubstr("compress_ratios: found \"0\""));
  EXPECT_THAT(ErrorAfter([](Json& c) { c["compress_ratios"][6] = 5; }),
              HasSubstr("compress_ratios[6]: found 5, allowed 0, 4 or 128"));
}

TEST(ModelConfigMalformed, W22OtherArchitecturesAreRefusedByName) {
  EXPECT_EQ(ErrorWith("model_type", "deepseek_v3"),
            "config.json: model_type: found \"deepseek_v3\", allowed \"deepseek_v4\"");
  EXPECT_THAT(ErrorWith("scoring_func", "sigmoid"), HasSubstr("scoring_func: found \"sigmoid\""));
  EXPECT_THAT(ErrorWith("tie_word_embeddings", true), HasSubstr("tie_word_embeddings: found true"));
  EXPECT_THAT(ErrorWith("n_shared_experts", 2), HasSubstr("n_shared_experts: found 2, allowed 1"));
  EXPECT_THAT(ErrorWith("rope_parameters", Json::object()), HasSubstr("rope_parameters: found {}"));
}

TEST(ModelConfigMalformed, W22QuantizationNotRead) {
  const auto with = [](const char* key, Json value) {
    return ErrorAfter([&](Json& c) { c["quantization_config"][key] = value; });
  };
  EXPECT_THAT(with("quant_method", "awq"),
              HasSubstr("quantization_config.quant_method: found \"awq\", allowed \"fp8\""));
  EXPECT_THAT(with("fmt", "e5m2"), HasSubstr("quantization_config.fmt"));
  EXPECT_THAT(with("scale_fmt", "float32"), HasSubstr("quantization_config.scale_fmt"));
  EXPECT_THAT(with("weight_block_size", {64, 64}),
              HasSubstr("quantization_config.weight_block_size: found [64,64], allowed [128,128]"));
  EXPECT_THAT(with("activation_scheme", "static"), HasSubstr("quantization_config.activation_scheme"));
  EXPECT_THAT(ErrorWith("quantization_config", "fp8"), HasSubstr("quantization_config: found \"fp8\""));
}

TEST(ModelConfigMalformed, W22NotJsonOrNotHonestJson) {
  EXPECT_THAT(ParseError(""), HasSubstr("config.json: invalid JSON at offset"));
  EXPECT_THAT(ParseError("[]"), HasSubstr("config.json: JSON: found array, expected object"));
  EXPECT_THAT(ParseError("{} x"), HasSubstr("config.json: invalid JSON at offset"));
  EXPECT_THAT(ParseError(std::string("{}\0{}", 5)), HasSubstr("invalid JSON at offset 2: found a NUL byte"));
  EXPECT_THAT(ParseError("{\"a\":1,\"a\":2}"), HasSubstr("found key \"a\" twice"));
  EXPECT_THAT(ParseError("{\"a\":\"\xff\"}"), HasSubstr("invalid JSON at offset"));
  EXPECT_THAT(ParseError("{\"a\":" + std::string(100000, '[')), HasSubstr("nesting deeper than 16"));
  EXPECT_THAT(ParseError(std::string((1 << 20) + 1, ' ')),
              HasSubstr("config.json: file size: found 1048577 bytes, allowed 1048576"));
}

TEST(ModelConfig, W23KeysThatLookExecutableAreInert) {
  Json config = Json::parse(PresetConfigJson(ModelPreset::kTiny));
  config["auto_map"] = {{"AutoModelForCausalLM", "evil.py--Evil"}};
  config["trust_remote_code"] = true;
  config["torch_dtype"] = "evil";
  config["_name_or_path"] = "http://127.0.0.1:1/evil";
  const auto c = ModelConfig::Parse(config.dump());
  ASSERT_TRUE(c.ok()) << c.status();
  EXPECT_THAT(c->ignored_keys, ::testing::ElementsAre("auto_map", "trust_remote_code", "_name_or_path"));
}

TEST(ModelConfigMalformed, W24LayerTypes) {
  const auto without_ratios = [](Json types) {
    return ErrorAfter([&](Json& c) {
      c.erase("compress_ratios");
      c["layer_types"] = types;
    });
  };
  EXPECT_THAT(without_ratios({"sliding_attention"}),
              HasSubstr("config.json: layer_types: found 1 entries, allowed an array of 6"));
  EXPECT_THAT(without_ratios(Json(std::vector<std::string>(6, "linear_attention"))),
              HasSubstr("layer_types[0]: found \"linear_attention\""));
  EXPECT_THAT(without_ratios("all"), HasSubstr("layer_types: found \"all\""));
  EXPECT_THAT(ErrorWith("layer_types", std::vector<std::string>(6, "sliding_attention")),
              HasSubstr("layer_types: found other kinds"));
  EXPECT_THAT(ErrorWith("mlp_layer_types", {"moe"}), HasSubstr("mlp_layer_types: found"));
}

TEST(ModelConfigMalformed, W24RopeScaling) {
  const auto with = [](const char* key, Json value) {
    return ErrorAfter([&](Json& c) { c["rope_scaling"][key] = value; });
  };
  EXPECT_THAT(with("factor", -16), HasSubstr("config.json: rope_scaling.factor: found -16, allowed a number from 1"));
  EXPECT_THAT(with("factor", "16"), HasSubstr("rope_scaling.factor: found \"16\""));
  EXPECT_THAT(with("original_max_position_embeddings", 0), HasSubstr("rope_scaling.original_max_position_embeddings"));
  EXPECT_THAT(with("beta_slow", 64), HasSubstr("rope_scaling.beta_slow: found 64, allowed at most beta_fast"));
  EXPECT_THAT(with("type", "linear"), HasSubstr("rope_scaling.type: found \"linear\", allowed \"yarn\""));
  EXPECT_THAT(with("attention_factor", 1.5), HasSubstr("rope_scaling.attention_factor: found 1.5"));
  // NaN is no JSON; 1e999 is no double.
  std::string text = PresetConfigJson(ModelPreset::kTiny);
  const size_t at = text.find("\"factor\": 16");
  ASSERT_NE(at, std::string::npos);
  for (const char* bad : {"NaN", "Infinity", "1e999"}) {
    std::string changed = text;
    changed.replace(at, 12, std::string("\"factor\": ") + bad);
    EXPECT_THAT(ParseError(changed), HasSubstr("config.json: invalid JSON at offset")) << bad;
  }
  EXPECT_EQ(ErrorWith("rope_scaling", nullptr), "");
}

}  // namespace
}  // namespace millrace
