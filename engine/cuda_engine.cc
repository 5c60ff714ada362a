// SPDX-License-Identifier: Apache-2.0
// Engine on one CUDA device: memory from a printed budget, one stream, one upload a pass.
//
// A pass is described to the device by one copy of a page-locked block: ids, positions, which sequence a row belongs
// to, where its slot and block table lie. Block tables go up once, when a sequence is made. Everything else of a pass
// stays on the device until its logits come back. The order of operations is model/cuda_forward.cc's, sequences and
// checks are paged_engine.h's.
#include "engine/cuda_engine.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "absl/strings/str_cat.h"
#include "engine/cuda_upload.h"
#include "engine/cuda_watch.h"
#include "engine/device/cuda_device.h"
#include "engine/model/cuda_forward.h"
#include "engine/model/cuda_limits.h"
#include "engine/ops/cuda_kernel_set.h"
#include "engine/ops/cuda_sampler.h"
#include "engine/paged_engine.h"
#include "engine/round_up.h"
#include "engine/status.h"

namespace millrace {
namespace {

using cuda::PassBlock;
using cuda::UploadBlock;

// Rows of logits that exist at a time: 64 rows of the released vocabulary are 33 MB.
constexpr int64_t kLogitRows = 64;

// Sizes that decode batches are padded to: within an eighth of the rows, and few enough graphs.
int64_t PaddedBatch(int64_t n, int64_t most) {
  int64_t step = 1;
  while (step * 8 < n) step *= 2;
  return std::min(RoundUp(n, step), most);
}

class CudaEngine : public PagedEngine {
 public:
  CudaEngine(std::shared_ptr<const Checkpoint> checkpoint, EngineOptions options)
      : PagedEngine(checkpoint, options, CacheLayout::Make(checkpoint->config(), Numerics::kRelease, options.mtp)) {}

  absl::Status Init() {
    RETURN_IF_ERROR(cuda::CheckShapes(config()));
    ASSIGN_OR_RETURN(const cuda::DeviceInfo device, cuda::OpenDevice(0));
    limits_.rows = options_.max_batch_tokens;
    limits_.sequences = options_.max_sequences;
    limits_.max_tokens = std::min(options_.max_context_tokens, options_.cache_pages * kPageTokens);
    limits_.logit_rows = std::min<int64_t>(kLogitRows, limits_.rows);
    limits_.mtp = options_.mtp;
    limits_.local_experts = options_.exchange == nullptr;
    table_pages_ = (limits_.max_tokens + kPageTokens - 1) / kPageTokens;
    const int64_t num_slots = options_.max_sequences + 1;  // the last is the scratch slot of padded rows

    // The budget: everything the engine will ever hold on the device.
    const UploadBlock upload = UploadBlock::LayOut(nullptr, limits_.rows, limits_.sequences);
    weight_bytes_ = cuda::ModelWeights::Bytes(*checkpoint_, options_.mtp, limits_.local_experts);
    const int64_t pages = options_.cache_pages * layout_.page_bytes;
    const int64_t slots = num_slots * layout_.slot_bytes;
    const int64_t workspace = cuda::CudaForward::WorkspaceBytes(config(), limits_);
    const int64_t tables = num_slots * table_pages_ * int64_t{4};
    const int64_t results = DrawWorkspaceOffset() + cuda::DrawWorkspaceBytes(config().vocab_size, limits_.sequences);
    ASSIGN_OR_RETURN(const std::string budget,
                     cuda::MemoryBudget(device, {{"weights", weight_bytes_},
                                                 {absl::StrCat(options_.cache_pages, " pages"), pages},
                                                 {absl::StrCat(num_slots, " slots"), slots},
                                                 {"workspace", workspace + tables + upload.bytes + results}}));
    if (options_.notice) options_.notice(budget);
    ASSIGN_OR_RETURN(weights_memory_, cuda::DeviceBuffer::Take(weight_bytes_, "weights"));
    ASSIGN_OR_RETURN(pages_memory_, cuda::DeviceBuffer::Take(pages, "cache pages"));
    ASSIGN_OR_RETURN(slots_memory_, cuda::DeviceBuffer::Take(slots, "state slots"));
    ASSIGN_OR_RETURN(workspace_memory_, cuda::DeviceBuffer::Take(workspace, "workspace"));
    ASSIGN_OR_RETURN(tables_memory_, cuda::DeviceBuffer::Take(tables, "block tables"));
    ASSIGN_OR_RETURN(upload_memory_, cuda::DeviceBuffer::Take(upload.bytes, "pass"));
    ASSIGN_OR_RETURN(upload_staging_, cuda::PinnedBuffer::Take(upload.bytes, "pass"));
    ASSIGN_OR_RETURN(logits_staging_, cuda::PinnedBuffer::Take(limits_.logit_rows * config().vocab_size * 4, "logits"));
    ASSIGN_OR_RETURN(results_memory_, cuda::DeviceBuffer::Take(results, "drawn tokens"));
    ASSIGN_OR_RETURN(results_staging_, cuda::PinnedBuffer::Take(DrawWorkspaceOffset(), "drawn tokens"));
    pages_base_ = pages_memory_.data();
    slots_base_ = slots_memory_.data();
    host_ = UploadBlock::LayOut(upload_staging_.data(), limits_.rows, limits_.sequences);
    device_ = UploadBlock::LayOut(upload_memory_.data(), limits_.rows, limits_.sequences);

    stream_ = std::make_unique<cuda::Stream>();
    cuda::Bump bump(weights_memory_.data());
    ASSIGN_OR_RETURN(
        cuda::ModelWeights weights,
        cuda::ModelWeights::Load(*checkpoint_, options_.mtp, limits_.local_experts, bump, options_.progress));
    ASSIGN_OR_RETURN(forward_, cuda::CudaForward::Create(config(), layout_, std::move(weights), limits_,
                                                         workspace_memory_.data(), options_.exchange, *stream_));
    return absl::OkStatus();
  }

  absl::StatusOr<std::vector<ChunkOutput>> Forward(absl::Span<const Chunk> chunks,
                                                   const ForwardOptions& options) override {
    RETURN_IF_ERROR(CheckChunks(chunks));
    std::vector<ChunkOutput> out(chunks.size());
    if (chunks.empty()) return out;
    const absl::Status status = Run(chunks, options, out);
    if (!status.ok()) stream_->Wait();  // nothing of the pass may still run when its sequences are released
    Finish(chunks, status.ok());
    if (!status.ok()) return status;
    return out;
  }

  std::string KernelSet() const override { return CudaKernelSet(); }

 private:
  // Experts that other kernels compute give other bits: such engines do not mix with those that run their own.
  std::string HashDetail() const override {
    return options_.exchange == nullptr || options_.exchange->KernelSet() == KernelSet() ? "own experts"
                                                                                         : "pool experts";
  }

  int32_t* BlockTable(const Sequence& s) const {
    return reinterpret_cast<int32_t*>(tables_memory_.data()) + s.reservation.slot() * table_pages_;
  }

  void Prepare(const Sequence& s) override {
    const absl::Span<const int32_t> table = s.reservation.block_table();
    CUDA_CHECK(cudaMemcpyAsync(BlockTable(s), table.data(), table.size() * 4, cudaMemcpyHostToDevice, stream_->get()));
    for (uint8_t* page : s.pages) CUDA_CHECK(cudaMemsetAsync(page, 0, layout_.page_bytes, stream_->get()));
    CUDA_CHECK(cudaMemsetAsync(s.slot, 0, layout_.slot_bytes, stream_->get()));
    stream_->Wait();  // a transfer may write here next, on a stream of its own
  }

  const int32_t* TableOf(const uint8_t* slot) const {
    return reinterpret_cast<const int32_t*>(tables_memory_.data()) +
           (slot - slots_base_) / layout_.slot_bytes * table_pages_;
  }

  void Fill(const PassRows& pass, const PassBlock& block) const {
    for (size_t i = 0; i < pass.sequences.size(); ++i) {
      const SequenceRows& s = pass.sequences[i];
      block.sequences[i] = {s.row, s.count, s.start, s.slot, TableOf(s.slot)};
      std::fill_n(block.row_sequence + s.row, s.count, static_cast<int32_t>(i));
    }
    for (size_t r = 0; r < pass.ids.size(); ++r) {
      block.token_ids[r] = pass.ids[r];
      block.positions[r] = static_cast<int32_t>(pass.positions[r]);
    }
  }

  cuda::PassView View(const PassBlock& block, const PassRows& rows) const {
    return {static_cast<int64_t>(rows.ids.size()),
            static_cast<int>(rows.sequences.size()),
            block.token_ids,
            block.positions,
            block.row_sequence,
            block.sequences,
            pages_base_,
            layout_.page_bytes};
  }

  absl::Status Run(absl::Span<const Chunk> chunks, const ForwardOptions& options, std::vector<ChunkOutput>& out) {
    PassRows rows = MakePass(chunks);
    const bool step = IsStep(chunks, rows, options);
    const auto batch = static_cast<int64_t>(chunks.size());
    if (step) Pad(rows, PaddedBatch(batch, std::min<int64_t>(limits_.sequences, limits_.rows)));
    Fill(rows, host_.backbone);
    PassRows mtp_rows;
    std::vector<int32_t> owners;
    if (options_.mtp) {
      mtp_rows = MakeMtpPass(rows, owners);
      Fill(mtp_rows, host_.mtp);
      for (size_t i = 0; i < mtp_rows.sequences.size(); ++i) {
        host_.backbone_sequence[i] = owners[mtp_rows.sequences[i].row];
      }
    }
    const int64_t num_logits =
        step ? FillStepDraws(chunks, static_cast<int64_t>(rows.ids.size())) : FillLogitRows(chunks, rows);
    CUDA_CHECK(cudaMemcpyAsync(upload_memory_.data(), upload_staging_.data(), host_.bytes, cudaMemcpyHostToDevice,
                               stream_->get()));

    const cuda::PassView pass = View(device_.backbone, rows);
    if (step) {
      Replay(pass, mtp_rows.ids.empty() ? cuda::PassView{} : View(device_.mtp, mtp_rows));
      TakeStep(chunks, out);
      return absl::OkStatus();
    }
    cuda::PassWatch watch(config(), options, rows.sequences, *stream_);
    RETURN_IF_ERROR(forward_->Forward(pass, watch.wanted() ? &watch : nullptr));
    if (!mtp_rows.ids.empty()) {
      RETURN_IF_ERROR(forward_->ForwardMtp(View(device_.mtp, mtp_rows), pass, device_.backbone_sequence));
      if (options.tap != nullptr) TellMtp(chunks, mtp_rows, owners, *options.tap);
    }
    forward_->StoreStreams(pass);
    TakeLogits(chunks, num_logits, out);
    stream_->Wait();
    return absl::OkStatus();
  }

  // One token for each sequence, each sampled, nobody watching, experts here: what can be a graph.
  bool IsStep(absl::Span<const Chunk> chunks, const PassRows& rows, const ForwardOptions& options) const {
    if (options.tap != nullptr || options.on_layer_done || options_.exchange != nullptr) return false;
    if (static_cast<int64_t>(chunks.size()) > limits_.logit_rows) return false;
    return std::all_of(
               chunks.begin(), chunks.end(),
               [](const Chunk& c) { return c.tokens.size() == 1 && c.logit_rows.empty() && c.sampling != nullptr; }) &&
           std::all_of(rows.sequences.begin(), rows.sequences.end(), [](const SequenceRows& s) { return s.start > 0; });
  }

  // Rows at position 1 of the scratch slot: no entry is complete there, so no page is touched, and an MTP row exists.
  void Pad(PassRows& rows, int64_t batch) const {
    while (static_cast<int64_t>(rows.ids.size()) < batch) {
      rows.sequences.push_back({static_cast<int64_t>(rows.ids.size()), 1, 1, ScratchSlot(), nullptr});
      rows.ids.push_back(0);
      rows.positions.push_back(1);
    }
  }
  uint8_t* ScratchSlot() const { return slots_base_ + options_.max_sequences * layout_.slot_bytes; }

  int64_t FillStepDraws(absl::Span<const Chunk> chunks, int64_t batch) {
    for (int64_t i = 0; i < batch; ++i) {
      const bool real = i < static_cast<int64_t>(chunks.size());
      host_.logit_rows[i] = static_cast<int32_t>(i);
      // What the device cannot draw is drawn here afterwards; its row goes through all the same.
      host_.draws[i] = real ? cuda::MakeDrawRequest(*chunks[i].sampling, static_cast<int32_t>(i))
                            : cuda::DrawRequest{.row = static_cast<int32_t>(i), .greedy = 1};
    }
    return batch;
  }

  int64_t FillLogitRows(absl::Span<const Chunk> chunks, const PassRows& rows) {
    int64_t num = 0;
    for (size_t i = 0; i < chunks.size(); ++i) {
      const int32_t first = static_cast<int32_t>(rows.sequences[i].row);
      for (int32_t r : chunks[i].logit_rows) host_.logit_rows[num++] = first + r;
      if (chunks[i].sampling != nullptr) {
        host_.logit_rows[num++] = first + static_cast<int32_t>(rows.sequences[i].count) - 1;
      }
    }
    return num;
  }

  // A whole decode step on the device: as launches the first time, then as a graph. One batch size has one shape.
  void Replay(const cuda::PassView& pass, const cuda::PassView& mtp) {
    const auto enqueue = [&] {
      CHECK(forward_->Forward(pass, nullptr).ok(), "experts are here: nothing can fail");
      if (mtp.num_rows != 0) CHECK(forward_->ForwardMtp(mtp, pass, device_.backbone_sequence).ok());
      forward_->StoreStreams(pass);
      const float* logits = forward_->Logits(device_.logit_rows, pass.num_rows);
      cuda::DrawTokens(logits, config().vocab_size, device_.draws, pass.num_rows, DrawWorkspace(), Results(),
                       stream_->get());
    };
    StepGraph& graph = graphs_[pass.num_rows];
    if (graph.steps++ == 0) return enqueue();
    if (graph.exec == nullptr) {
      CUDA_CHECK(cudaStreamBeginCapture(stream_->get(), cudaStreamCaptureModeThreadLocal));
      enqueue();
      cudaGraph_t captured;
      CUDA_CHECK(cudaStreamEndCapture(stream_->get(), &captured));
      CUDA_CHECK(cudaGraphInstantiate(&graph.exec, captured, 0));
      CUDA_CHECK(cudaGraphDestroy(captured));
    }
    CUDA_CHECK(cudaGraphLaunch(graph.exec, stream_->get()));
  }

  void TakeStep(absl::Span<const Chunk> chunks, std::vector<ChunkOutput>& out) {
    const auto batch = static_cast<int64_t>(chunks.size());
    CUDA_CHECK(cudaMemcpyAsync(results_staging_.data(), Results(), batch * sizeof(cuda::DrawResult),
                               cudaMemcpyDeviceToHost, stream_->get()));
    stream_->Wait();
    const auto* results = reinterpret_cast<const cuda::DrawResult*>(results_staging_.data());
    const float* logits = nullptr;
    for (int64_t i = 0; i < batch; ++i) {
      if (cuda::DrawsOnDevice(*chunks[i].sampling)) {
        out[i].sampled = cuda::FinishDraw(results[i]);
        continue;
      }
      if (logits == nullptr) logits = CopyBack(forward_->last_logits(), batch);
      out[i].sampled = SampleRow(logits + i * config().vocab_size, *chunks[i].sampling);
    }
  }

  SampledToken SampleRow(const float* logits, const SamplingRequest& request) const {
    return Sample({logits, static_cast<size_t>(config().vocab_size)}, request);
  }
  // Results of the draws first, their workspace behind them.
  int64_t DrawWorkspaceOffset() const {
    cuda::Bump bump;
    bump.Take<cuda::DrawResult>(limits_.sequences);
    return bump.used();
  }
  void* DrawWorkspace() const { return results_memory_.data() + DrawWorkspaceOffset(); }
  cuda::DrawResult* Results() const { return reinterpret_cast<cuda::DrawResult*>(results_memory_.data()); }

  void TakeLogits(absl::Span<const Chunk> chunks, int64_t num_logits, std::vector<ChunkOutput>& out) {
    const int64_t vocab = config().vocab_size;
    size_t chunk = 0;
    int64_t taken = 0;  // of the chunk's rows
    const auto rows_of = [&](size_t i) {
      return static_cast<int64_t>(chunks[i].logit_rows.size()) + (chunks[i].sampling != nullptr ? 1 : 0);
    };
    ForTiles(num_logits, [&](int64_t first, int64_t num) {
      const float* logits = CopyBack(forward_->Logits(device_.logit_rows + first, num), num);
      for (int64_t i = 0; i < num; ++i, ++taken) {
        while (taken == rows_of(chunk)) {
          ++chunk;
          taken = 0;
        }
        const float* row = logits + i * vocab;
        if (taken < static_cast<int64_t>(chunks[chunk].logit_rows.size())) {
          out[chunk].logits.insert(out[chunk].logits.end(), row, row + vocab);
        } else {
          out[chunk].sampled = SampleRow(row, *chunks[chunk].sampling);
        }
      }
    });
  }

  void TellMtp(absl::Span<const Chunk> chunks, const PassRows& pass, const std::vector<int32_t>& owners,
               ForwardTap& tap) {
    // The rows are 0, 1, 2 ...: the block's logit rows are not needed again until the backbone's logits are.
    const int64_t rows = static_cast<int64_t>(pass.ids.size()), vocab = config().vocab_size;
    std::vector<int32_t> saved(host_.logit_rows, host_.logit_rows + rows);
    stream_->Wait();
    for (int64_t r = 0; r < rows; ++r) host_.logit_rows[r] = static_cast<int32_t>(r);
    UploadLogitRows(rows);
    ForTiles(rows, [&](int64_t first, int64_t num) {
      const float* logits = CopyBack(forward_->MtpLogits(device_.logit_rows + first, num), num);
      for (int64_t i = 0; i < num; ++i) {
        tap.OnMtpLogits(chunks[owners[first + i]].sequence, pass.positions[first + i], logits + i * vocab);
      }
    });
    std::copy(saved.begin(), saved.end(), host_.logit_rows);
    UploadLogitRows(rows);
  }

  void UploadLogitRows(int64_t count) {
    CUDA_CHECK(
        cudaMemcpyAsync(device_.logit_rows, host_.logit_rows, count * 4, cudaMemcpyHostToDevice, stream_->get()));
    stream_->Wait();
  }

  template <typename Body>
  void ForTiles(int64_t rows, Body body) const {
    for (int64_t first = 0; first < rows; first += limits_.logit_rows) {
      body(first, std::min(limits_.logit_rows, rows - first));
    }
  }

  const float* CopyBack(const float* logits, int64_t rows) {
    CUDA_CHECK(cudaMemcpyAsync(logits_staging_.data(), logits, rows * config().vocab_size * 4, cudaMemcpyDeviceToHost,
                               stream_->get()));
    stream_->Wait();
    return reinterpret_cast<const float*>(logits_staging_.data());
  }

  cuda::ForwardLimits limits_;
  int64_t table_pages_ = 0;
  // A captured step of one padded batch size.
  struct StepGraph {
    StepGraph() = default;
    StepGraph(const StepGraph&) = delete;
    StepGraph& operator=(const StepGraph&) = delete;
    ~StepGraph() {
      if (exec != nullptr) cudaGraphExecDestroy(exec);
    }
    int64_t steps = 0;
    cudaGraphExec_t exec = nullptr;
  };

  cuda::DeviceBuffer weights_memory_, pages_memory_, slots_memory_, workspace_memory_, tables_memory_, upload_memory_,
      results_memory_;
  cuda::PinnedBuffer upload_staging_, logits_staging_, results_staging_;
  UploadBlock host_, device_;
  std::unique_ptr<cuda::Stream> stream_;
  std::unique_ptr<cuda::CudaForward> forward_;
  std::map<int64_t, StepGraph> graphs_;  // by padded batch size
};

}  // namespace

absl::StatusOr<std::unique_ptr<Engine>> CreateCudaEngine(std::shared_ptr<const Checkpoint> checkpoint,
                                                         EngineOptions options) {
  RETURN_IF_ERROR(cuda::CheckNumerics(options.numerics));
  if (options.rounding.has_value() && !(*options.rounding == Rounding::All())) {
    return absl::FailedPreconditionError("rounding: cuda has every rounding point and switches none off");
  }
  auto engine = std::make_unique<CudaEngine>(std::move(checkpoint), std::move(options));
  RETURN_IF_ERROR(engine->Init());
  return std::unique_ptr<Engine>(std::move(engine));
}

}  // namespace millrace
