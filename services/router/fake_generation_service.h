// SPDX-License-Identifier: Apache-2.0
// A GenerationService for tests of the fronts: it says what it is told to, and fails where it is told to. The cluster's
// own behaviour is tested with the cluster.
//
// Thread: any; every generation runs on a thread of its own, joined at the end.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/text/tokenizer.h"
#include "services/router/generation.h"

namespace millrace::router {

// What every generation started from now on does.
struct FakeScript {
  std::string text;           // its tokens are drawn, then the end-of-sequence token, unless max_tokens comes first
  absl::Status start_error;   // Start returns it
  absl::Status error;         // instead of the end
  int error_after = 1 << 30;  // tokens before `error`
  int hold_after = -1;        // waits for Release or Cancel before this token; 0 also waits before admission
  std::chrono::microseconds token_delay{0};
  int64_t cached_prompt_tokens = 0;
  bool repeat = false;  // the text again and again, without an end
};

class FakeGenerationService : public GenerationService {
 public:
  explicit FakeGenerationService(const text::Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  ~FakeGenerationService() override {
    Release();
    for (auto& thread : threads_) thread.join();
  }

  void SetScript(FakeScript script) {
    const std::lock_guard lock(state_->mutex);
    script_ = std::move(script);
    state_->released = false;
  }
  void SetReady(absl::Status status) {
    const std::lock_guard lock(state_->mutex);
    ready_ = std::move(status);
  }
  // Lets go everybody who waits.
  void Release() {
    const std::lock_guard lock(state_->mutex);
    state_->released = true;
    state_->changed.notify_all();
  }

  std::vector<GenerationRequest> requests() const {
    const std::lock_guard lock(state_->mutex);
    return requests_;
  }
  int running() const { return Read(state_->running); }
  int cancelled() const { return Read(state_->cancelled); }
  int pauses() const { return Read(state_->pauses); }

  absl::StatusOr<std::unique_ptr<Generation>> Start(GenerationRequest request,
                                                    std::shared_ptr<GenerationSink> sink) override {
    const std::lock_guard lock(state_->mutex);
    requests_.push_back(request);
    if (!script_.start_error.ok()) return script_.start_error;
    auto run = std::make_shared<Run>();
    ++state_->running;
    auto tokens = *tokenizer_.Encode(script_.text, text::SpecialTokens::kMatch);
    threads_.emplace_back([state = state_, run, request = std::move(request), sink = std::move(sink), script = script_,
                           tokens = std::move(tokens), eos = *tokenizer_.TokenId("<｜end▁of▁sentence｜>")]() mutable {
      if (!script.repeat) tokens.push_back(eos);
      Play(*state, *run, request, *sink, script, tokens, eos);
      sink.reset();
      const std::lock_guard done(state->mutex);
      --state->running;
    });
    return std::make_unique<Handle>(state_, std::move(run));
  }

  absl::Status Ready() const override {
    const std::lock_guard lock(state_->mutex);
    return ready_;
  }

 private:
  struct State {
    std::mutex mutex;
    std::condition_variable changed;
    bool released = false;
    int running = 0, cancelled = 0, pauses = 0;
  };
  struct Run {
    bool cancelled = false;
    bool ended = false;
  };

  class Handle : public Generation {
   public:
    Handle(std::shared_ptr<State> state, std::shared_ptr<Run> run) : state_(std::move(state)), run_(std::move(run)) {}
    ~Handle() override { Cancel(); }
    void Cancel() override {
      const std::lock_guard lock(state_->mutex);
      if (run_->cancelled || run_->ended) return;
      run_->cancelled = true;
      ++state_->cancelled;
      state_->changed.notify_all();
    }
    void SetPaused(bool paused) override {
      const std::lock_guard lock(state_->mutex);
      state_->pauses += paused;
    }

   private:
    const std::shared_ptr<State> state_;
    const std::shared_ptr<Run> run_;
  };

  static void Play(State& state, Run& run, const GenerationRequest& request, GenerationSink& sink,
                   const FakeScript& script, const std::vector<int32_t>& tokens, int32_t eos) {
    // True if cancelled: the sink has been told.
    const auto stop = [&](bool hold) {
      {
        std::unique_lock lock(state.mutex);
        if (hold) state.changed.wait(lock, [&] { return state.released || run.cancelled; });
        if (!run.cancelled) return false;
        run.ended = true;
      }
      sink.OnError(absl::CancelledError("cancelled"));
      return true;
    };
    const auto end = [&] {
      const std::lock_guard lock(state.mutex);
      return std::exchange(run.ended, true);
    };
    if (stop(script.hold_after == 0)) return;
    sink.OnAdmitted({script.cached_prompt_tokens});
    GenerationUsage usage{static_cast<int64_t>(request.prompt_ids.size()), script.cached_prompt_tokens, 0};
    for (size_t i = 0;; ++i) {
      if (static_cast<int>(i) == script.error_after) {
        end();
        return sink.OnError(script.error);
      }
      if (script.token_delay.count() != 0) std::this_thread::sleep_for(script.token_delay);
      if (stop(script.hold_after > 0 && static_cast<int>(i) == script.hold_after)) return;
      const int32_t id = tokens[i % tokens.size()];
      GeneratedToken token{static_cast<int64_t>(i), id, -0.25f * static_cast<float>(i), {}};
      for (int k = 0; k < request.num_logprobs; ++k) {
        token.top_logprobs.push_back({(id + k) % 1000, -0.5f * static_cast<float>(k)});
      }
      sink.OnToken(std::move(token));
      ++usage.completion_tokens;
      const bool is_eos = id == eos && !request.ignore_eos;
      if (is_eos || usage.completion_tokens == request.max_tokens) {
        end();
        return sink.OnFinish(is_eos ? GenerationEnd::kEndOfSequence : GenerationEnd::kLength, usage);
      }
    }
  }

  int Read(const int& counter) const {
    const std::lock_guard lock(state_->mutex);
    return counter;
  }

  const text::Tokenizer& tokenizer_;
  const std::shared_ptr<State> state_ = std::make_shared<State>();
  FakeScript script_;  // with what follows guarded by state_->mutex
  absl::Status ready_;
  std::vector<GenerationRequest> requests_;
  std::vector<std::thread> threads_;
};

}  // namespace millrace::router
