// SPDX-License-Identifier: Apache-2.0
// Whole checkpoints that must not open: coverage, values, shards, index, paths (W05, W08, W11 to W21, W29, W30).
//
// Rows about one file's header are in safetensors_test.cc, rows about config.json in config_test.cc; W25 to W28 concern
// the tokenizer and live beside it.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>

#include "engine/model/checkpoint.h"
#include "engine/model/checkpoint_manifest.h"
#include "engine/model/random_checkpoint.h"
#include "engine/model/safetensors_writer.h"
#include "engine/model/shard_index.h"
#include "nlohmann/json.hpp"

namespace millrace {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using Json = nlohmann::json;

std::string ReadText(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
}
void WriteText(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::binary) << text; }

// A tensor that owns its bytes, to be changed and written again.
struct OwnedTensor {
  DType dtype;
  std::vector<int64_t> shape;
  std::string bytes;
};
using OwnedTensors = std::map<std::string, OwnedTensor>;

class MalformedCheckpoint : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    std::string name = ::testing::TempDir() + "millrace-checkpoints-XXXXXX";
    root_ = new std::string(mkdtemp(name.data()));
    // One layer of each kind, in shards small enough that a layer spans several.
    const PresetChanges changes = {.layers = 3, .experts = 2};
    for (const uint64_t seed : {1, 2}) {
      const absl::Status status =
          MakeRandomCheckpoint(ModelPreset::kTiny, changes, *root_ + "/seed" + std::to_string(seed),
                               {.seed = seed, .max_shard_bytes = 2 << 20});
      ASSERT_TRUE(status.ok()) << status;
    }
  }
  static void TearDownTestSuite() {
    fs::remove_all(*root_);
    delete root_;
  }

  MalformedCheckpoint() : dir_(*root_ + "/case") { fs::copy(*root_ + "/seed1", dir_); }
  ~MalformedCheckpoint() override { fs::remove_all(dir_); }

  std::string Error(CheckpointOptions options = {}) {
    const auto checkpoint = Checkpoint::Open(dir_, std::move(options));
    if (checkpoint.ok()) return "";
    code_ = checkpoint.status().code();
    const std::string error(checkpoint.status().message());
    EXPECT_EQ(error.find('\n'), std::string::npos) << "one line";
    return error;
  }

  // Shards and index become one model.safetensors, changed on the way.
  std::string ErrorAfterTensors(const std::function<void(OwnedTensors&)>& change, CheckpointOptions options = {}) {
    OwnedTensors tensors;
    for (const auto& entry : fs::directory_iterator(*root_ + "/seed1")) {
      if (entry.path().extension() != ".safetensors") continue;
      const auto file = SafetensorsFile::Open(entry.path());
      EXPECT_TRUE(file.ok()) << file.status();
      for (const std::string& name : (*file)->names()) {
        const HostTensor& t = *(*file)->Find(name);
        tensors[name] = {t.dtype, t.shape,
                         std::string(reinterpret_cast<const char*>(t.data), static_cast<size_t>(t.bytes))};
      }
    }
    for (const auto& entry : fs::directory_iterator(dir_)) {
      if (entry.path().filename() != "config.json") fs::remove(entry.path());
    }
    change(tensors);
    std::vector<TensorToWrite> table;
    for (const auto& [name, t] : tensors) table.push_back({name, t.dtype, t.shape, t.bytes.data()});
    const absl::Status status = WriteSafetensors(dir_ + "/" + kSingleFile, table);
    EXPECT_TRUE(status.ok()) << status;
    return Error(std::move(options));
  }

  std::string ErrorAfterConfig(const char* key, const Json& value) {
    Json config = Json::parse(ReadText(dir_ + "/config.json"));
    config[key] = value;
    WriteText(dir_ + "/config.json", config.dump());
    return Error();
  }

  std::string ErrorAfterIndex(const std::function<void(Json&)>& change) {
    Json index = Json::parse(ReadText(*root_ + "/seed1/" + kIndexFile));
    change(index);
    WriteText(dir_ + "/" + kIndexFile, index.dump());
    return Error();
  }
  std::string ErrorWithShardName(const std::string& name) {
    return ErrorAfterIndex([&](Json& index) { index["weight_map"]["embed.weight"] = name; });
  }

  std::string Shard(int n) {
    for (const auto& entry : fs::directory_iterator(dir_)) {
      const std::string name = entry.path().filename();
      if (name.find("model-0000" + std::to_string(n)) == 0) return name;
    }
    return "";
  }

  static std::string* root_;
  std::string dir_;
  absl::StatusCode code_ = absl::StatusCode::kOk;
};
std::string* MalformedCheckpoint::root_ = nullptr;

void SetBf16(OwnedTensor& tensor, size_t index, uint16_t bits) {
  std::memcpy(tensor.bytes.data() + 2 * index, &bits, 2);
}
void SetF32(OwnedTensor& tensor, size_t index, uint32_t bits) {
  std::memcpy(tensor.bytes.data() + 4 * index, &bits, 4);
}

TEST_F(MalformedCheckpoint, TheUnchangedOneOpens) {
  EXPECT_EQ(Error(), "");
  EXPECT_EQ(Error({.verify_finite = true}), "");
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors&) {}), "");
}

TEST_F(MalformedCheckpoint, W05DuplicateAcrossShards) {
  const std::vector<float> norm(256, 1.0f);
  std::vector<uint16_t> data(256, 0x3f80);
  const std::string extra = "model-extra.safetensors";
  ASSERT_TRUE(WriteSafetensors(dir_ + "/" + extra, {{"norm.weight", DType::kBF16, {256}, data.data()}}).ok());
  EXPECT_THAT(ErrorAfterIndex([&](Json& index) { index["weight_map"]["other.weight"] = extra; }),
              AllOf(StartsWith(extra + ": duplicate tensor norm.weight: found here and in model-0000"),
                    HasSubstr("expected in one file")));
}

TEST_F(MalformedCheckpoint, W08ZeroSizeTensor) {
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) {
              t["mtp.9.empty"] = {DType::kF32, {0, 4}, ""};
            }),
            "model.safetensors: tensor mtp.9.empty: shape: found [0, 4], expected no size of 0");
}

TEST_F(MalformedCheckpoint, W11DTypeWrongForTheRole) {
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) {
              OwnedTensor& w = t["layers.1.attn.wkv.weight"];
              w.dtype = DType::kF32;
              w.bytes.resize(4 * w.bytes.size());
            }),
            "model.safetensors: tensor layers.1.attn.wkv.weight: dtype: found F32, expected F8_E4M3");
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) {
              OwnedTensor& w = t["layers.0.ffn.experts.1.w2.scale"];
              w.dtype = DType::kF16;
              w.bytes.resize(2 * w.bytes.size());
            }),
            "model.safetensors: tensor layers.0.ffn.experts.1.w2.scale: dtype: found F16, expected F8_E8M0");
}

TEST_F(MalformedCheckpoint, W12Shape) {
  EXPECT_THAT(ErrorAfterTensors([](OwnedTensors& t) {
                std::swap(t["layers.2.attn.wo_b.weight"].shape[0], t["layers.2.attn.wo_b.weight"].shape[1]);
              }),
              HasSubstr("tensor layers.2.attn.wo_b.weight: shape: found [128, 256], expected [256, 128]"));
}
TEST_F(MalformedCheckpoint, W12VocabularyPlusOne) {
  EXPECT_THAT(ErrorAfterConfig("vocab_size", 513),
              HasSubstr("tensor embed.weight: shape: found [512, 256], expected [513, 256]"));
}
TEST_F(MalformedCheckpoint, W12ExpertCountOffByOne) {
  EXPECT_THAT(ErrorAfterConfig("n_routed_experts", 3),
              HasSubstr("tensor layers.0.ffn.gate.weight: shape: found [2, 256], expected [3, 256]"));
}
TEST_F(MalformedCheckpoint, W12LayerCount) {
  EXPECT_THAT(ErrorAfterConfig("num_hidden_layers", 4), HasSubstr("missing tensors: found 41 missing (layers.3.attn."));
  EXPECT_THAT(ErrorAfterConfig("num_hidden_layers", 2), HasSubstr("unexpected tensors: found "));
}

TEST_F(MalformedCheckpoint, W13MissingTensorsListTheFirstFive) {
  EXPECT_EQ(
      ErrorAfterTensors([](OwnedTensors& t) {
        for (const char* name : {"norm.weight", "head.weight", "layers.1.attn_norm.weight", "layers.2.attn_norm.weight",
                                 "mtp.0.norm.weight", "hc_head_fn", "embed.weight"}) {
          t.erase(name);
        }
      }),
      "model.safetensors: missing tensors: found 7 missing (embed.weight, hc_head_fn, head.weight, "
      "layers.1.attn_norm.weight, layers.2.attn_norm.weight and 2 more), expected none");
}
TEST_F(MalformedCheckpoint, W13ExtraTensorsAreRefusedUnlessMtp) {
  const OwnedTensor extra = {DType::kF32, {1}, std::string(4, '\0')};
  EXPECT_EQ(ErrorAfterTensors([&](OwnedTensors& t) { t["lm_head.bias"] = extra; }),
            "model.safetensors: unexpected tensors: found 1 (lm_head.bias), expected none");
  EXPECT_EQ(ErrorAfterTensors([&](OwnedTensors& t) { t["mtp.1.norm.weight"] = extra; }), "");
}

TEST_F(MalformedCheckpoint, W14NanAndInf) {
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) { SetBf16(t["norm.weight"], 17, 0x7fc0); }),
            "model.safetensors: tensor norm.weight: found 1 values that are NaN or infinite, the first at index 17, "
            "expected none");
  EXPECT_THAT(ErrorAfterTensors([](OwnedTensors& t) { SetBf16(t["layers.1.ffn.gate.weight"], 511, 0xff80); }),
              HasSubstr("tensor layers.1.ffn.gate.weight: found 1 values"));
  EXPECT_THAT(ErrorAfterTensors([](OwnedTensors& t) { SetBf16(t["embed.weight"], 0, 0x7f80); }),
              HasSubstr("tensor embed.weight: found 1 values"));
  EXPECT_THAT(ErrorAfterTensors([](OwnedTensors& t) {
                SetF32(t["hc_head_base"], 1, 0x7f800001);
                SetF32(t["hc_head_base"], 3, 0xff800000);
              }),
              HasSubstr("tensor hc_head_base: found 2 values that are NaN or infinite, the first at index 1"));
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) { SetBf16(t["norm.weight"], 17, 0x7f7f); }), "")
      << "the largest finite value";
}

TEST_F(MalformedCheckpoint, W15NanCodesOfFp8AndE8m0) {
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) { t["layers.0.ffn.experts.0.w1.scale"].bytes[9] = '\xff'; }),
            "model.safetensors: tensor layers.0.ffn.experts.0.w1.scale: found 1 values that are NaN or infinite, the "
            "first at "
            "index 9, expected none");
  for (const char code : {'\x7f', '\xff'}) {
    EXPECT_THAT(
        ErrorAfterTensors([&](OwnedTensors& t) { t["layers.0.attn.wkv.weight"].bytes[5000] = code; }),
        HasSubstr("tensor layers.0.attn.wkv.weight: found 1 values that are NaN or infinite, the first at index 5000"));
  }
  EXPECT_EQ(ErrorAfterTensors([](OwnedTensors& t) { t["layers.0.attn.wkv.weight"].bytes[5000] = '\x7e'; }), "");
}

TEST_F(MalformedCheckpoint, HashRoutingMustNameExpertsThatExist) {
  const auto set = [](OwnedTensor& t, size_t index, int64_t id) { std::memcpy(t.bytes.data() + 8 * index, &id, 8); };
  for (const int64_t bad : {int64_t{2}, int64_t{-1}, INT64_MAX}) {
    EXPECT_THAT(ErrorAfterTensors([&](OwnedTensors& t) { set(t["layers.0.ffn.gate.tid2eid"], 6, bad); }),
                HasSubstr("tensor layers.0.ffn.gate.tid2eid: found expert " + std::to_string(bad) +
                          " at index 6, expected 0 to 1"));
  }
  EXPECT_THAT(ErrorAfterTensors([&](OwnedTensors& t) {
                set(t["layers.0.ffn.gate.tid2eid"], 6, 1);
                set(t["layers.0.ffn.gate.tid2eid"], 7, 1);
              }),
              HasSubstr("found expert 1 twice for token 3"));
}

TEST_F(MalformedCheckpoint, W16TruncatedShard) {
  const std::string shard = Shard(2);
  const auto size = fs::file_size(dir_ + "/" + shard);
  for (const double part : {0.999, 0.5, 0.25}) {
    fs::resize_file(dir_ + "/" + shard, static_cast<uintmax_t>(static_cast<double>(size) * part));
    EXPECT_THAT(Error(), AllOf(StartsWith(shard + ": file size: found "), HasSubstr(" expected "))) << part;
  }
}

TEST_F(MalformedCheckpoint, W17FlippedBitIsFoundByTheManifest) {
  {
    const auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_TRUE(WriteManifest(**checkpoint, dir_).ok());
    const auto again = Checkpoint::Open(dir_);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ((*again)->ContentHash(), (*checkpoint)->ContentHash()) << "known hashes give the same content hash";
  }
  const std::string shard = Shard(2), path = dir_ + "/" + shard;
  std::string bytes = ReadText(path);
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  WriteText(path, bytes);
  EXPECT_THAT(Error(),
              AllOf(StartsWith(shard + ": tensor "), HasSubstr(": hash mismatch: found "), HasSubstr("manifest.json")));
  EXPECT_EQ(code_, absl::StatusCode::kDataLoss);
  EXPECT_EQ(Error({.verify_manifest = false}), "");
}

TEST_F(MalformedCheckpoint, W17ManifestThatIsNone) {
  for (const char* text :
       {"{}", "{\"format\":\"millrace-manifest-1\",\"hash\":\"md5\",\"tensors\":{}}", "[", "{\"format\":1}",
        "{\"format\":\"millrace-manifest-1\",\"hash\":\"xxh3-128\",\"tensors\":{\"norm.weight\":\"0\"}}",
        "{\"format\":\"millrace-manifest-1\",\"hash\":\"xxh3-128\",\"tensors\":{}}"}) {
    WriteText(dir_ + "/manifest.json", text);
    EXPECT_THAT(Error(), StartsWith("manifest.json: ")) << text;
  }
}

TEST_F(MalformedCheckpoint, W21ShardOfAnotherRevision) {
  {
    const auto checkpoint = Checkpoint::Open(dir_);
    ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
    ASSERT_TRUE(WriteManifest(**checkpoint, dir_).ok());
    const auto other = Checkpoint::Open(*root_ + "/seed2");
    EXPECT_NE((*checkpoint)->ContentHash(), (*other)->ContentHash());
  }
  const std::string shard = Shard(3);
  fs::copy_file(*root_ + "/seed2/" + shard, dir_ + "/" + shard, fs::copy_options::overwrite_existing);
  EXPECT_THAT(Error(), AllOf(StartsWith(shard + ": tensor "), HasSubstr("hash mismatch")));
}

TEST_F(MalformedCheckpoint, W19NamesThatLeadOutside) {
  for (const std::string& name :
       {std::string("../../etc/passwd"), std::string("/etc/passwd"), std::string("a/../../b"), std::string(".."),
        std::string(""), std::string("a\0b", 3), std::string("./../seed2/model-00001-of-00005.safetensors")}) {
    EXPECT_THAT(ErrorWithShardName(name), HasSubstr("path escapes model directory")) << name;
  }
  EXPECT_EQ(code_, absl::StatusCode::kInvalidArgument);
}
TEST_F(MalformedCheckpoint, W19SymlinksThatLeadOutside) {
  fs::create_symlink("/etc/passwd", dir_ + "/out.safetensors");
  fs::create_symlink("../seed2/" + Shard(1), dir_ + "/up.safetensors");
  fs::create_symlink("/proc/self/exe", dir_ + "/magic.safetensors");
  fs::create_symlink("loop.safetensors", dir_ + "/loop.safetensors");
  for (const char* name : {"out", "up", "magic", "loop"}) {
    EXPECT_THAT(ErrorWithShardName(name + std::string(".safetensors")), HasSubstr("path escapes model directory"))
        << name;
  }
}
TEST_F(MalformedCheckpoint, W19ASymlinkThatStaysInsideIsFine) {
  const std::string shard = Shard(1);
  fs::rename(dir_ + "/" + shard, dir_ + "/data");
  fs::create_symlink("data", dir_ + "/" + shard);
  EXPECT_EQ(Error(), "");
}
TEST_F(MalformedCheckpoint, W19OnlyRegularFiles) {
  ASSERT_EQ(mkfifo((dir_ + "/fifo.safetensors").c_str(), 0600), 0);
  EXPECT_EQ(ErrorWithShardName("fifo.safetensors"),
            "fifo.safetensors: file type: found a FIFO, expected a regular file");
  fs::create_directory(dir_ + "/directory.safetensors");
  EXPECT_THAT(ErrorWithShardName("directory.safetensors"), HasSubstr("found a directory, expected a regular file"));
  if (mknod((dir_ + "/zero.safetensors").c_str(), S_IFCHR | 0600, makedev(1, 5)) != 0)
    GTEST_SKIP() << "cannot make a device";
  EXPECT_THAT(ErrorWithShardName("zero.safetensors"),
              ::testing::AnyOf(HasSubstr("character device"), HasSubstr("Permission denied")));
}

TEST_F(MalformedCheckpoint, W20TensorMappedToAShardLackingIt) {
  const std::string first = Shard(1), second = Shard(2);
  EXPECT_EQ(ErrorWithShardName(second), "model.safetensors.index.json: weight_map: tensor embed.weight: found " +
                                            second + ", expected " + first + ", which holds it");
  EXPECT_EQ(ErrorAfterIndex([&](Json& index) { index["weight_map"]["ghost.weight"] = second; }),
            "model.safetensors.index.json: weight_map: tensor ghost.weight: found in no shard, expected in " + second +
                " (1 tensors are missing)");
  EXPECT_EQ(ErrorAfterIndex([&](Json& index) { index["weight_map"].erase("embed.weight"); }),
            "model.safetensors.index.json: weight_map: tensor embed.weight: found nothing, expected " + first +
                ", which holds it");
}
TEST_F(MalformedCheckpoint, W20ShardMissingOrNotListed) {
  EXPECT_THAT(ErrorWithShardName("absent.safetensors"),
              StartsWith("absent.safetensors: open: found error \"No such file"));
  EXPECT_EQ(code_, absl::StatusCode::kNotFound);
  fs::copy_file(dir_ + "/" + Shard(1), dir_ + "/model-00009-of-00009.safetensors");
  EXPECT_THAT(ErrorAfterIndex([](Json&) {}),
              HasSubstr("weight_map: found no tensor in model-00009-of-00009.safetensors"));
}
TEST_F(MalformedCheckpoint, W20TotalSize) {
  EXPECT_THAT(ErrorAfterIndex([](Json& index) {
                index["metadata"]["total_size"] = index["metadata"]["total_size"].get<int64_t>() + 1;
              }),
              HasSubstr("model.safetensors.index.json: metadata.total_size: found "));
  std::string text = ReadText(*root_ + "/seed1/" + kIndexFile);
  const size_t at = text.find("\"total_size\": ") + 14;
  text.replace(at, text.find_first_not_of("0123456789", at) - at, "18446744073709551616");
  WriteText(dir_ + "/" + kIndexFile, text);
  EXPECT_THAT(Error(), HasSubstr("metadata.total_size: found 1.8446744073709552e+19, expected a number of bytes"));
  EXPECT_THAT(ErrorAfterIndex([](Json& index) { index["metadata"]["total_size"] = -1; }),
              HasSubstr("total_size: found -1"));
  EXPECT_EQ(ErrorAfterIndex([](Json& index) { index.erase("metadata"); }), "") << "old indexes have none";
}
TEST_F(MalformedCheckpoint, W20IndexThatIsNone) {
  for (const char* text :
       {"", "[]", "{}", "{\"weight_map\":[]}", "{\"weight_map\":{}}", "{\"weight_map\":{\"a\":1}}",
        "{\"weight_map\":{\"a\":\"x\",\"a\":\"y\"}}", "{\"weight_map\":{\"a\":{\"b\":{\"c\":{\"d\":1}}}}}"}) {
    WriteText(dir_ + "/" + kIndexFile, text);
    EXPECT_THAT(Error(), StartsWith("model.safetensors.index.json: ")) << text;
  }
}

TEST_F(MalformedCheckpoint, TwoSetsOfWeightsAreAmbiguous) {
  fs::copy_file(dir_ + "/" + Shard(1), dir_ + "/model.safetensors");
  EXPECT_EQ(Error(), "model.safetensors.index.json: found beside model.safetensors, expected only one of them");
}

TEST_F(MalformedCheckpoint, W29OtherFormats) {
  for (const auto& entry : fs::directory_iterator(dir_)) {
    if (entry.path().filename() != "config.json") fs::remove(entry.path());
  }
  EXPECT_THAT(Error(), HasSubstr("weights: found neither model.safetensors nor model.safetensors.index.json"));
  EXPECT_EQ(code_, absl::StatusCode::kNotFound);
  for (const char* name : {"pytorch_model.bin", "consolidated.00.pth", "model.pt", "flash-Q4.gguf", "weights.pkl"}) {
    WriteText(dir_ + "/" + name, "x");
    EXPECT_THAT(Error(), StartsWith(std::string(name) + ": unsupported format: found ")) << name;
    EXPECT_EQ(code_, absl::StatusCode::kUnimplemented);
    const auto direct = Checkpoint::Open(dir_ + "/" + name);
    EXPECT_EQ(direct.status().code(), absl::StatusCode::kUnimplemented);
    fs::remove(dir_ + "/" + name);
  }
}
TEST_F(MalformedCheckpoint, W29IndexOfPickles) {
  EXPECT_THAT(ErrorWithShardName("pytorch_model-00001-of-00002.bin"), HasSubstr("unsupported format: found bin"));
}

TEST_F(MalformedCheckpoint, W30DirectoryThatCannotBeRead) {
  EXPECT_THAT(std::string(Checkpoint::Open("/nonexistent").status().message()),
              StartsWith("/nonexistent: open model directory: found error \"No such file"));
  EXPECT_THAT(std::string(Checkpoint::Open(dir_ + "/config.json").status().message()), HasSubstr("Not a directory"));
  // Root reads everything, so look as somebody else.
  chmod(root_->c_str(), 0700);
  const auto open_as_nobody = [&] {
    if (geteuid() == 0 && (setgid(65534) != 0 || setuid(65534) != 0)) exit(1);
    if (geteuid() != 65534) chmod(dir_.c_str(), 0);
    fprintf(stderr, "%s\n", std::string(Checkpoint::Open(dir_).status().message()).c_str());
    chmod(dir_.c_str(), 0700);
    exit(0);
  };
  EXPECT_EXIT(open_as_nobody(), ::testing::ExitedWithCode(0),
              "open model directory: found error \"Permission denied\"");
}

}  // namespace
}  // namespace millrace
