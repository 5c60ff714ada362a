// SPDX-License-Identifier: Apache-2.0
// Reads one safetensors file without trusting it.
//
// Layout: 8 bytes header length (little endian), a JSON table {name: {dtype, shape, data_offsets}}, then the data. The
// header is read and checked before anything is mapped, every product and sum is overflow-checked, and the tensors must
// tile the data exactly: a byte that belongs to no tensor, or to two, could make one file mean two things.
#include <sys/types.h>

#include <unistd.h>
#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/absl_view.h"
#include "engine/model/checkpoint.h"
#include "engine/model/mapped_file.h"
#include "engine/status.h"
#include "engine/strict_json.h"

namespace millrace {
namespace {

static_assert(std::endian::native == std::endian::little, "tensors are little endian in the file and read in place");

constexpr int64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr size_t kMaxTensors = size_t{1} << 18;   // Pro has 145,116 in 64 files
constexpr size_t kMaxNameBytes = 256;
constexpr size_t kMaxDims = 8;

struct DTypeInfo {
  DType dtype;
  absl::string_view name;
  int size;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::kF32, "F32", 4}, {DType::kBF16, "BF16", 2},      {DType::kF16, "F16", 2},
    {DType::kI64, "I64", 8}, {DType::kI32, "I32", 4},        {DType::kI8, "I8", 1},
    {DType::kU8, "U8", 1},   {DType::kF8E4M3, "F8_E4M3", 1}, {DType::kF8E8M0, "F8_E8M0", 1},
};

const DTypeInfo& Info(DType dtype) {
  for (const DTypeInfo& info : kDTypes) {
    if (info.dtype == dtype) return info;
  }
  CHECK(false, absl::StrCat("dtype ", static_cast<int>(dtype)));
}

struct Entry {
  std::string name;
  std::string dtype;
  std::vector<uint64_t> shape;
  std::vector<uint64_t> offsets;
  bool has_dtype = false, has_shape = false, has_offsets = false;
};

// The header's JSON as events: depth 1 names, depth 2 a tensor's three keys (or metadata), depth 3 their arrays.
class HeaderHandler final : public StrictSaxHandler {
 public:
  HeaderHandler()
      : StrictSaxHandler({.max_depth = 4,
                          .max_values = static_cast<int64_t>(kMaxTensors) * (8 + kMaxDims),
                          .max_string_bytes = size_t{1} << 20}) {}
  std::vector<Entry>& entries() { return entries_; }

  bool start_object(size_t) override {
    if (depth_ == 1 || depth_ == 0) return ++depth_, Enter();
    return Bad("an object");
  }
  bool end_object() override {
    if (depth_ == 2 && !in_metadata_) {
      const Entry& entry = entries_.back();
      if (!entry.has_offsets) return Bad("no data_offsets", "data_offsets");
      if (!entry.has_dtype) return Bad("no dtype", "dtype");
      if (!entry.has_shape) return Bad("no shape", "shape");
    }
    if (--depth_ == 1) in_metadata_ = false;
    return Leave();
  }
  bool key(string_t& name) override {
    if (!Count(name.size())) return false;
    if (depth_ == 1) return NewTensor(name);
    if (in_metadata_) return true;
    key_ = name;
    Entry& entry = entries_.back();
    bool* seen = key_ == "dtype"          ? &entry.has_dtype
                 : key_ == "shape"        ? &entry.has_shape
                 : key_ == "data_offsets" ? &entry.has_offsets
                                          : nullptr;
    if (seen == nullptr) return Bad(absl::StrCat("key \"", key_.substr(0, 64), "\""), "");
    if (*seen) return Bad("the key twice");
    *seen = true;
    return true;
  }
  bool string(string_t& value) override {
    if (!Count(value.size())) return false;
    if (depth_ == 2 && in_metadata_) return true;
    if (depth_ != 2 || key_ != "dtype") return Bad("a string");
    entries_.back().dtype = value;
    return true;
  }
  bool start_array(size_t) override {
    if (depth_ != 2 || in_metadata_ || key_ == "dtype") return Bad("an array");
    return ++depth_, Enter();
  }
  bool end_array() override { return --depth_, Leave(); }
  bool number_unsigned(number_unsigned_t value) override {
    if (!Count()) return false;
    if (depth_ != 3) return Bad("a number");
    Entry& entry = entries_.back();
    std::vector<uint64_t>& list = key_ == "shape" ? entry.shape : entry.offsets;
    if (list.size() == kMaxDims) return Bad(absl::StrCat("more than ", kMaxDims, " numbers"));
    list.push_back(value);
    return true;
  }
  bool null() override { return Bad("null"); }
  bool boolean(bool) override { return Bad("a boolean"); }
  bool number_integer(number_integer_t value) override { return Bad(absl::StrCat(value)); }
  bool number_float(number_float_t, const string_t& text) override { return Bad(text.substr(0, 40)); }

 private:
  bool NewTensor(const std::string& name) {
    if (name == "__metadata__") {
      if (has_metadata_) return Fail("found __metadata__ twice, expected once");
      return has_metadata_ = in_metadata_ = true;
    }
    if (name.size() > kMaxNameBytes) {
      return Fail(absl::StrCat("tensor name: found ", name.size(), " bytes, expected at most ", kMaxNameBytes));
    }
    if (name.empty()) return Fail("tensor name: found nothing, expected 1 to 256 bytes");
    for (const char c : name) {
      if (static_cast<unsigned char>(c) < 0x20) return Fail("tensor name: found a control character");
    }
    if (entries_.size() == kMaxTensors) return Fail(absl::StrCat("found more than ", kMaxTensors, " tensors"));
    entries_.push_back({.name = name});
    key_.clear();
    return true;
  }
  bool Bad(const std::string& found) { return Bad(found, key_); }
  bool Bad(const std::string& found, absl::string_view key) {
    if (in_metadata_) return Fail(absl::StrCat("__metadata__: found ", found, ", expected strings only"));
    if (entries_.empty() || depth_ <= 1) return Fail(absl::StrCat("found ", found, ", expected an object of tensors"));
    const std::string& name = entries_.back().name;
    if (key == "data_offsets") {
      return Fail(absl::StrCat("invalid offset for tensor ", name, ": found ", found, ", expected [begin, end]"));
    }
    const absl::string_view expected = key == "shape"   ? "an array of sizes"
                                       : key == "dtype" ? "a dtype name"
                                                        : "dtype, shape and data_offsets";
    return Fail(
        absl::StrCat("tensor ", name, ": ", key, key.empty() ? "" : ": ", "found ", found, ", expected ", expected));
  }

  std::vector<Entry> entries_;
  std::string key_;
  int depth_ = 0;
  bool in_metadata_ = false, has_metadata_ = false;
};

// A tensor's place in the data, proven not to overflow and to have the size that its shape says.
struct Placed {
  int64_t begin, end;
  size_t index;
};

std::string ShapeText(const std::vector<uint64_t>& shape) { return absl::StrCat("[", absl::StrJoin(shape, ", "), "]"); }

absl::StatusOr<HostTensor> CheckEntry(const std::string& file, const Entry& entry, Placed& placed) {
  const auto error = [&](auto... parts) { return absl::InvalidArgumentError(absl::StrCat(file, ": ", parts...)); };
  HostTensor tensor;
  const auto* info =
      std::find_if(std::begin(kDTypes), std::end(kDTypes), [&](const DTypeInfo& i) { return i.name == entry.dtype; });
  if (info == std::end(kDTypes)) {
    return error(
        "tensor ", entry.name, ": dtype: found ", entry.dtype.substr(0, 32), ", expected one of ",
        absl::StrJoin(kDTypes, " ", [](std::string* out, const DTypeInfo& i) { absl::StrAppend(out, i.name); }));
  }
  tensor.dtype = info->dtype;
  uint64_t bytes = static_cast<uint64_t>(info->size);
  for (const uint64_t dim : entry.shape) {
    if (__builtin_mul_overflow(bytes, dim, &bytes) || bytes > static_cast<uint64_t>(INT64_MAX) ||
        dim > static_cast<uint64_t>(INT64_MAX)) {
      return error("tensor ", entry.name, ": overflow computing size: found shape ", ShapeText(entry.shape),
                   ", expected less than 2^63 bytes");
    }
    tensor.shape.push_back(static_cast<int64_t>(dim));
  }
  if (entry.offsets.size() != 2) {
    return error("invalid offset for tensor ", entry.name, ": found ", entry.offsets.size(),
                 " numbers in data_offsets, expected [begin, end]");
  }
  const uint64_t begin = entry.offsets[0], end = entry.offsets[1];
  if (end < begin || end > static_cast<uint64_t>(INT64_MAX)) {
    return error("invalid offset for tensor ", entry.name, ": found [", begin, ", ", end,
                 "], expected begin <= end < 2^63");
  }
  if (end - begin != bytes) {
    return error("tensor ", entry.name, ": tensor size mismatch: found ", end - begin, " bytes, expected ", bytes,
                 " for ", info->name, " ", ShapeText(entry.shape));
  }
  tensor.bytes = static_cast<int64_t>(bytes);
  placed.begin = static_cast<int64_t>(begin);
  placed.end = static_cast<int64_t>(end);
  return tensor;
}

absl::Status CheckTiling(const std::string& file, const std::vector<Entry>& entries, std::vector<Placed> order,
                         int64_t data_bytes) {
  std::sort(order.begin(), order.end(),
            [](const Placed& a, const Placed& b) { return std::pair(a.begin, a.end) < std::pair(b.begin, b.end); });
  int64_t at = 0;
  for (const Placed& placed : order) {
    if (placed.begin != at) {
      return absl::InvalidArgumentError(absl::StrCat(file, ": offsets must tile the buffer: found tensor ",
                                                     entries[placed.index].name, " at ", placed.begin, ", expected ",
                                                     at));
    }
    at = placed.end;
  }
  if (at > data_bytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(file, ": file size: found ", data_bytes, " bytes of tensor data, expected ", at,
                     " (truncated, or an invalid offset for tensor ", entries[order.back().index].name, ")"));
  }
  if (at < data_bytes) {
    return absl::InvalidArgumentError(absl::StrCat(file, ": offsets must tile the buffer: found ", data_bytes - at,
                                                   " bytes after the last tensor, expected 0"));
  }
  return absl::OkStatus();
}

// What a file that is not safetensors most likely is. Only asked once its header length made no sense: the formats'
// magic numbers are legal (if absurd) header lengths.
absl::Status InvalidLengthOrOtherFormat(const std::string& file, const char (&head)[8], uint64_t length, int64_t size) {
  const absl::string_view bytes(head, sizeof(head));
  const char* format = absl::StartsWith(bytes, "GGUF")         ? "GGUF"
                       : absl::StartsWith(bytes, "PK\x03\x04") ? "a zip archive (PyTorch)"
                       : absl::StartsWith(bytes, "\x80\x02") || absl::StartsWith(bytes, "\x80\x04") ? "a Python pickle"
                                                                                                    : nullptr;
  if (format != nullptr) {
    return absl::UnimplementedError(
        absl::StrCat(file, ": unsupported format: found ", format, ", expected safetensors"));
  }
  return absl::InvalidArgumentError(absl::StrCat(file, ": invalid header length: found ", length, ", expected 2 to ",
                                                 std::min(kMaxHeaderBytes, std::max<int64_t>(size - 8, 2))));
}

absl::Status ReadExactly(const ScopedFd& fd, const std::string& file, char* out, int64_t bytes, int64_t offset) {
  while (bytes > 0) {
    const ssize_t n = pread(fd.get(), out, static_cast<size_t>(bytes), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return ErrnoStatus(errno, file, "read header");
    if (n == 0)
      return absl::DataLossError(
          absl::StrCat(file, ": file size: found ", offset, " bytes, expected more (shrank while reading)"));
    out += n;
    offset += n;
    bytes -= n;
  }
  return absl::OkStatus();
}

}  // namespace

int DTypeSize(DType dtype) { return Info(dtype).size; }
std::string_view DTypeName(DType dtype) { return {Info(dtype).name.data(), Info(dtype).name.size()}; }

int64_t HostTensor::elements() const {
  int64_t n = 1;
  for (const int64_t dim : shape) n *= dim;
  return n;
}

SafetensorsFile::SafetensorsFile() = default;
SafetensorsFile::~SafetensorsFile() = default;

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(ScopedFd fd, OpenRegularFile(path));
  return OpenFd(std::move(fd), path, path);
}

absl::StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::OpenFd(ScopedFd fd, const std::string& name,
                                                                         const std::string& path) {
  ASSIGN_OR_RETURN(const int64_t size, FileSize(fd, name));
  if (size < 10) {
    return absl::InvalidArgumentError(
        absl::StrCat(name, ": header too small: found a file of ", size, " bytes, expected at least 10"));
  }
  char head[8];
  RETURN_IF_ERROR(ReadExactly(fd, name, head, sizeof(head), 0));
  uint64_t length;
  std::memcpy(&length, head, sizeof(length));
  if (length < 2 || length > static_cast<uint64_t>(kMaxHeaderBytes) || length > static_cast<uint64_t>(size) - 8) {
    return InvalidLengthOrOtherFormat(name, head, length, size);
  }
  std::string text(length, '\0');
  RETURN_IF_ERROR(ReadExactly(fd, name, text.data(), static_cast<int64_t>(length), 8));
  if (text[0] != '{') {
    return absl::InvalidArgumentError(absl::StrCat(name, ": invalid header at offset 0: found byte ",
                                                   static_cast<uint8_t>(text[0]), ", expected '{'"));
  }
  HeaderHandler header;
  RETURN_IF_ERROR(ParseJsonEvents(text, name, "header", header));

  const std::vector<Entry>& entries = header.entries();
  std::unique_ptr<SafetensorsFile> file(new SafetensorsFile);
  file->name_ = name;
  file->tensors_.reserve(entries.size());
  std::vector<Placed> placed(entries.size());
  for (size_t i = 0; i < entries.size(); ++i) {
    placed[i].index = i;
    ASSIGN_OR_RETURN(HostTensor tensor, CheckEntry(name, entries[i], placed[i]));
    if (!file->tensors_.emplace(entries[i].name, std::move(tensor)).second) {
      return absl::InvalidArgumentError(
          absl::StrCat(name, ": duplicate tensor ", entries[i].name, ": found twice, expected once"));
    }
  }
  const int64_t data_at = 8 + static_cast<int64_t>(length);
  RETURN_IF_ERROR(CheckTiling(name, entries, placed, size - data_at));

  ASSIGN_OR_RETURN(file->map_, MappedFile::Map(fd, size, path));
  std::sort(placed.begin(), placed.end(),
            [](const Placed& a, const Placed& b) { return std::pair(a.begin, a.index) < std::pair(b.begin, b.index); });
  for (const Placed& p : placed) {
    file->tensors_.at(entries[p.index].name).data = file->map_->data() + data_at + p.begin;
    file->names_.push_back(entries[p.index].name);
  }
  return file;
}

const HostTensor* SafetensorsFile::Find(std::string_view name) const {
  const auto it = tensors_.find(AbslView(name));
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace millrace
