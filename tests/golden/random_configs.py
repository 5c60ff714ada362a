# SPDX-License-Identifier: Apache-2.0
"""Random DeepSeek-V4 configurations, as Hugging Face transformers computes them in FP32.

So that nothing in the engine is tuned to one golden file: other head, group, expert, top-k and hash-layer counts,
schedules that start with windows, CSA or HCA, long prompts, YaRN past its original length, small limits that clamp.
The weights are made, not stored (random_checkpoint.h has the same rule in C++); the vectors go to tests/data/random-*,
where golden_test.cc checks them without any Python.

  python -m venv .cache/venv-golden && .cache/venv-golden/bin/pip install -r tests/golden/requirements.txt
  random_configs.py store                    write tests/data/random-* (about a minute)
  random_configs.py check                    recompute them, and compare `millrace score` with them
  random_configs.py fuzz --count 20 --seed 1 as many new configurations, compared with `millrace score`, nothing kept

What transformers does otherwise than the released model does not show in FP32 without quantisation, except: it has no
MTP (built here from its own decoder layer), and torch.topk leaves ties open (replaced by a stable sort: equal scores go
to the lower index, and an entry that no index head likes scores exactly zero, so ties are real). Near-ties are looked
for: a configuration whose closest decision is closer than rounding is not stored.
"""

import argparse
import json
import math
import os
import pathlib
import random
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config

# It finds our YaRN factors unusual, and says so once a layer.
transformers.logging.set_verbosity_error()

ROOT = pathlib.Path(__file__).resolve().parents[2]
BOUND = 1e-3
# Closest decision (k-th against next score) a stored configuration may have. FP32 sums differ by about 1e-6 here.
NEAR_TIE = 4e-6
# transformers' own wording differs from the released config.json only in names; both are made from this.
COMMON = dict(
    architectures=["DeepseekV4ForCausalLM"], model_type="deepseek_v4", hidden_act="silu", num_key_value_heads=1,
    head_dim=512, qk_rope_head_dim=64, sliding_window=128, index_head_dim=128, n_shared_experts=1,
    scoring_func="sqrtsoftplus", topk_method="noaux_tc", norm_topk_prob=True, hc_mult=4, hc_sinkhorn_iters=20,
    hc_eps=1e-6, rms_norm_eps=1e-6, rope_theta=10000.0, compress_rope_theta=160000.0, swiglu_limit=10.0,
    routed_scaling_factor=1.5, num_nextn_predict_layers=0, tie_word_embeddings=False, attention_bias=False,
    max_position_embeddings=65536, bos_token_id=0, eos_token_id=1, torch_dtype="bfloat16")


def yarn(factor, original):
    return dict(type="yarn", factor=factor, original_max_position_embeddings=original, beta_fast=32, beta_slow=1)


STORED = {
    # Window-only first layers, every routed layer but the last by hash, three heads in three groups, no YaRN.
    "random-window": dict(
        config=dict(vocab_size=160, hidden_size=64, num_attention_heads=3, q_lora_rank=32, o_groups=3, o_lora_rank=32,
                    compress_ratios=[0, 0, 0, 4, 128, 4], num_hash_layers=5, n_routed_experts=12,
                    num_experts_per_tok=3, moe_intermediate_size=32, index_n_heads=12, index_topk=8),
        lengths=[2, 130, 700]),
    # HCA first as in Pro, no hash layer, one expert a token; YaRN whose whole ramp is clamped, 12 times its length.
    "random-yarn": dict(
        config=dict(vocab_size=128, hidden_size=64, num_attention_heads=4, q_lora_rank=64, o_groups=2, o_lora_rank=32,
                    compress_ratios=[128, 4, 128, 4], num_hash_layers=0, n_routed_experts=6, num_experts_per_tok=1,
                    moe_intermediate_size=64, index_n_heads=16, index_topk=16, rope_scaling=yarn(16, 128)),
        lengths=[127, 1600]),
    # Two CSA layers in a row, many experts, top 6, a hidden size that is no power of two, selection from 1,028 tokens.
    "random-wide": dict(
        config=dict(vocab_size=192, hidden_size=96, num_attention_heads=6, q_lora_rank=96, o_groups=3, o_lora_rank=64,
                    compress_ratios=[4, 4, 128, 0], num_hash_layers=2, n_routed_experts=32, num_experts_per_tok=6,
                    moe_intermediate_size=32, index_n_heads=20, index_topk=256, rope_scaling=yarn(4, 1024),
                    routed_scaling_factor=2.5),
        lengths=[5, 257, 1537]),
    # One head, MTP, SwiGLU limits that bite, other epsilons, bases and Sinkhorn rounds.
    "random-mtp": dict(
        config=dict(vocab_size=128, hidden_size=128, num_attention_heads=1, q_lora_rank=32, o_groups=1, o_lora_rank=64,
                    compress_ratios=[4, 0, 128, 0], num_hash_layers=1, n_routed_experts=5, num_experts_per_tok=4,
                    moe_intermediate_size=96, index_n_heads=8, index_topk=32, num_nextn_predict_layers=1,
                    swiglu_limit=0.5, hc_sinkhorn_iters=7, hc_eps=1e-5, rms_norm_eps=1e-5, rope_theta=5000.0,
                    compress_rope_theta=40000.0),
        lengths=[4, 385]),
}


def full_config(config):
    merged = {**COMMON, **config}
    ratios = merged["compress_ratios"]
    if "num_hidden_layers" not in merged:
        merged["num_hidden_layers"] = len(ratios) - merged["num_nextn_predict_layers"]
    return merged


def random_config(rng):
    groups = rng.choice([1, 2, 3, 4])
    heads = groups * rng.choice([1, 2, 3])
    layers = rng.randint(2, 6)
    mtp = rng.choice([0, 1])
    experts = rng.randint(1, 20)
    config = dict(
        vocab_size=rng.randint(100, 300), hidden_size=32 * rng.randint(1, 6), num_attention_heads=heads,
        q_lora_rank=32 * rng.randint(1, 4), o_groups=groups, o_lora_rank=32 * rng.randint(1, 3),
        compress_ratios=[rng.choice([0, 4, 128, 4]) for _ in range(layers)] + [0] * mtp,
        num_hash_layers=rng.randint(0, layers), n_routed_experts=experts,
        num_experts_per_tok=rng.randint(1, min(experts, 8)), moe_intermediate_size=32 * rng.randint(1, 4),
        index_n_heads=rng.randint(8, 24), index_topk=rng.choice([1, 7, 16, 64, 200]), num_nextn_predict_layers=mtp,
        swiglu_limit=rng.choice([0.5, 10.0]), routed_scaling_factor=rng.choice([1.0, 1.5, 2.5]),
        hc_sinkhorn_iters=rng.choice([1, 5, 20]))
    if rng.random() < 0.6:
        config["rope_scaling"] = yarn(rng.choice([2, 16, 40]), rng.choice([64, 256, 4096, 65536]))
    lengths = sorted({rng.randint(1, 8), rng.choice([127, 128, 129, 255, 257, 511]), rng.randint(300, 1800)})
    return dict(config=config, lengths=lengths)


# ---- weights --------------------------------------------------------------------------------------------------------


def numbers(seed, name, count):
    """splitmix64 outputs 0 .. count-1, started from FNV-1a of "seed/name"; see random_checkpoint.cc."""
    state = 0xCBF29CE484222325
    for byte in f"{seed}/{name}".encode():
        state = ((state ^ byte) * 0x100000001B3) % 2**64
    with np.errstate(over="ignore"):
        z = np.uint64(state) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def fill(seed, rule, num_experts):
    count = math.prod(rule["shape"])
    u = numbers(seed, rule["name"], count)
    if rule["dtype"] == "I64":
        rows, top_k = rule["shape"]
        table = np.empty((rows, top_k), np.int64)
        for row in range(rows):
            pool = list(range(num_experts))
            for j in range(top_k):
                table[row, j] = pool.pop(int(u[row * top_k + j]) % len(pool))
        return table
    bits = rule["bits"]
    top = (u >> np.uint64(64 - bits)).astype(np.float64)
    value = rule["center"] + (2 * top + 1 - 2.0**bits) * 2.0 ** (rule["exponent"] - bits)
    return value.astype(np.float32).reshape(rule["shape"])


def tensor_rules(c):
    """Every tensor of the checkpoint, by its released name, with the range its numbers are drawn from."""
    rules = []
    d, heads, q, experts, inner = (c["hidden_size"], c["num_attention_heads"], c["q_lora_rank"],
                                   c["n_routed_experts"], c["moe_intermediate_size"])
    grouped = c["o_groups"] * c["o_lora_rank"]

    def add(name, shape, dtype, exponent, center=0.0, bits=None):
        rules.append(dict(name=name, dtype=dtype, shape=list(shape), center=center, exponent=exponent,
                          bits=bits or (8 if dtype == "BF16" else 16)))

    def linear(name, out, fan_in, dtype="BF16"):  # about 1 / sqrt(fan_in), as a power of two
        add(name, (out, fan_in), dtype, 1 - ((fan_in - 1).bit_length() + 1) // 2)

    def norm(name, n):
        add(name, (n,), "BF16", -1, center=1.0, bits=6)

    def mixing(prefix, rows, scales):
        linear(prefix + "_fn", rows, 4 * d, "F32")
        add(prefix + "_base", (rows,), "F32", 0)
        add(prefix + "_scale", (scales,), "F32", -2, center=0.75)

    def compressor(prefix, ratio, width, dim):
        linear(prefix + ".wkv.weight", width, d)
        linear(prefix + ".wgate.weight", width, d)
        add(prefix + ".ape", (ratio, width), "F32", 0)
        norm(prefix + ".norm.weight", dim)

    def block(p, ratio, hashed):
        for part in ("attn", "ffn"):
            norm(f"{p}{part}_norm.weight", d)
            mixing(f"{p}hc_{part}", 24, 3)
        add(p + "attn.attn_sink", (heads,), "F32", 1)
        linear(p + "attn.wq_a.weight", q, d)
        norm(p + "attn.q_norm.weight", q)
        linear(p + "attn.wq_b.weight", heads * 512, q)
        linear(p + "attn.wkv.weight", 512, d)
        norm(p + "attn.kv_norm.weight", 512)
        linear(p + "attn.wo_a.weight", grouped, heads * 512 // c["o_groups"])
        linear(p + "attn.wo_b.weight", d, grouped)
        if ratio:
            compressor(p + "attn.compressor", ratio, 1024 if ratio == 4 else 512, 512)
        if ratio == 4:
            linear(p + "attn.indexer.wq_b.weight", c["index_n_heads"] * 128, q)
            linear(p + "attn.indexer.weights_proj.weight", c["index_n_heads"], d)
            compressor(p + "attn.indexer.compressor", 4, 256, 128)
        linear(p + "ffn.gate.weight", experts, d)
        if hashed:
            rules.append(dict(name=p + "ffn.gate.tid2eid", dtype="I64",
                              shape=[c["vocab_size"], c["num_experts_per_tok"]]))
        else:
            add(p + "ffn.gate.bias", (experts,), "F32", -2)
        for e in [f"experts.{i}" for i in range(experts)] + ["shared_experts"]:
            linear(f"{p}ffn.{e}.w1.weight", inner, d)
            linear(f"{p}ffn.{e}.w2.weight", d, inner)
            linear(f"{p}ffn.{e}.w3.weight", inner, d)

    add("embed.weight", (c["vocab_size"], d), "BF16", 0)
    for n in range(c["num_hidden_layers"]):
        block(f"layers.{n}.", c["compress_ratios"][n], n < c["num_hash_layers"])
    norm("norm.weight", d)
    linear("head.weight", c["vocab_size"], d)
    mixing("hc_head", 4, 1)
    if c["num_nextn_predict_layers"]:
        block("mtp.0.", 0, False)
        linear("mtp.0.e_proj.weight", d, d)
        linear("mtp.0.h_proj.weight", d, d)
        for name in ("enorm", "hnorm", "norm"):
            norm(f"mtp.0.{name}.weight", d)
        mixing("mtp.0.hc_head", 4, 1)
    return rules


# ---- transformers ---------------------------------------------------------------------------------------------------

IN_LAYER = [  # released name within a layer -> transformers name
    ("attn_norm.weight", "input_layernorm.weight"), ("ffn_norm.weight", "post_attention_layernorm.weight"),
    ("hc_attn_", "attn_hc."), ("hc_ffn_", "ffn_hc."), ("attn.attn_sink", "self_attn.sinks"),
    ("attn.indexer.compressor.", "attn.compressor.indexer."), ("attn.indexer.wq_b", "attn.compressor.indexer.q_b_proj"),
    ("attn.indexer.weights_proj", "attn.compressor.indexer.scorer.weights_proj"), ("attn.wq_a.", "attn.q_a_proj."),
    ("attn.wq_b.", "attn.q_b_proj."), ("attn.wkv.", "attn.kv_proj."), ("attn.wo_a.", "attn.o_a_proj."),
    ("attn.wo_b.", "attn.o_b_proj."), ("attn.q_norm.", "attn.q_a_norm."), (".wkv.", ".kv_proj."),
    (".wgate.", ".gate_proj."), (".ape", ".position_bias"), ("compressor.norm.", "compressor.kv_norm."),
    ("indexer.norm.", "indexer.kv_norm."), ("attn.", "self_attn."), ("ffn.gate.bias", "mlp.gate.e_score_correction_bias"),
    ("shared_experts.w1", "shared_experts.gate_proj"), ("shared_experts.w3", "shared_experts.up_proj"),
    ("shared_experts.w2", "shared_experts.down_proj"), ("ffn.", "mlp.")]


def layer_name(name):
    for ours, theirs in IN_LAYER:
        if ours == "attn." and name.startswith("self_attn."):
            continue
        if ours.startswith("attn.") or ours.endswith("_norm.weight") or ours.startswith("hc_") or ours == "ffn.":
            if name.startswith(ours):
                name = theirs + name[len(ours):]
        else:
            name = name.replace(ours, theirs)
    return name


def layer_state(weights, prefix, num_experts):
    state = {}
    stacks = {"w1": [], "w2": [], "w3": []}
    for name, value in weights.items():
        if not name.startswith(prefix) or name.startswith(prefix + "hc_head") or ".ffn.experts." in name:
            continue
        inner = name[len(prefix):]
        if inner.split(".")[0] not in ("e_proj", "h_proj", "enorm", "hnorm", "norm"):
            state[layer_name(inner)] = value
    for e in range(num_experts):
        for w, stack in stacks.items():
            stack.append(weights[f"{prefix}ffn.experts.{e}.{w}.weight"])
    state["mlp.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in zip(stacks["w1"], stacks["w3"])])
    state["mlp.experts.down_proj"] = torch.stack(stacks["w2"])
    return state


class Decisions:
    """torch.topk with ties to the lower index, noting how close the closest decision was."""

    def __init__(self):
        self.closest = math.inf
        self.original = torch.topk, torch.Tensor.topk

    def __enter__(self):
        torch.topk = self.topk
        torch.Tensor.topk = lambda scores, *args, **kwargs: self.topk(scores, *args, **kwargs)
        return self

    def __exit__(self, *exc):
        torch.topk, torch.Tensor.topk = self.original

    def topk(self, scores, k, dim=-1, sorted=True):
        values, indices = torch.sort(scores, dim=dim, descending=True, stable=True)
        if k < scores.shape[-1] and k > 0:
            gap = values[..., k - 1] - values[..., k]
            gap = gap[torch.isfinite(gap) & (gap > 0)]
            if len(gap):
                self.closest = min(self.closest, gap.min().item())
        return torch.return_types.topk((values[..., :k], indices[..., :k]))


class Oracle:
    def __init__(self, config, weights):
        c = self.c = config
        layers = c["num_hidden_layers"]
        kinds = {0: "sliding_attention", 4: "compressed_sparse_attention", 128: "heavily_compressed_attention"}
        mtp = c["num_nextn_predict_layers"]
        scaling = dict(c["rope_scaling"]) if "rope_scaling" in c else None
        if scaling:
            scaling["rope_type"] = scaling.pop("type")
        skip = ("architectures", "model_type", "compress_ratios", "num_hash_layers", "rope_scaling", "n_shared_experts",
                "num_hidden_layers", "qk_rope_head_dim", "topk_method", "torch_dtype", "num_nextn_predict_layers")
        config = DeepseekV4Config(
            **{k: v for k, v in c.items() if k not in skip}, num_hidden_layers=layers + mtp,
            layer_types=[kinds[r] for r in c["compress_ratios"][:layers]] + ["sliding_attention"] * mtp,
            mlp_layer_types=["hash_moe"] * c["num_hash_layers"] + ["moe"] * (layers + mtp - c["num_hash_layers"]),
            rope_parameters=scaling, attn_implementation="eager", experts_implementation="eager")
        self.model = hf.DeepseekV4ForCausalLM(config).float().eval()
        w = {k: torch.from_numpy(v) for k, v in weights.items()}
        state = {"model.embed_tokens.weight": w["embed.weight"], "lm_head.weight": w["head.weight"],
                 "model.norm.weight": w["norm.weight"]}
        for part in ("fn", "base", "scale"):
            state[f"model.hc_head.hc_{part}"] = w[f"hc_head_{part}"]
        prefixes = [f"layers.{n}." for n in range(layers)] + ["mtp.0."] * mtp
        for n, prefix in enumerate(prefixes):
            for name, value in layer_state(w, prefix, c["n_routed_experts"]).items():
                state[f"model.layers.{n}.{name}"] = value
        self.model.load_state_dict(state, strict=True)
        self.mtp = None
        if mtp:
            self.mtp = self.model.model.layers[layers]
            self.model.model.layers = self.model.model.layers[:layers]
            self.w = w
            self.mtp_head = hf.DeepseekV4HyperHead(config)
            self.mtp_head.load_state_dict({f"hc_{part}": w[f"mtp.0.hc_head_{part}"] for part in ("fn", "base", "scale")})

    def norm(self, name, x):
        layer = hf.DeepseekV4RMSNorm(x.shape[-1], eps=self.c["rms_norm_eps"])
        layer.weight.data = self.w[name]
        return layer(x)

    @torch.no_grad()
    def run(self, ids):
        """logits [S, V], streams [L, S, 4, D], MTP logits [S - 1, V] or None."""
        streams, shared = [], {}
        hooks = [layer.register_forward_hook(lambda _, __, out: streams.append(out)) for layer in self.model.model.layers]
        hooks.append(self.model.model.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: shared.update(kwargs), with_kwargs=True))
        logits = self.model(torch.tensor(ids)[None], use_cache=False).logits[0]
        for hook in hooks:
            hook.remove()
        mtp_logits = None
        if self.mtp is not None and len(ids) > 1:
            n = len(ids) - 1
            embedded = self.norm("mtp.0.enorm.weight", self.w["embed.weight"][torch.tensor(ids[1:])])[None]
            x = (embedded @ self.w["mtp.0.e_proj.weight"].T)[:, :, None] + self.norm(
                "mtp.0.hnorm.weight", streams[-1][:, :n]) @ self.w["mtp.0.h_proj.weight"].T
            shared["position_embeddings"] = {
                k: tuple(t[:, :n] for t in v) for k, v in shared["position_embeddings"].items()}
            shared["position_ids"] = shared["position_ids"][:, :n]
            if shared["attention_mask"] is not None:
                shared["attention_mask"] = shared["attention_mask"][..., :n, :n]
            shared["input_ids"] = None
            x = self.mtp(x, **shared)
            mtp_logits = (self.norm("mtp.0.norm.weight", self.mtp_head(x)) @ self.w["head.weight"].T)[0]
        return logits, torch.stack([s[0] for s in streams]), mtp_logits


def goldens(config, seed, lengths):
    """Arrays in the layout of the golden files, the tensor rules, and the closest decision."""
    rules = tensor_rules(config)
    weights = {rule["name"]: fill(seed, rule, config["n_routed_experts"]) for rule in rules}
    arrays = {}
    with Decisions() as decisions:
        oracle = Oracle(config, weights)
        for length in lengths:
            u = numbers(seed, f"input/{length}", length)
            ids = [int(x % np.uint64(config["vocab_size"])) for x in u]
            edges = {0, 1, 3, 4, 7, 127, 128, 131, 255, 256, 511, 1023, 1024, length - 2, length - 1}
            rng = random.Random(f"{seed}/{length}")
            edges |= {rng.randrange(length) for _ in range(3)}
            positions = sorted(p for p in edges if 0 <= p < length)
            logits, streams, mtp = oracle.run(ids)
            name = f"len{length}"
            arrays[name + ".input_ids"] = np.array(ids, np.int32)
            arrays[name + ".positions"] = np.array(positions, np.int32)
            arrays[name + ".logits"] = logits[positions].numpy()
            arrays[name + ".streams"] = streams[:, positions].numpy()
            if mtp is not None:
                mtp_positions = [p for p in positions if p < length - 1]
                arrays[name + ".mtp_positions"] = np.array(mtp_positions, np.int32)
                arrays[name + ".mtp_logits"] = mtp[mtp_positions].numpy()
    return arrays, rules, weights, decisions.closest


# ---- files ----------------------------------------------------------------------------------------------------------

NUMPY = {"F32": np.float32, "I32": np.int32, "I64": np.int64}


def write_safetensors(path, arrays, bf16=()):
    header, offset, data = {}, 0, []
    for name, array in arrays.items():
        array = np.ascontiguousarray(array)
        dtype = next(k for k, v in NUMPY.items() if v == array.dtype)
        raw = array.tobytes()
        if name in bf16:
            dtype, raw = "BF16", (array.view(np.uint32) >> 16).astype(np.uint16).tobytes()
        header[name] = dict(dtype=dtype, shape=list(array.shape), data_offsets=[offset, offset + len(raw)])
        offset += len(raw)
        data.append(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    pathlib.Path(path).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data))


def read_safetensors(path):
    raw = pathlib.Path(path).read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    arrays = {}
    for name, entry in json.loads(raw[8:8 + size]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            arrays[name] = np.frombuffer(raw[8 + size + begin:8 + size + end], NUMPY[entry["dtype"]]).reshape(entry["shape"])
    return arrays


def write_model(directory, config, rules, weights):
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    write_safetensors(directory / "model.safetensors", weights, {r["name"] for r in rules if r["dtype"] == "BF16"})


def score(millrace, model_dir, arrays, mtp):
    with tempfile.TemporaryDirectory() as scratch:
        given, result = os.path.join(scratch, "in.safetensors"), os.path.join(scratch, "out.safetensors")
        write_safetensors(given, {k: v for k, v in arrays.items() if k.endswith((".input_ids", ".positions"))})
        command = [millrace, "score", model_dir, "--input", given, "--output", result, "--numerics", "exact", "--streams"]
        subprocess.run(command + (["--mtp"] if mtp else []), check=True)
        return read_safetensors(result)


def differences(expected, found):
    """Greatest absolute difference of logits, streams and MTP logits."""
    worst = {"logits": 0.0, "streams": 0.0, "mtp_logits": 0.0}
    for name, array in expected.items():
        case, kind = name.rsplit(".", 1)
        if kind not in worst:
            continue
        ours = found[name]
        if kind == "mtp_logits":  # `score` may report more positions than the goldens list
            rows = {p: i for i, p in enumerate(found[case + ".mtp_positions"].tolist())}
            ours = ours[[rows[p] for p in expected[case + ".mtp_positions"].tolist()]]
        difference = np.abs(array - ours).max() if array.shape == ours.shape else math.inf
        worst[kind] = max(worst[kind], float(difference) if np.isfinite(difference) else math.inf)
    return worst


def report(name, worst, closest):
    ok = max(worst.values()) <= BOUND
    print(f"{'ok  ' if ok else 'FAIL'} {name}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()) +
          f", closest decision {closest:.1e}", flush=True)
    return ok


# ---- commands -------------------------------------------------------------------------------------------------------


def store(args):
    for name, spec in STORED.items():
        config = full_config(spec["config"])
        for seed in range(1, 200):
            arrays, rules, _, closest = goldens(config, seed, spec["lengths"])
            if closest >= NEAR_TIE:
                break
            print(f"{name}: seed {seed} has a decision as close as {closest:.1e}, trying the next", flush=True)
        directory = ROOT / "tests" / "data" / name
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        listed = ",\n  ".join(json.dumps(rule) for rule in rules)
        (directory / "golden.json").write_text(
            f'{{\n "seed": {seed},\n "closest_decision": {closest:.3g},\n "tensors": [\n  {listed}\n ]\n}}\n')
        write_safetensors(directory / "golden.safetensors", arrays)
        size = sum(f.stat().st_size for f in directory.iterdir())
        greatest = max(np.abs(v).max() for k, v in arrays.items() if k.endswith(".streams"))
        print(f"{name}: seed {seed}, {size} bytes, streams up to {greatest:.1f}, closest decision {closest:.1e}")
    return True


def check(args):
    ok = True
    for name, spec in STORED.items():
        directory = ROOT / "tests" / "data" / name
        stored = read_safetensors(directory / "golden.safetensors")
        seed = json.loads((directory / "golden.json").read_text())["seed"]
        config = full_config(spec["config"])
        assert config == json.loads((directory / "config.json").read_text()), f"{name}: config.json was edited"
        arrays, rules, weights, closest = goldens(config, seed, spec["lengths"])
        ok &= report(name + " recomputed", differences(stored, arrays), closest)
        if args.millrace:
            with tempfile.TemporaryDirectory() as model_dir:
                write_model(model_dir, config, rules, weights)
                found = score(args.millrace, model_dir, stored, config["num_nextn_predict_layers"])
            ok &= report(name + " millrace", differences(stored, found), closest)
    return ok


def fuzz(args):
    ok = True
    for seed in range(args.seed, args.seed + args.count):
        spec = random_config(random.Random(seed))
        config = full_config(spec["config"])
        print(f"seed {seed}: {json.dumps(spec)}", flush=True)
        arrays, rules, weights, closest = goldens(config, seed, spec["lengths"])
        with tempfile.TemporaryDirectory() as model_dir:
            write_model(model_dir, config, rules, weights)
            found = score(args.millrace, model_dir, arrays, config["num_nextn_predict_layers"])
        # A decision closer than rounding may fall either way; such a configuration says nothing.
        if not report(f"seed {seed}", differences(arrays, found), closest):
            ok &= closest < NEAR_TIE
    return ok


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["store", "check", "fuzz"])
    parser.add_argument("--millrace", default=str(ROOT / "build" / "release" / "bin" / "millrace"),
                        help="binary whose `score` is compared; empty: none")
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return 0 if {"store": store, "check": check, "fuzz": fuzz}[args.command](args) else 1


if __name__ == "__main__":
    sys.exit(main())
