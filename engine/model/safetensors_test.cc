// SPDX-License-Identifier: Apache-2.0
// One safetensors file: round trip, and every way its header can lie (W01 to W11, W16, W18, W29, W30).
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"
#include "engine/model/safetensors_writer.h"

namespace millrace {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

class SafetensorsTest : public ::testing::Test {
 protected:
  SafetensorsTest() {
    std::string name = ::testing::TempDir() + "millrace-safetensors-XXXXXX";
    dir_ = mkdtemp(name.data());
    path_ = dir_ + "/model.safetensors";
  }
  ~SafetensorsTest() override { fs::remove_all(dir_); }

  void WriteBytes(const std::string& bytes) {
    unlink(path_.c_str());  // ext4 flushes a file that is truncated and rewritten
    std::ofstream(path_, std::ios::binary) << bytes;
  }

  // A file whose header length is `length` whatever the header is.
  void WriteWithLength(uint64_t length, const std::string& rest) {
    std::string bytes(8, '\0');
    std::memcpy(bytes.data(), &length, 8);
    WriteBytes(bytes + rest);
  }
  void WriteFile(const std::string& header, size_t data_bytes) {
    WriteWithLength(header.size(), header + std::string(data_bytes, '\1'));
  }

  // The one-line error of opening the file.
  std::string Error() {
    const auto file = SafetensorsFile::Open(path_);
    if (file.ok()) return "";
    const std::string error(file.status().message());
    EXPECT_EQ(error.find('\n'), std::string::npos);
    EXPECT_THAT(error, HasSubstr(path_ + ": "));
    EXPECT_LT(error.size(), 2000u);
    return error.substr(path_.size() + 2);
  }
  std::string ErrorOf(const std::string& header, size_t data_bytes = 16) {
    WriteFile(header, data_bytes);
    return Error();
  }

  std::string dir_, path_;
};

TEST_F(SafetensorsTest, WritesWhatItReads) {
  const std::vector<float> a = {1, 2, 3, 4, 5, 6};
  const std::vector<uint8_t> b = {7, 8, 9};
  ASSERT_TRUE(
      WriteSafetensors(path_, {{"b", DType::kF8E4M3, {3}, b.data()}, {"a", DType::kF32, {2, 3}, a.data()}}).ok());
  const auto file = SafetensorsFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_THAT((*file)->names(), ::testing::ElementsAre("b", "a"));
  const HostTensor* tensor = (*file)->Find("a");
  ASSERT_NE(tensor, nullptr);
  EXPECT_EQ(tensor->dtype, DType::kF32);
  EXPECT_EQ(tensor->shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(tensor->elements(), 6);
  EXPECT_EQ(std::memcmp(tensor->data, a.data(), 24), 0);
  EXPECT_EQ((*file)->Find("c"), nullptr);
  uint64_t length;
  std::ifstream(path_, std::ios::binary).read(reinterpret_cast<char*>(&length), 8);
  EXPECT_EQ(length % 8, 0u);
  EXPECT_EQ(std::distance(fs::directory_iterator(dir_), fs::directory_iterator()), 1) << "no temporary left";
}

TEST_F(SafetensorsTest, W01FileTooSmall) {
  for (size_t size : {0, 7, 8}) {
    WriteBytes(std::string(size, '\0'));
    EXPECT_THAT(Error(), HasSubstr("header too small: found a file of " + std::to_string(size) + " bytes"));
  }
}

TEST_F(SafetensorsTest, W02HeaderLength) {
  const std::string rest = "{}" + std::string(90, ' ');
  const uint64_t size = 8 + rest.size();
  for (uint64_t length :
       {uint64_t{0}, uint64_t{1}, uint64_t{1} << 63, ~uint64_t{0} - 7, ~uint64_t{0}, size - 7, uint64_t{100'000'001}}) {
    WriteWithLength(length, rest);
    EXPECT_THAT(Error(), HasSubstr("invalid header length: found " + std::to_string(length) + ", expected 2 to 92"));
  }
  // The cap holds for a file that is large enough (sparse: no bytes are claimed for it).
  ASSERT_EQ(truncate(path_.c_str(), 200'000'000), 0);
  EXPECT_THAT(Error(), HasSubstr("invalid header length: found 100000001, expected 2 to 100000000"));
}

TEST_F(SafetensorsTest, W03HeaderIsNotJson) {
  EXPECT_THAT(ErrorOf("[1,2,3]"), HasSubstr("invalid header at offset 0"));
  EXPECT_THAT(ErrorOf(" {}"), HasSubstr("invalid header at offset 0"));
  EXPECT_THAT(ErrorOf("{\"a\":}"), HasSubstr("invalid header at offset 6"));
  EXPECT_THAT(ErrorOf("{\"\xff\xfe\":1}"), HasSubstr("invalid header at offset"));
  EXPECT_THAT(ErrorOf("{}  x"), HasSubstr("invalid header at offset 5"));
  EXPECT_THAT(ErrorOf(std::string("{}\0\0", 4)), HasSubstr("invalid header at offset 2: found a NUL byte"));
  EXPECT_THAT(ErrorOf("{\"a\":1}"), HasSubstr("header: found a number, expected"));
  EXPECT_THAT(ErrorOf("{\"__metadata__\":{\"a\":1}}"), HasSubstr("header: __metadata__: found a number"));
  EXPECT_THAT(ErrorOf("{\"__metadata__\":{\"a\":{}}}"), HasSubstr("header: __metadata__: found an object"));
}

TEST_F(SafetensorsTest, W04HeaderLimits) {
  EXPECT_THAT(ErrorOf("{\"a\":" + std::string(100'000, '[')), HasSubstr("header: "));
  EXPECT_THAT(ErrorOf("{\"a\":" + std::string(100'000, '{')), HasSubstr("header"));
  std::string deep = "{";
  for (int i = 0; i < 100'000; ++i) deep += "\"a\":{";
  EXPECT_THAT(ErrorOf(deep), HasSubstr("header: "));
  EXPECT_THAT(ErrorOf("{\"" + std::string(1 << 20, 'a') + "\":{}}"),
              HasSubstr("header: tensor name: found 1048576 bytes, expected at most 256"));
  std::string many = "{";
  for (int i = 0; i < 1'000'000; ++i) {
    many += (i == 0 ? "\"" : ",\"") + std::to_string(i) + R"(":{"dtype":"U8","shape":[0],"data_offsets":[0,0]})";
  }
  EXPECT_THAT(ErrorOf(many + "}"), HasSubstr("header: found more than 262144 tensors"));
}

TEST_F(SafetensorsTest, W05DuplicateTensor) {
  EXPECT_THAT(
      ErrorOf(
          R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[8,16]}})"),
      HasSubstr("duplicate tensor a: found twice"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","dtype":"U8","shape":[16],"data_offsets":[0,16]}})"),
              HasSubstr("tensor a: dtype: found the key twice"));
}

TEST_F(SafetensorsTest, W06Offsets) {
  const auto with = [&](const std::string& offsets) {
    return ErrorOf(R"({"a":{"dtype":"U8","shape":[16],"data_offsets":)" + offsets + "}}");
  };
  for (const char* bad : {"[16]", "[]", "[0,8,16]", "[-1,15]", "[0.0,16.0]", "[\"0\",16]", "[16,0]", "null", "\"0,16\"",
                          "{}", "[0,[16]]", "[0,18446744073709551615]", "[0,1e400]", "[0,99999999999999999999]"}) {
    EXPECT_THAT(with(bad), ::testing::AnyOf(HasSubstr("invalid offset for tensor a: found"),
                                            HasSubstr("invalid header at offset")))
        << bad;
  }
  EXPECT_THAT(with("[-1,15]"), HasSubstr("invalid offset for tensor a: found -1, expected [begin, end]"));
  EXPECT_THAT(with("[8,24]"), HasSubstr("offsets must tile"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[16]}})"),
              HasSubstr("invalid offset for tensor a: found no data_offsets"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[17],"data_offsets":[0,17]}})"),
              HasSubstr("an invalid offset for tensor a"));
  EXPECT_THAT(ErrorOf(R"({"a":{"shape":[16],"data_offsets":[0,16]}})"), HasSubstr("tensor a: dtype: found no dtype"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","data_offsets":[0,16]}})"), HasSubstr("tensor a: shape: found no shape"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[16],"data_offsets":[0,16],"code":1}})"),
              HasSubstr("tensor a: found key \"code\""));
}

TEST_F(SafetensorsTest, W07OffsetsMustTileTheBuffer) {
  const auto two = [](int a_begin, int a_end, int b_begin, int b_end) {
    const auto entry = [](int begin, int end) {
      return R"({"dtype":"U8","shape":[)" + std::to_string(end - begin) + R"(],"data_offsets":[)" +
             std::to_string(begin) + "," + std::to_string(end) + "]}";
    };
    return "{\"a\":" + entry(a_begin, a_end) + ",\"b\":" + entry(b_begin, b_end) + "}";
  };
  EXPECT_EQ(ErrorOf(two(0, 8, 8, 16)), "");
  EXPECT_EQ(ErrorOf(two(8, 16, 0, 8)), "") << "any order in the header";
  EXPECT_THAT(ErrorOf(two(0, 8, 7, 16)), HasSubstr("offsets must tile the buffer: found tensor b at 7, expected 8"));
  EXPECT_THAT(ErrorOf(two(0, 8, 9, 16)), HasSubstr("offsets must tile the buffer: found tensor b at 9, expected 8"));
  EXPECT_THAT(ErrorOf(two(1, 8, 8, 16)), HasSubstr("offsets must tile the buffer: found tensor a at 1, expected 0"));
  EXPECT_THAT(ErrorOf(two(0, 8, 8, 15)),
              HasSubstr("offsets must tile the buffer: found 1 bytes after the last tensor"));
  EXPECT_THAT(ErrorOf(two(0, 8, 0, 16)), HasSubstr("offsets must tile the buffer"));
  EXPECT_THAT(ErrorOf("{}", 16), HasSubstr("offsets must tile the buffer: found 16 bytes after the last tensor"));
}

TEST_F(SafetensorsTest, W09OverflowingShape) {
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[4194305,4194305,211106198978564],"data_offsets":[0,16]}})"),
              HasSubstr("tensor a: overflow computing size: found shape [4194305, 4194305, 211106198978564]"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[18446744073709551615],"data_offsets":[0,16]}})"),
              HasSubstr("overflow computing size"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[0,18446744073709551615],"data_offsets":[0,0]}})"),
              HasSubstr("overflow computing size"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,16],"data_offsets":[0,16]}})"),
              HasSubstr("shape: found more than 8 numbers"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"U8","shape":[-16],"data_offsets":[0,16]}})"),
              HasSubstr("tensor a: shape: found -16"));
}

TEST_F(SafetensorsTest, W10SizeMismatch) {
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[3],"data_offsets":[0,16]}})"),
              HasSubstr("tensor a: tensor size mismatch: found 16 bytes, expected 12 for F32 [3]"));
  EXPECT_THAT(ErrorOf(R"({"a":{"dtype":"F32","shape":[],"data_offsets":[0,16]}})"),
              HasSubstr("tensor size mismatch: found 16 bytes, expected 4"));
}

TEST_F(SafetensorsTest, W11UnknownDType) {
  for (const char* dtype : {"F7", "f32", "F4", "F6_E2M3", "C64", ""}) {
    EXPECT_THAT(ErrorOf(std::string(R"({"a":{"dtype":")") + dtype + R"(","shape":[4],"data_offsets":[0,16]}})"),
                HasSubstr(std::string("tensor a: dtype: found ") + dtype + ", expected one of F32 BF16"));
  }
}

TEST_F(SafetensorsTest, W16TruncatedFileIsNoticedBeforeMapping) {
  const std::vector<float> data(1000, 1.0f);
  ASSERT_TRUE(WriteSafetensors(path_, {{"a", DType::kF32, {1000}, data.data()}}).ok());
  const auto size = fs::file_size(path_);
  for (const double part : {0.999, 0.5, 0.25}) {
    fs::resize_file(path_, static_cast<uintmax_t>(static_cast<double>(size) * part));
    EXPECT_THAT(Error(), AllOf(HasSubstr("file size: found "), HasSubstr("of tensor data, expected 4000"))) << part;
  }
  ASSERT_TRUE(WriteSafetensors(path_, {{"a", DType::kF32, {1000}, data.data()}}).ok());
  fs::resize_file(path_, size - 1);
  EXPECT_THAT(Error(), HasSubstr("file size: found 3999 bytes of tensor data, expected 4000"));
}

TEST_F(SafetensorsTest, W18TruncationWhileMappedEndsWithANamedFile) {
  const std::vector<uint8_t> data(1 << 20, 1);
  ASSERT_TRUE(WriteSafetensors(path_, {{"a", DType::kU8, {1 << 20}, data.data()}}).ok());
  const auto read_after_truncation = [&] {
    InstallMappedFileGuard();
    const auto file = SafetensorsFile::Open(path_);
    fs::resize_file(path_, 4096);
    const volatile uint8_t* last = (*file)->Find("a")->data + (1 << 20) - 1;
    exit(*last == 1 ? 0 : 1);
  };
  EXPECT_EXIT(read_after_truncation(), ::testing::ExitedWithCode(kExitMappedFileLost),
              "model.safetensors: file size: found shorter than when it was mapped");
}

TEST_F(SafetensorsTest, W18OtherFaultsGoToTheHandlerThatWasThere) {
  const auto fault_elsewhere = [&] {
    signal(SIGBUS, [](int) { _exit(7); });
    InstallMappedFileGuard();
    raise(SIGBUS);  // puts the old handler back: a real fault would now happen again
    raise(SIGBUS);
  };
  EXPECT_EXIT(fault_elsewhere(), ::testing::ExitedWithCode(7), "");
}

TEST_F(SafetensorsTest, W29OtherFormatsAreRecognised) {
  WriteBytes(std::string("GGUF\3\0\0\0", 8) + std::string(100, '\0'));
  EXPECT_THAT(Error(), HasSubstr("unsupported format: found GGUF"));
  WriteBytes("PK\x03\x04" + std::string(100, 'x'));
  EXPECT_THAT(Error(), HasSubstr("unsupported format: found a zip archive"));
  WriteBytes("\x80\x02" + std::string(100, 'x'));
  EXPECT_THAT(Error(), HasSubstr("unsupported format: found a Python pickle"));
  EXPECT_EQ(SafetensorsFile::Open(path_).status().code(), absl::StatusCode::kUnimplemented);
}

TEST_F(SafetensorsTest, W30FullDiskGivesAClearErrorAndLeavesNothing) {
  const std::vector<uint8_t> data(1 << 20, 1);
  const std::vector<TensorToWrite> tensors = {{"a", DType::kU8, {1 << 20}, data.data()}};
  // A file size limit is the full disk that needs no privileges.
  struct rlimit before;
  getrlimit(RLIMIT_FSIZE, &before);
  const struct rlimit small = {1 << 16, before.rlim_max};
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  setrlimit(RLIMIT_FSIZE, &small);
  const absl::Status status = WriteSafetensors(path_, tensors);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, old_handler);
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(status.message()), HasSubstr("model.safetensors: write: found error \"File too large\""));
  EXPECT_TRUE(fs::is_empty(dir_));
}

TEST_F(SafetensorsTest, W30EnospcWhereAFileSystemCanBeMounted) {
  const std::vector<uint8_t> data(1 << 20, 1);
  const auto write_to_full_disk = [&] {
    if (unshare(CLONE_NEWNS) != 0 || mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        mount("none", dir_.c_str(), "tmpfs", 0, "size=64k") != 0) {
      fprintf(stderr, "cannot mount, No space left on device not tried\n");
      exit(0);
    }
    fprintf(stderr, "%s\n",
            std::string(WriteSafetensors(path_, {{"a", DType::kU8, {1 << 20}, data.data()}}).message()).c_str());
    exit(fs::is_empty(dir_) ? 0 : 1);
  };
  EXPECT_EXIT(write_to_full_disk(), ::testing::ExitedWithCode(0), "No space left on device");
}

TEST_F(SafetensorsTest, NotARegularFile) {
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_EQ(Error(), "file type: found a FIFO, expected a regular file");
  path_ = dir_;
  EXPECT_EQ(Error(), "file type: found a directory, expected a regular file");
  path_ = dir_ + "/absent";
  EXPECT_EQ(Error(), "open: found error \"No such file or directory\"");
}

// Any mutation of a good file is refused or read without touching memory it should not: what a fuzzer would find first.
TEST_F(SafetensorsTest, RandomMutationsNeverCrash) {
  const std::vector<float> data(64, 1.0f);
  ASSERT_TRUE(
      WriteSafetensors(path_, {{"a", DType::kF32, {8, 4}, data.data()}, {"b", DType::kF32, {32}, data.data()}}).ok());
  std::ifstream in(path_, std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  uint32_t random = 1;
  const auto next = [&] { return random = random * 1664525 + 1013904223, random >> 8; };
  for (int i = 0; i < 3000; ++i) {
    std::string bad = good;
    const size_t header_end = bad.size() - 256;
    for (uint32_t n = 1 + next() % 3; n > 0; --n) {
      const size_t at = next() % header_end;
      switch (next() % 3) {
        case 0:
          bad[at] = static_cast<char>(next());
          break;
        case 1:
          bad.erase(at, 1 + next() % 4);
          break;
        default:
          bad.insert(at, std::string(1, "0123456789[]{},:\""[next() % 17]));
          break;
      }
    }
    WriteBytes(bad);
    const auto file = SafetensorsFile::Open(path_);
    if (!file.ok()) continue;
    for (const std::string& name : (*file)->names()) {
      const HostTensor& tensor = *(*file)->Find(name);
      uint64_t sum = 0;
      for (int64_t j = 0; j < tensor.bytes; ++j) sum += tensor.data[j];
      EXPECT_GE(sum, 0u);
    }
  }
}

}  // namespace
}  // namespace millrace
