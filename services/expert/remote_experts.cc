// SPDX-License-Identifier: Apache-2.0
// See remote_experts.h. Order: a batch goes out, replies come in, the batch comes back.
#include "services/expert/remote_experts.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "engine/status.h"
#include "services/common/clock.h"
#include "services/common/error.h"
#include "services/common/failpoints.h"

namespace millrace::expert {
namespace {

constexpr int64_t kFewRowsBytes = 8 << 10;  // rows of a decode step of a few sequences: messages that go in one piece

}  // namespace

// One message to one member and its answer. The buffers belong to the batch, which late arrivals keep alive: memory
// that a message may still write is never reused for another batch.
struct RemoteExperts::Piece {
  enum State : int { kWaiting, kArriving, kArrived, kFailed };
  std::shared_ptr<PoolMember> member;
  kvtransfer::PeerId peer;       // where its reply comes from, over the transport
  ExpertHeader header;           // of the request
  std::vector<uint32_t> places;  // of each pair: token * top_k + k
  ExpertHeader reply_header;
  std::vector<uint8_t> reply;
  absl::Status error;  // valid in kFailed
  std::atomic<int> state{kWaiting};
};

struct RemoteExperts::Batch {
  uint64_t number = 0;
  ExpertBatch batch;
  std::vector<std::unique_ptr<Piece>> pieces;
  std::vector<Piece*> arrival_order;  // guarded by the exchange's mutex; what a seeded bug sums by
  std::atomic<int> outstanding{0};
  std::atomic<bool> failed{false};
};

RemoteExperts::RemoteExperts(RemoteExpertsOptions options, kvtransfer::Transport* transport, ChannelPool& channels,
                             ExpertComputer* local)
    : options_(std::move(options)), transport_(options_.pool.over_grpc ? nullptr : transport), local_(local) {
  if (transport_ != nullptr) transport_->SetHandler(kReplyChannel, this);
  pool_ = std::make_unique<ExpertPool>(options_.pool, transport_, channels,
                                       [this](PoolMember* member, absl::string_view frame) { OnFrame(member, frame); });
}

RemoteExperts::~RemoteExperts() {
  pool_.reset();
  if (transport_ != nullptr) transport_->SetHandler(kReplyChannel, nullptr);
}

std::shared_ptr<RemoteExperts::Batch> RemoteExperts::current() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return current_;
}

// --- Out ---

absl::Status RemoteExperts::Dispatch(const ExpertBatch& batch) {
  RETURN_IF_ERROR(failpoints::Hit("x.dispatch"));
  const std::shared_ptr<const PoolTable> table = pool_->table();
  auto next = std::make_shared<Batch>();
  next->number = next_batch_++;
  batches_.fetch_add(1);
  next->batch = batch;
  RETURN_IF_ERROR(SplitByOwner(batch, *table));
  {
    std::lock_guard<std::mutex> lock(mutex_);
    current_ = next;
  }
  absl::Status sent;
  const auto send_waves = [&] { sent = SendWaves(batch); };
  // Few rows travel while the shared expert is computed without waking the transport thread; what is more is worth it.
  if (transport_ != nullptr && batch.num_tokens * RowBytes(options_.format, batch.hidden) <= kFewRowsBytes) {
    transport_->SendAtOnce(send_waves);
  } else {
    send_waves();
  }
  if (!sent.ok()) return FailBatch(sent);
  waves_.clear();  // from here on only the batch refers to members: one that drains can see whether it is done
  return absl::OkStatus();
}

absl::Status RemoteExperts::SendWaves(const ExpertBatch& batch) {
  for (size_t wave = 0; wave < waves_.size(); ++wave) {
    for (const Share& share : waves_[wave]) {
      if (const absl::Status sent = SendPiece(batch, share.member, static_cast<int>(wave), share.by_expert);
          !sent.ok()) {
        return absl::Status(sent.code(),
                            absl::StrCat("expert worker ", share.member->info.name(), ": ", sent.message()));
      }
    }
  }
  return absl::OkStatus();
}

// Who computes which pair. Fills waves_ and own_.
absl::Status RemoteExperts::SplitByOwner(const ExpertBatch& batch, const PoolTable& table) {
  const int num_experts = options_.pool.num_experts;
  std::vector<std::vector<uint32_t>> by_expert(static_cast<size_t>(num_experts));
  for (int64_t i = 0; i < batch.num_tokens * batch.top_k; ++i) {
    const int32_t expert = batch.experts[i];
    CHECK(expert >= 0 && expert < num_experts, absl::StrCat("expert ", expert));
    by_expert[expert].push_back(static_cast<uint32_t>(i));
  }
  waves_.assign(static_cast<size_t>(table.num_waves), {});
  own_.groups.clear();
  own_.places.clear();
  for (int expert = 0; expert < num_experts; ++expert) {
    if (by_expert[expert].empty()) continue;
    if (local_ != nullptr && local_->Has(batch.layer, expert)) {
      own_.groups.push_back({static_cast<uint32_t>(expert), static_cast<uint32_t>(by_expert[expert].size())});
      own_.places.insert(own_.places.end(), by_expert[expert].begin(), by_expert[expert].end());
      continue;
    }
    const PoolTable::Owner& owner = table.owners[expert];
    if (owner.member == nullptr || !owner.member->usable.load()) {
      const absl::Status why = pool_->Ready();
      return absl::UnavailableError(why.ok() ? absl::StrCat("expert ", expert, " has just been lost")
                                             : std::string(why.message()));
    }
    std::vector<Share>& wave = waves_[owner.wave];
    auto share = std::find_if(wave.begin(), wave.end(), [&](const Share& s) { return s.member == owner.member; });
    if (share == wave.end()) share = wave.insert(wave.end(), Share{owner.member, {}});
    share->by_expert.emplace_back(expert, std::move(by_expert[expert]));
  }
  return absl::OkStatus();
}

// Sends one member's share of one wave, cut where a message would grow too large.
absl::Status RemoteExperts::SendPiece(const ExpertBatch& batch, const std::shared_ptr<PoolMember>& member, int wave,
                                      const std::vector<std::pair<int, std::vector<uint32_t>>>& experts) {
  const int64_t row_bytes = RowBytes(options_.format, batch.hidden);
  const int64_t max_pairs = std::max<int64_t>(1, kPieceBytes / row_bytes);
  const std::shared_ptr<Batch> open = current();
  size_t expert_at = 0, pair_at = 0;
  while (expert_at < experts.size()) {
    auto piece = std::make_unique<Piece>();
    std::vector<uint32_t> ids;     // {id, count}
    std::vector<uint32_t> tokens;  // rows of the message, by first use
    std::vector<uint32_t> pair_rows;
    std::vector<float> weights;
    row_of_token_.assign(static_cast<size_t>(batch.num_tokens), -1);
    while (expert_at < experts.size() && static_cast<int64_t>(piece->places.size()) < max_pairs) {
      const auto& [expert, places] = experts[expert_at];
      const size_t take = std::min<size_t>(places.size() - pair_at, max_pairs - piece->places.size());
      for (size_t i = pair_at; i < pair_at + take; ++i) {
        const uint32_t token = places[i] / static_cast<uint32_t>(batch.top_k);
        if (row_of_token_[token] < 0) {
          row_of_token_[token] = static_cast<int32_t>(tokens.size());
          tokens.push_back(token);
        }
        piece->places.push_back(places[i]);
        pair_rows.push_back(static_cast<uint32_t>(row_of_token_[token]));
        weights.push_back(batch.weights[places[i]]);
      }
      ids.push_back(static_cast<uint32_t>(expert));
      ids.push_back(static_cast<uint32_t>(take));
      pair_at += take;
      if (pair_at == places.size()) {
        ++expert_at;
        pair_at = 0;
      }
    }
    ExpertHeader& header = piece->header;
    header.format = options_.format;
    header.caller_high = options_.pool.incarnation.high;
    header.caller_low = options_.pool.incarnation.low;
    header.batch = open->number;
    header.piece = static_cast<uint32_t>(open->pieces.size());
    header.wave = static_cast<uint32_t>(wave);
    header.layer = static_cast<uint32_t>(batch.layer);
    header.hidden = static_cast<uint32_t>(batch.hidden);
    header.num_experts = static_cast<uint32_t>(ids.size() / 2);
    header.num_rows = static_cast<uint32_t>(tokens.size());
    header.num_pairs = static_cast<uint32_t>(piece->places.size());
    auto payload = std::make_shared<std::vector<uint8_t>>(RequestBytes(header));
    uint8_t* out = payload->data();
    const auto put = [&out](const auto& values) {
      std::memcpy(out, values.data(), values.size() * sizeof(values[0]));
      out += values.size() * sizeof(values[0]);
    };
    put(ids);
    put(pair_rows);
    put(weights);
    for (uint32_t token : tokens) {
      ConvertRow(static_cast<const uint8_t*>(batch.rows) + token * RowBytes(batch.format, batch.hidden), batch.format,
                 batch.hidden, options_.format, out);
      out += row_bytes;
    }
    SealHeader(header, *payload);
    piece->member = member;
    piece->reply.resize(static_cast<size_t>(header.num_pairs * row_bytes));
    const ExpertHeader sent = header;
    const std::shared_ptr<ExpertLink> link = member->link();
    if (link == nullptr) return absl::UnavailableError("not connected");
    piece->peer = link->peer();
    {
      // Replies look pieces up while later ones are still being added.
      std::lock_guard<std::mutex> lock(mutex_);
      open->pieces.push_back(std::move(piece));
      open->outstanding.fetch_add(1);
    }
    pieces_.fetch_add(1);
    bytes_sent_.fetch_add(payload->size());
    RETURN_IF_ERROR(link->Send(sent, std::move(payload)));
  }
  return absl::OkStatus();
}

// --- In ---

RemoteExperts::Piece* RemoteExperts::Claim(const std::shared_ptr<Batch>& batch, const ExpertHeader& header,
                                           const PoolMember* member, kvtransfer::PeerId from, const char** reason) {
  *reason = "stale_batch";
  if (batch == nullptr || header.batch != batch->number || header.caller() != options_.pool.incarnation) return nullptr;
  std::lock_guard<std::mutex> lock(mutex_);
  *reason = "unknown_piece";
  if (header.piece >= batch->pieces.size()) return nullptr;
  Piece& piece = *batch->pieces[header.piece];
  *reason = "wrong_member";
  if (member != nullptr ? member != piece.member.get() : piece.peer != from) return nullptr;
  const ExpertHeader& asked = piece.header;
  *reason = "wrong_shape";
  if (header.layer != asked.layer || header.wave != asked.wave || header.hidden != asked.hidden ||
      header.format != asked.format || header.num_pairs != asked.num_pairs || header.num_rows != asked.num_rows) {
    return nullptr;
  }
  *reason = "duplicate";
  int expected = Piece::kWaiting;
  if (!piece.state.compare_exchange_strong(expected, Piece::kArriving)) return nullptr;
  if (header.kind == MessageKind::kError) piece.reply.resize(header.payload_bytes);
  piece.reply_header = header;
  return &piece;
}

kvtransfer::Placement RemoteExperts::OnMessage(const kvtransfer::IncomingMessage& message) {
  const auto header = DecodeHeader(message.header);
  if (!header.ok() || header->kind == MessageKind::kRequest || header->payload_bytes != message.payload_bytes) {
    dropped_.fetch_add(1);
    return kvtransfer::Placement::Drop("bad_header");
  }
  const std::shared_ptr<Batch> batch = current();
  const char* reason = "";
  Piece* const piece = Claim(batch, *header, nullptr, message.from, &reason);
  if (piece == nullptr) {
    dropped_.fetch_add(1);
    return kvtransfer::Placement::Drop(reason);
  }
  const auto finish = [this, batch, piece](const absl::Status& status) {
    if (!status.ok()) {
      piece->error = status;
      batch->failed.store(true);
    }
    {
      std::lock_guard<std::mutex> lock(mutex_);
      batch->arrival_order.push_back(piece);
    }
    piece->state.store(status.ok() ? Piece::kArrived : Piece::kFailed);
    bytes_received_.fetch_add(piece->reply.size());
    batch->outstanding.fetch_sub(1);
  };
  if (message.payload.size() == message.payload_bytes) {
    std::memcpy(piece->reply.data(), message.payload.data(), message.payload_bytes);
    finish(absl::OkStatus());
    return kvtransfer::Placement::Consumed();
  }
  return kvtransfer::Placement::Into({piece->reply.data(), piece->reply.size()}, finish);
}

void RemoteExperts::OnFrame(PoolMember* member, absl::string_view frame) {
  const absl::Span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(frame.data()), frame.size());
  const auto header = DecodeHeader(bytes);
  const std::shared_ptr<Batch> batch = current();
  const char* reason = "";
  Piece* piece = nullptr;
  if (header.ok() && header->kind != MessageKind::kRequest &&
      bytes.size() - sizeof(ExpertHeader) == header->payload_bytes) {
    piece = Claim(batch, *header, member, {}, &reason);
  }
  if (piece == nullptr) {
    dropped_.fetch_add(1);
    return;
  }
  std::memcpy(piece->reply.data(), bytes.data() + sizeof(ExpertHeader), piece->reply.size());
  bytes_received_.fetch_add(piece->reply.size());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    batch->arrival_order.push_back(piece);
    piece->state.store(Piece::kArrived);
    batch->outstanding.fetch_sub(1);
  }
  arrived_.notify_all();
}

// --- Back ---

absl::Status RemoteExperts::Combine(void* expert_rows) {
  const std::shared_ptr<Batch> batch = current();
  if (batch == nullptr) return absl::FailedPreconditionError("no batch was dispatched");
  auto* const rows = static_cast<uint8_t*>(expert_rows);
  absl::Status status = ComputeLocal(batch->batch, rows);
  if (status.ok()) {
    const absl::Time began = MonotonicNow();
    status = Await(*batch);
    waited_us_.fetch_add(absl::ToInt64Microseconds(MonotonicNow() - began));
  }
  if (status.ok()) status = Scatter(*batch, rows);
  if (!status.ok()) return FailBatch(status);
  std::lock_guard<std::mutex> lock(mutex_);
  current_ = nullptr;
  return absl::OkStatus();
}

absl::Status RemoteExperts::ComputeLocal(const ExpertBatch& batch, uint8_t* expert_rows) {
  const size_t num_pairs = own_.places.size(), row_bytes = static_cast<size_t>(RowBytes(batch.format, batch.hidden));
  if (num_pairs == 0) return absl::OkStatus();
  own_.rows.resize(num_pairs);
  own_.weights.resize(num_pairs);
  own_.out.resize(num_pairs * row_bytes);
  for (size_t i = 0; i < num_pairs; ++i) {
    own_.rows[i] = own_.places[i] / static_cast<uint32_t>(batch.top_k);
    own_.weights[i] = batch.weights[own_.places[i]];
  }
  RETURN_IF_ERROR(
      local_->Compute({batch.layer, batch.format, batch.rows, own_.groups, own_.rows, own_.weights}, own_.out.data()));
  for (size_t i = 0; i < num_pairs; ++i) {
    std::copy_n(own_.out.begin() + i * row_bytes, row_bytes, expert_rows + own_.places[i] * row_bytes);
  }
  return absl::OkStatus();
}

absl::Status RemoteExperts::Await(Batch& batch) {
  const auto lost = [&batch] {
    return std::any_of(batch.pieces.begin(), batch.pieces.end(), [](const auto& piece) {
      return piece->state.load() != Piece::kArrived && !piece->member->usable.load();
    });
  };
  const auto done = [&] { return batch.outstanding.load() == 0 || batch.failed.load() || lost(); };
  bool in_time;
  if (transport_ != nullptr) {
    in_time = transport_->WaitFor(done, options_.timeout);
  } else {
    // A broken stream marks its member without our lock, so the wait is cut into slices.
    const auto slices = std::max<int64_t>(1, options_.timeout / absl::Milliseconds(10));
    std::unique_lock<std::mutex> lock(mutex_);
    in_time = done();
    for (int64_t i = 0; i < slices && !in_time; ++i) {
      in_time = arrived_.wait_for(lock, std::chrono::milliseconds(10), done);
    }
  }
  if (in_time && batch.outstanding.load() == 0 && !batch.failed.load()) return absl::OkStatus();
  std::vector<std::string> names;
  for (const auto& piece : batch.pieces) {
    if (piece->state.load() == Piece::kArrived) continue;
    if (std::find(names.begin(), names.end(), piece->member->info.name()) == names.end()) {
      names.push_back(piece->member->info.name());
    }
    if (!in_time) pool_->MarkFailed(piece->member.get(), absl::DeadlineExceededError("did not answer in time"));
  }
  const std::string who = absl::StrCat("expert worker ", absl::StrJoin(names, ", "), ", layer ", batch.batch.layer);
  if (!in_time) {
    // Our own timer, not the request's deadline: a status that says so, or the client is told that it asked too late.
    return MakeError(absl::StatusCode::kUnavailable,
                     absl::StrCat(who, ": no answer within ", absl::FormatDuration(options_.timeout)),
                     {.code = "experts_late"});
  }
  for (const auto& piece : batch.pieces) {
    if (piece->state.load() == Piece::kFailed && absl::IsDataLoss(piece->error))
      return absl::UnavailableError(absl::StrCat(who, ": ", piece->error.message()));
  }
  return absl::UnavailableError(absl::StrCat(who, ": lost while its rows were awaited"));
}

absl::Status RemoteExperts::Scatter(Batch& batch, uint8_t* expert_rows) {
  const int64_t hidden = batch.batch.hidden, wire_bytes = RowBytes(options_.format, hidden);
  const int64_t row_bytes = RowBytes(batch.batch.format, hidden);
  const bool skip = failpoints::Bug("bug.skip_expert");
  for (const auto& piece : batch.pieces) {
    const std::string& name = piece->member->info.name();
    const ExpertHeader& header = piece->reply_header;
    if (const absl::Status damaged = CheckPayload(header, piece->reply); !damaged.ok()) {
      return absl::UnavailableError(absl::StrCat("expert worker ", name, ": ", damaged.message()));
    }
    if (header.kind == MessageKind::kError) {
      const auto code = static_cast<absl::StatusCode>(header.code >= 1 && header.code <= 16 ? header.code : 2);
      if (code == absl::StatusCode::kFailedPrecondition || code == absl::StatusCode::kUnavailable) {
        pool_->MarkFailed(piece->member.get(), absl::Status(code, "refused a batch"));
      }
      return absl::UnavailableError(
          absl::StrCat("expert worker ", name, ": ",
                       absl::string_view(reinterpret_cast<const char*>(piece->reply.data()), piece->reply.size())));
    }
    for (size_t pair = 0; pair < piece->places.size(); ++pair) {
      const uint8_t* const wire = piece->reply.data() + static_cast<int64_t>(pair) * wire_bytes;
      uint8_t* const out = expert_rows + static_cast<int64_t>(piece->places[pair]) * row_bytes;
      if (!RowIsFinite(wire, options_.format, hidden)) {
        return absl::InternalError(absl::StrCat("numeric_error: expert worker ", name, " returned a row of layer ",
                                                header.layer, " that is not finite"));
      }
      ConvertRow(wire, options_.format, hidden, batch.batch.format, out);
      if (skip && pair == 0) std::fill_n(out, row_bytes, uint8_t{0});
    }
  }
  if (failpoints::Bug("bug.arrival_order")) {
    // What a sum in order of arrival does, seen from the model, which adds places 0, 1, 2 ...: the rows of a token
    // stand in the order in which they came.
    std::vector<uint8_t> arrived(expert_rows, expert_rows + batch.batch.num_tokens * batch.batch.top_k * row_bytes);
    std::vector<int> filled(static_cast<size_t>(batch.batch.num_tokens), batch.batch.top_k);
    for (const Piece* piece : batch.arrival_order) {
      for (uint32_t place : piece->places) {
        const int64_t token = place / static_cast<uint32_t>(batch.batch.top_k);
        const int64_t to = token * batch.batch.top_k + --filled[token];
        std::copy_n(arrived.begin() + place * row_bytes, row_bytes, expert_rows + to * row_bytes);
      }
    }
  }
  return absl::OkStatus();
}

absl::Status RemoteExperts::FailBatch(absl::Status why) {
  failed_.fetch_add(1);
  waves_.clear();
  std::lock_guard<std::mutex> lock(mutex_);
  current_ = nullptr;  // late replies find nothing; their buffers live as long as they are written
  return why;
}

RemoteExpertsStatistics RemoteExperts::statistics() const {
  return {batches_.load(),
          pieces_.load(),
          bytes_sent_.load(),
          bytes_received_.load(),
          dropped_.load(),
          failed_.load(),
          absl::Microseconds(waited_us_.load())};
}

}  // namespace millrace::expert
