#!/usr/bin/env python3
"""The presets `bench` and `bench-dense` of cadre in PyTorch, as a competent user would write them; timed on random tokens.

    python3 bench/peers/torch_train.py --preset bench --precision bf16 --threads 2 --steps 3

Qwen3-MoE form: RMSNorm, grouped-query attention with a norm per head and rotary positions, SwiGLU experts, softmax router
whose top K are normalised, load-balancing and z-loss, untied head. Dropless: tokens are sorted by expert, and each expert
takes its rows. AdamW, gradients clipped to norm 1. The last line printed is one JSON object. Works with torch 1.13 and
later, and takes what a newer one offers: scaled_dot_product_attention, fused AdamW, torch.compile.
"""
import argparse
import contextlib
import inspect
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# As src/train/preset.c and src/model/config.c have them; bench/peers/run compares the number of parameters with
# `cadre inspect`. Letters: B batch, T sequence length, S = B*T, D width, F expert width, H heads, G key-value heads,
# P head width, V vocabulary, L blocks, E experts (0: dense), K experts a token.
BENCH = dict(V=8192, D=512, L=8, H=8, G=8, P=64, E=8, K=2, F=1024, B=8, T=512)
PRESETS = {"bench": BENCH, "bench-dense": dict(BENCH, E=0, F=2048)}
EPSILON, ROPE_THETA, INIT_DEVIATION = 1e-6, 10000.0, 0.02
BALANCE_COEFFICIENT, Z_COEFFICIENT = 0.01, 0.001


class RMSNorm(nn.Module):
    """In float32; the result in the dtype of the products that read it, so that each does not cast it again."""

    def __init__(self, width, c):
        super().__init__()
        self.dtype = c["dtype"]
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x.float()
        if hasattr(F, "rms_norm"):
            y = F.rms_norm(x, self.weight.shape, self.weight, EPSILON)
        else:
            y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * self.weight
        return y.to(self.dtype)


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


def rotate(x, cos, sin):
    """x [B,H,T,P]; cos, sin [T,P]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def causal_attention(q, k, v):
    """q, k, v [B,H,T,P]."""
    if hasattr(F, "scaled_dot_product_attention"):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    length = q.shape[-2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.query, self.key = linear(c["D"], c["H"] * c["P"]), linear(c["D"], c["G"] * c["P"])
        self.value, self.output = linear(c["D"], c["G"] * c["P"]), linear(c["H"] * c["P"], c["D"])
        self.query_norm, self.key_norm = RMSNorm(c["P"], c), RMSNorm(c["P"], c)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.c["P"])
        q = rotate(self.query_norm(self.query(x).view(heads)).transpose(1, 2), cos, sin)
        k = rotate(self.key_norm(self.key(x).view(heads)).transpose(1, 2), cos, sin)
        v = self.value(x).view(heads).transpose(1, 2)
        if self.c["G"] < self.c["H"]:
            k, v = (y.repeat_interleave(self.c["H"] // self.c["G"], 1) for y in (k, v))
        return self.output(causal_attention(q, k, v).transpose(1, 2).reshape(batch, length, -1))


class SwiGLU(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up, self.down = linear(width, inner), linear(width, inner), linear(inner, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.router = linear(c["D"], c["E"])
        self.experts = nn.ModuleList(SwiGLU(c["D"], c["F"]) for _ in range(c["E"]))

    def forward(self, x):
        """x [B,T,D] -> the experts' answer, and the router's loss of this block."""
        shape, experts = x.shape, self.c["E"]
        x = x.reshape(-1, shape[-1])
        with torch.autocast("cpu", enabled=False):  # rounding here flips choices
            logits = self.router(x.float())
            prob = logits.softmax(-1)
        weight, expert = prob.topk(self.c["K"], -1)
        weight = weight / weight.sum(-1, keepdim=True)

        order = expert.flatten().argsort()  # choices s*K+k, by expert
        token = torch.div(order, self.c["K"], rounding_mode="floor")
        count = expert.flatten().bincount(minlength=experts)
        row_weight = weight.flatten().index_select(0, order).unsqueeze(-1).to(x.dtype)
        y, begin = torch.zeros_like(x), 0
        for one, rows in zip(self.experts, count.tolist()):
            if rows > 0:
                mine = slice(begin, begin + rows)
                y = y.index_add_(0, token[mine], one(x.index_select(0, token[mine])) * row_weight[mine])
            begin += rows

        balance = experts * (count / x.shape[0] * prob.mean(0)).sum()
        loss = BALANCE_COEFFICIENT * balance + Z_COEFFICIENT * logits.logsumexp(-1).square().mean()
        return y.view(shape), loss


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention_norm, self.mlp_norm = RMSNorm(c["D"], c), RMSNorm(c["D"], c)
        self.attention = Attention(c)
        self.mlp = MoE(c) if c["E"] else SwiGLU(c["D"], c["F"])

    def forward(self, x, cos, sin):
        x = x + self.attention(self.attention_norm(x), cos, sin)
        y = self.mlp(self.mlp_norm(x))
        y, loss = y if isinstance(y, tuple) else (y, 0.0)
        return x + y, loss


class Model(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embedding, self.head = nn.Embedding(c["V"], c["D"]), linear(c["D"], c["V"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["L"]))
        self.norm = RMSNorm(c["D"], c)
        for p in self.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=INIT_DEVIATION)
        frequency = ROPE_THETA ** (-torch.arange(0, c["P"], 2) / c["P"])
        angle = torch.outer(torch.arange(c["T"]), frequency).repeat(1, 2)
        self.register_buffer("cos", angle.cos().to(c["dtype"]), persistent=False)
        self.register_buffer("sin", angle.sin().to(c["dtype"]), persistent=False)

    def forward(self, ids, targets):
        x = self.embedding(ids)
        router_loss = 0.0
        for block in self.blocks:
            x, loss = block(x, self.cos, self.sin)
            router_loss = router_loss + loss / self.c["L"]
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) + router_loss


def make_optimizer(model):
    """AdamW with decay on matrices only; fused where this torch has it for processors, else over lists of tensors."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    settings = dict(lr=1e-5, betas=(0.9, 0.95), eps=1e-8)
    if "fused" in inspect.signature(torch.optim.AdamW.__init__).parameters:
        with contextlib.suppress(RuntimeError):  # before 2.4: only for accelerators
            return torch.optim.AdamW(groups, fused=True, **settings), "fused"
    return torch.optim.AdamW(groups, foreach=True, **settings), "foreach"


def process_bytes(key):
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(key + ":"))


def tensor_bytes(tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def storage_of(tensor):
    """Where its memory begins, and how many bytes."""
    storage = tensor.untyped_storage() if hasattr(tensor, "untyped_storage") else tensor.storage().untyped()
    return storage.data_ptr(), storage.nbytes()


def saved_bytes(model, forward, dtype):
    """Memory that a forward keeps for its backward, each piece once, without weights and autocast's copies of them."""
    pieces, weights = {}, {storage_of(p)[0] for p in model.parameters()}

    def note(tensor):
        begin, size = storage_of(tensor)
        if begin not in weights:
            pieces[begin] = size
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    copied = 0
    if dtype == torch.bfloat16:
        linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "router" not in name]
        copied = sum(2 * m.weight.numel() for m in linears)
    return sum(pieces.values()) - copied


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="bench")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's own choice")
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--warmup", type=int, default=1, help="steps before")
    parser.add_argument("--compile", action="store_true", help="torch.compile (2.0 and later, needs a C++ compiler)")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 1:
        parser.error("--steps and --warmup are at least 1")
    if arguments.compile and not hasattr(torch, "compile"):
        parser.error(f"torch {torch.__version__} has no torch.compile")
    return arguments


def main():
    arguments = read_arguments()
    if arguments.threads > 0:
        torch.set_num_threads(arguments.threads)
    base = process_bytes("VmRSS")
    torch.manual_seed(1)
    dtype = torch.bfloat16 if arguments.precision == "bf16" else torch.float32
    c = dict(PRESETS[arguments.preset], dtype=dtype)  # dtype: of products
    model = Model(c)
    run = torch.compile(model) if arguments.compile else model
    optimizer, optimizer_name = make_optimizer(model)
    ids = torch.randint(c["V"], (c["B"], c["T"] + 1))

    def forward():
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return run(ids[:, :-1], ids[:, 1:])

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    seconds = []
    for i in range(arguments.warmup + arguments.steps):
        begin = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - begin)
        print(f"step {i + 1}: {1e3 * seconds[-1]:.0f} ms, loss {loss:.3f}", file=sys.stderr)

    peak, median = process_bytes("VmHWM"), statistics.median(seconds[arguments.warmup :])
    parameters = list(model.parameters())
    moments = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    state = tensor_bytes(parameters) + tensor_bytes(p.grad for p in parameters) + tensor_bytes(moments)
    print(json.dumps({
        "peer": f"torch {torch.__version__}", "preset": arguments.preset, "precision": arguments.precision,
        "threads": torch.get_num_threads(), "compiled": arguments.compile, "optimizer": optimizer_name,
        "attention": "fused" if hasattr(F, "scaled_dot_product_attention") else "softmax",
        "parameters": sum(p.numel() for p in parameters), "tokens_per_s": c["B"] * c["T"] / median, "ms": 1e3 * median,
        "state_bytes": state, "peak_rss_bytes": peak, "base_rss_bytes": base,
        "activation_bytes": peak - base - state,
        "saved_bytes": None if arguments.compile else saved_bytes(model, forward, dtype),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
