// SPDX-License-Identifier: Apache-2.0
// Three passes: added tokens cut the text, three fixed patterns cut the rest into pieces, byte-pair merges join the
// bytes of each piece. Loading (tokenizer_file.cc) has checked everything that Encode relies on.
#include "engine/text/tokenizer.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <functional>
#include <utility>

#include "absl/status/status.h"
#include "engine/status.h"
#include "engine/text/concat.h"
#include "engine/text/tokenizer_file.h"
#include "engine/text/utf8.h"

namespace millrace::text {
namespace {

// Offsets are 32 bits inside a text.
constexpr size_t kMaxTextBytes = size_t{1} << 30;

// The released patterns as PCRE2 reads them. \s is spelt out because PCRE2's holds U+180E and Oniguruma's does not.
#define MILLRACE_SPACE R"(\t-\r\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})"
constexpr const char* kPatterns[] = {
    R"(\p{N}{1,3})",
    R"([\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+)",
    R"([!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+)"
    R"(|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+)"
    R"(| ?[\p{P}\p{S}]+[\r\n]*)"
    "|[" MILLRACE_SPACE
    "]*[\\r\\n]+"
    "|[" MILLRACE_SPACE "]+(?![^" MILLRACE_SPACE
    "])"
    "|[" MILLRACE_SPACE "]+",
};
#undef MILLRACE_SPACE

struct CodeDeleter {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
};
struct MatchDataDeleter {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};
struct MatchContextDeleter {
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
};
using Regex = std::unique_ptr<pcre2_code, CodeDeleter>;

Regex CompilePattern(const char* pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  Regex regex(pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern), PCRE2_ZERO_TERMINATED, PCRE2_UTF | PCRE2_UCP, &error,
                            &offset, nullptr));
  CHECK(regex != nullptr, Concat("pattern error ", error, " at ", offset));
  // Without JIT (an unusual build of PCRE2, or a host that forbids writable code) matching is slower, not different.
  pcre2_jit_compile(regex.get(), PCRE2_JIT_COMPLETE);
  return regex;
}

// Where a piece of the text lies.
struct Piece {
  uint32_t begin;
  uint32_t length;
};

// Merges of pairs of ids, in one flat table: most time in Encode is spent here.
class MergeTable {
 public:
  static constexpr uint32_t kNoMerge = 0xFFFFFFFF;
  struct Entry {
    uint64_t pair = ~uint64_t{0};
    uint32_t rank = kNoMerge;
    int32_t id = -1;
  };

  explicit MergeTable(const std::vector<MergeRule>& merges) {
    size_t capacity = 16;
    while (capacity < 2 * merges.size()) capacity *= 2;  // at most half full, so that probes stay short
    entries_.resize(capacity);
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      const uint64_t pair = Pair(merges[rank].left, merges[rank].right);
      size_t slot = Slot(pair);
      while (entries_[slot].rank != kNoMerge) slot = (slot + 1) & (entries_.size() - 1);
      entries_[slot] = {pair, static_cast<uint32_t>(rank), merges[rank].result};
    }
  }

  // The entry of a pair, or one with kNoMerge.
  const Entry& Find(int32_t left, int32_t right) const {
    const uint64_t pair = Pair(left, right);
    size_t slot = Slot(pair);
    while (entries_[slot].pair != pair && entries_[slot].rank != kNoMerge) slot = (slot + 1) & (entries_.size() - 1);
    return entries_[slot];
  }

 private:
  static uint64_t Pair(int32_t left, int32_t right) {
    return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
  }
  size_t Slot(uint64_t pair) const { return (pair * 0x9E3779B97F4A7C15u >> 20) & (entries_.size() - 1); }

  std::vector<Entry> entries_;
};

// Leftmost-longest search for a set of strings. Steps are bounded by the text times the longest string.
class AddedTokenFinder {
 public:
  AddedTokenFinder() : nodes_(1) {}

  void Add(std::string_view content, int32_t id) {
    int32_t node = 0;
    for (const char c : content) {
      auto [child, inserted] =
          children_.try_emplace(uint64_t{static_cast<uint32_t>(node)} << 8 | static_cast<uint8_t>(c), 0);
      if (inserted) {
        child->second = static_cast<int32_t>(nodes_.size());
        nodes_.push_back(-1);
      }
      node = child->second;
    }
    nodes_[node] = id;
    starts_[static_cast<uint8_t>(content[0])] = true;
  }

  // The next added token in `text` from `from`, or false.
  bool Find(std::string_view text, size_t from, Piece& found, int32_t& id) const {
    for (size_t begin = from; begin < text.size(); ++begin) {
      if (!starts_[static_cast<uint8_t>(text[begin])]) continue;
      int32_t node = 0;
      size_t length = 0;
      for (size_t i = begin; i < text.size(); ++i) {
        const auto child = children_.find(uint64_t{static_cast<uint32_t>(node)} << 8 | static_cast<uint8_t>(text[i]));
        if (child == children_.end()) break;
        node = child->second;
        if (nodes_[node] < 0) continue;
        id = nodes_[node];
        length = i + 1 - begin;
      }
      if (length == 0) continue;
      found = {static_cast<uint32_t>(begin), static_cast<uint32_t>(length)};
      return true;
    }
    return false;
  }

 private:
  std::vector<int32_t> nodes_;  // the token that ends at a node, or -1
  absl::flat_hash_map<uint64_t, int32_t> children_;
  bool starts_[256] = {};
};

// The working memory of one Encode call.
struct Scratch {
  std::unique_ptr<pcre2_match_data, MatchDataDeleter> match;
  std::unique_ptr<pcre2_match_context, MatchContextDeleter> limits;
  std::vector<Piece> pieces, finer;
  std::vector<int32_t> ids, previous, next;
  std::vector<uint32_t> ranks;
  std::vector<uint64_t> heap;
  EncodeWork work;
};

}  // namespace

struct Tokenizer::Impl {
  explicit Impl(TokenizerFile loaded) : file(std::move(loaded)), merges(file.merges) {
    for (int i = 0; i < 3; ++i) regexes[i] = CompilePattern(kPatterns[i]);
    for (const AddedToken& token : file.added)
      (token.normalized ? late_added : early_added).Add(token.content, token.id);
  }

  // Appends the ids of `text` between two added tokens.
  absl::Status EncodePlain(std::string_view text, Scratch& scratch, std::vector<int32_t>& out) const;
  // Replaces scratch.pieces by what `regex` makes of each: matches and the gaps between them.
  absl::Status Split(const pcre2_code* regex, std::string_view text, Scratch& scratch) const;
  void Merge(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const;
  void MergeShort(Scratch& scratch, std::vector<int32_t>& out) const;
  void MergeLong(Scratch& scratch, std::vector<int32_t>& out) const;

  TokenizerFile file;
  MergeTable merges;
  Regex regexes[3];
  // Tokens marked `normalized` are looked for after the others, in what those leave.
  AddedTokenFinder early_added, late_added;
};

absl::Status Tokenizer::Impl::EncodePlain(std::string_view text, Scratch& scratch, std::vector<int32_t>& out) const {
  if (text.empty()) return absl::OkStatus();
  scratch.pieces.assign(1, {0, static_cast<uint32_t>(text.size())});
  for (const Regex& regex : regexes) RETURN_IF_ERROR(Split(regex.get(), text, scratch));
  for (const Piece& piece : scratch.pieces) Merge(text.substr(piece.begin, piece.length), scratch, out);
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::Split(const pcre2_code* regex, std::string_view text, Scratch& scratch) const {
  scratch.finer.clear();
  for (const Piece& piece : scratch.pieces) {
    // The subject is the piece alone: a lookahead must not see what an earlier pattern cut off.
    const auto subject = reinterpret_cast<PCRE2_SPTR>(text.data() + piece.begin);
    uint32_t at = 0;
    while (at < piece.length) {
      const int found =
          pcre2_match(regex, subject, piece.length, at, PCRE2_NO_UTF_CHECK, scratch.match.get(), scratch.limits.get());
      ++scratch.work.regex_matches;
      if (found == PCRE2_ERROR_NOMATCH) {
        scratch.work.regex_bytes += piece.length - at;
        break;
      }
      if (found < 0) return absl::ResourceExhaustedError(Concat("tokenizer: PCRE2 error ", found, " at byte ", at));
      const PCRE2_SIZE* range = pcre2_get_ovector_pointer(scratch.match.get());
      const auto begin = static_cast<uint32_t>(range[0]), end = static_cast<uint32_t>(range[1]);
      CHECK(begin >= at && end > begin);
      scratch.work.regex_bytes += end - at;
      if (begin > at) scratch.finer.push_back({piece.begin + at, begin - at});
      scratch.finer.push_back({piece.begin + begin, end - begin});
      at = end;
    }
    if (at < piece.length) scratch.finer.push_back({piece.begin + at, piece.length - at});
  }
  std::swap(scratch.pieces, scratch.finer);
  return absl::OkStatus();
}

void Tokenizer::Impl::Merge(std::string_view piece, Scratch& scratch, std::vector<int32_t>& out) const {
  // Up to here a quadratic scan beats the heap; almost every piece of real text is shorter.
  constexpr size_t kShortPiece = 32;
  scratch.ids.clear();
  for (const char c : piece) scratch.ids.push_back(file.byte_ids[static_cast<uint8_t>(c)]);
  if (piece.size() == 1) {
    out.push_back(scratch.ids[0]);
  } else if (piece.size() <= kShortPiece) {
    MergeShort(scratch, out);
  } else {
    MergeLong(scratch, out);
  }
}

// Repeatedly merges the leftmost pair of lowest rank. ranks[i] belongs to the pair (i, i+1).
void Tokenizer::Impl::MergeShort(Scratch& scratch, std::vector<int32_t>& out) const {
  std::vector<int32_t>& ids = scratch.ids;
  std::vector<uint32_t>& ranks = scratch.ranks;
  const auto rank_at = [&](size_t i) { return merges.Find(ids[i], ids[i + 1]).rank; };
  ranks.clear();
  for (size_t i = 0; i + 1 < ids.size(); ++i) ranks.push_back(rank_at(i));
  while (!ranks.empty()) {
    const size_t best = std::min_element(ranks.begin(), ranks.end()) - ranks.begin();
    scratch.work.merge_steps += static_cast<int64_t>(ranks.size());
    if (ranks[best] == MergeTable::kNoMerge) break;
    ids[best] = merges.Find(ids[best], ids[best + 1]).id;
    ids.erase(ids.begin() + best + 1);
    ranks.erase(ranks.begin() + best);
    if (best < ranks.size()) ranks[best] = rank_at(best);
    if (best > 0) ranks[best - 1] = rank_at(best - 1);
  }
  out.insert(out.end(), ids.begin(), ids.end());
}

// The same order with a heap of (rank, position) over a linked list. A heap entry is stale when its rank is no longer
// the rank of the pair at its position; each merge adds at most two entries, so the heap sees at most 3n.
void Tokenizer::Impl::MergeLong(Scratch& scratch, std::vector<int32_t>& out) const {
  const auto n = static_cast<int32_t>(scratch.ids.size());
  std::vector<int32_t>&ids = scratch.ids, &previous = scratch.previous, &next = scratch.next;
  std::vector<uint32_t>& ranks = scratch.ranks;
  std::vector<uint64_t>& heap = scratch.heap;
  const auto key = [](uint32_t rank, int32_t at) { return uint64_t{rank} << 32 | static_cast<uint32_t>(at); };
  previous.resize(n);
  next.resize(n);
  ranks.assign(n, MergeTable::kNoMerge);
  heap.clear();
  for (int32_t i = 0; i < n; ++i) {
    previous[i] = i - 1;
    next[i] = i + 1;
    if (i + 1 == n) break;
    ranks[i] = merges.Find(ids[i], ids[i + 1]).rank;
    if (ranks[i] != MergeTable::kNoMerge) heap.push_back(key(ranks[i], i));
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  const auto refresh = [&](int32_t at) {
    ranks[at] = next[at] < n ? merges.Find(ids[at], ids[next[at]]).rank : MergeTable::kNoMerge;
    if (ranks[at] == MergeTable::kNoMerge) return;
    heap.push_back(key(ranks[at], at));
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  };
  while (!heap.empty()) {
    const uint64_t top = heap.front();
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.pop_back();
    ++scratch.work.merge_steps;
    const auto left = static_cast<int32_t>(top & 0xFFFFFFFF);
    if (ranks[left] != static_cast<uint32_t>(top >> 32)) continue;
    const int32_t right = next[left];
    ids[left] = merges.Find(ids[left], ids[right]).id;
    ranks[right] = MergeTable::kNoMerge;
    next[left] = next[right];
    if (next[left] < n) previous[next[left]] = left;
    refresh(left);
    if (previous[left] >= 0) refresh(previous[left]);
  }
  for (int32_t i = 0; i < n; i = next[i]) out.push_back(ids[i]);
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path, int vocab_size) {
  ASSIGN_OR_RETURN(std::string json, ReadTokenizerFile(path, vocab_size));
  return Parse(json, vocab_size);
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json, int vocab_size) {
  ASSIGN_OR_RETURN(TokenizerFile file, ParseTokenizerFile(json, vocab_size));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::make_unique<Impl>(std::move(file))));
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, SpecialTokens special,
                                                       EncodeWork* work) const {
  if (text.size() > kMaxTextBytes) {
    return absl::InvalidArgumentError(Concat("text: found ", text.size(), " bytes, expected at most ", kMaxTextBytes));
  }
  std::string repaired;
  if (!IsValidUtf8(text)) {
    repaired = RepairUtf8(text);
    if (repaired.size() > kMaxTextBytes) return absl::InvalidArgumentError("text: too long once its UTF-8 is repaired");
    text = repaired;
  }
  Scratch scratch;
  scratch.match.reset(pcre2_match_data_create(1, nullptr));
  scratch.limits.reset(pcre2_match_context_create(nullptr));
  // No pattern tries a byte more than a few times before it advances; 32 a byte is a bound, not an allowance.
  pcre2_set_match_limit(scratch.limits.get(),
                        static_cast<uint32_t>(std::min<size_t>(1000 + 32 * text.size(), UINT32_MAX)));

  std::vector<int32_t> out;
  const auto plain = [&](std::string_view part) { return impl_->EncodePlain(part, scratch, out); };
  // Calls `between` for what lies between the tokens that `finder` knows, and appends those tokens.
  const auto cut = [&](const AddedTokenFinder& finder, std::string_view part, const auto& between) -> absl::Status {
    size_t at = 0;
    Piece found;
    int32_t id = -1;
    while (finder.Find(part, at, found, id)) {
      RETURN_IF_ERROR(between(part.substr(at, found.begin - at)));
      out.push_back(id);
      at = found.begin + found.length;
    }
    return between(part.substr(at));
  };
  if (special == SpecialTokens::kPlain) {
    RETURN_IF_ERROR(plain(text));
  } else {
    RETURN_IF_ERROR(
        cut(impl_->early_added, text, [&](std::string_view part) { return cut(impl_->late_added, part, plain); }));
  }
  if (work != nullptr) {
    work->regex_matches += scratch.work.regex_matches;
    work->regex_bytes += scratch.work.regex_bytes;
    work->merge_steps += scratch.work.merge_steps;
  }
  return out;
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return id >= 0 && id < size() ? std::string_view(impl_->file.bytes[id]) : std::string_view();
}

bool Tokenizer::IsSpecial(int32_t id) const { return id >= 0 && id < size() && impl_->file.special[id]; }
bool Tokenizer::IsAdded(int32_t id) const { return id >= 0 && id < size() && impl_->file.is_added[id]; }

std::string Tokenizer::Decode(absl::Span<const int32_t> ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!(skip_special && IsSpecial(id))) bytes.append(TokenBytes(id));
  }
  return IsValidUtf8(bytes) ? bytes : RepairUtf8(bytes);
}

std::optional<int32_t> Tokenizer::TokenId(std::string_view content) const {
  const auto found = impl_->file.ids.find(AbslView(content));
  if (found == impl_->file.ids.end()) return std::nullopt;
  return found->second;
}

int Tokenizer::size() const { return static_cast<int>(impl_->file.bytes.size()); }
const std::string& Tokenizer::ContentHash() const { return impl_->file.hash; }

}  // namespace millrace::text
