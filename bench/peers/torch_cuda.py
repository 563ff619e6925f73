#!/usr/bin/env python3
"""The preset `moe-1b` of cadre in PyTorch on one GPU, as a competent user would write it; timed on random tokens.

    python3 bench/peers/torch_cuda.py                    # torch.compile, bf16 products, fp32 weights, 10 timed steps
    python3 bench/peers/torch_cuda.py --eager            # without torch.compile
    python3 bench/peers/torch_cuda.py --tiny             # a small model on the processor: whether the script runs

Qwen3-MoE form: RMSNorm, grouped-query attention with a norm per head and rotary positions, SwiGLU experts, softmax router
whose top K are normalised, load-balancing and z-loss, untied head. Dropless: choices are sorted by expert, and grouped
products (grouped_mm) run over the sorted rows. Fused AdamW on fp32 weights, gradients clipped to norm 1. No step waits for
the device: times are those of events on its stream. Each line printed is a JSON object, the last one is the figure. Needs
torch 2.8 or later; nothing is downloaded.
"""
import argparse
import gc
import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

# As src/train/preset.c and src/model/config.c have them; compare `parameters` with `cadre inspect --preset moe-1b`. Letters:
# B sequences at a time, T sequence length, S = B*T tokens, D width, F expert width, H heads, G key-value heads, P head width,
# V vocabulary, L blocks, E experts, K experts a token.
MOE_1B = dict(V=32768, D=2048, L=12, H=16, G=4, P=128, E=8, K=2, F=1536, B=32, T=1024)
TINY = dict(V=512, D=64, L=2, H=4, G=2, P=16, E=4, K=2, F=64, B=2, T=32)
EPSILON, ROPE_THETA, INIT_DEVIATION = 1e-6, 10000.0, 0.02
BALANCE_COEFFICIENT, Z_COEFFICIENT = 0.01, 0.001
PRODUCT = torch.bfloat16
MATMUL_SIZE = 8192

grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


def say(text):
    print(text, file=sys.stderr, flush=True)


def weight(*shape):
    return nn.Parameter(torch.empty(shape).normal_(std=INIT_DEVIATION))


def linear(x, w):
    """A product in bf16 of an fp32 weight: cast once a forward, as autocast does."""
    return F.linear(x, w.to(PRODUCT))


def rms_norm(x, scale):
    """In float32; the result in the dtype of the products that read it."""
    return F.rms_norm(x.float(), scale.shape, scale, EPSILON).to(PRODUCT)


def rotate(x, cos, sin):
    """x [B,T,heads,P]; cos, sin [T,1,P]."""
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


class Spread(torch.autograd.Function):
    """x [S,D] -> rows [S*K,D], each token once for each of its choices, in the order of the experts. Backward adds what came
    of a token's rows, which are found by the inverse permutation: no atomic additions."""

    @staticmethod
    def forward(ctx, x, order, inverse, choices):
        ctx.save_for_backward(inverse)
        ctx.choices = choices
        return x[order // choices]

    @staticmethod
    def backward(ctx, d):
        (inverse,) = ctx.saved_tensors
        return d[inverse].view(-1, ctx.choices, d.shape[-1]).sum(1), None, None, None


class Gather(torch.autograd.Function):
    """rows [S*K,D] -> y [S,D], the sum of each token's rows; Spread the other way round."""

    @staticmethod
    def forward(ctx, rows, order, inverse, choices):
        ctx.save_for_backward(order)
        ctx.choices = choices
        return rows[inverse].view(-1, choices, rows.shape[-1]).sum(1)

    @staticmethod
    def backward(ctx, d):
        (order,) = ctx.saved_tensors
        return d[order // ctx.choices], None, None, None


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        wide, narrow = c["H"] * c["P"], c["G"] * c["P"]
        self.query, self.key, self.value = weight(wide, c["D"]), weight(narrow, c["D"]), weight(narrow, c["D"])
        self.output = weight(c["D"], wide)
        self.query_norm, self.key_norm = nn.Parameter(torch.ones(c["P"])), nn.Parameter(torch.ones(c["P"]))

    def forward(self, x, cos, sin):
        c, (batch, length, _) = self.c, x.shape
        q, k, v = (linear(x, w).view(batch, length, -1, c["P"]) for w in (self.query, self.key, self.value))
        q = rotate(rms_norm(q, self.query_norm), cos, sin)
        k = rotate(rms_norm(k, self.key_norm), cos, sin)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c["G"] < c["H"])
        return linear(y.transpose(1, 2).reshape(batch, length, -1), self.output)


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.router = weight(c["E"], c["D"])
        self.gate_up, self.down = weight(c["E"], 2 * c["F"], c["D"]), weight(c["E"], c["D"], c["F"])

    def forward(self, x):
        """x [B,T,D] -> the experts' answer, and the router's loss of this block."""
        c, shape = self.c, x.shape
        x = x.reshape(-1, shape[-1])
        logits = F.linear(x.float(), self.router)  # rounding here flips choices
        prob = logits.softmax(-1)
        share, expert = prob.topk(c["K"], -1)
        share = share / share.sum(-1, keepdim=True)

        expert = expert.flatten()
        order = expert.argsort()  # choices s*K+k, by expert
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        count = (expert.unsqueeze(-1) == torch.arange(c["E"], device=x.device)).sum(0)  # bincount would wait for the device
        offsets = count.cumsum(0).to(torch.int32)
        rows = Spread.apply(x, order, inverse, c["K"])
        gate, up = grouped_mm(rows, self.gate_up.to(PRODUCT).transpose(-2, -1), offs=offsets).chunk(2, -1)
        act = (F.silu(gate.float()) * up.float() * share.flatten()[order].unsqueeze(-1)).to(PRODUCT)
        rows = grouped_mm(act, self.down.to(PRODUCT).transpose(-2, -1), offs=offsets)
        y = Gather.apply(rows, order, inverse, c["K"])

        balance = c["E"] * (count / x.shape[0] * prob.mean(0)).sum()
        loss = BALANCE_COEFFICIENT * balance + Z_COEFFICIENT * logits.logsumexp(-1).square().mean()
        return y.view(shape), loss


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.Parameter(torch.ones(c["D"])), nn.Parameter(torch.ones(c["D"]))
        self.attention, self.mlp = Attention(c), MoE(c)

    def forward(self, x, cos, sin):
        x = x + self.attention(rms_norm(x, self.attention_norm), cos, sin)
        y, loss = self.mlp(rms_norm(x, self.mlp_norm))
        return x + y, loss


class Model(nn.Module):
    def __init__(self, c, residual):
        super().__init__()
        self.c, self.residual = c, residual
        self.embedding, self.head = weight(c["V"], c["D"]), weight(c["V"], c["D"])
        self.blocks = nn.ModuleList(Block(c) for _ in range(c["L"]))
        self.norm = nn.Parameter(torch.ones(c["D"]))
        frequency = ROPE_THETA ** (-torch.arange(0, c["P"], 2) / c["P"])
        angle = torch.outer(torch.arange(c["T"]), frequency).repeat(1, 2).unsqueeze(1)
        self.register_buffer("cos", angle.cos().to(PRODUCT), persistent=False)
        self.register_buffer("sin", angle.sin().to(PRODUCT), persistent=False)

    def loss(self, x, targets):
        logits = linear(rms_norm(x, self.norm), self.head)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def forward(self, ids, targets):
        x = F.embedding(ids, self.embedding).to(self.residual)
        router_loss = 0.0
        for block in self.blocks:
            x, loss = block(x, self.cos, self.sin)
            router_loss = router_loss + loss / self.c["L"]
        return self.loss(x, targets) + router_loss


def make_optimizer(model):
    """AdamW with decay on matrices only."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, fused=True, lr=1e-5, betas=(0.9, 0.95), eps=1e-8)


# ---- clocks --------------------------------------------------------------------------------------------------------------


class Clock:
    """Marks on the device's stream; on the processor, of time.perf_counter."""

    def __init__(self, cuda):
        self.cuda, self.marks = cuda, []

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(time.perf_counter())

    def seconds(self):
        """Between neighbouring marks, when all is done."""
        pairs = zip(self.marks, self.marks[1:])
        if not self.cuda:
            return [b - a for a, b in pairs]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1000 for a, b in pairs]


def time_calls(call, cuda, calls, warmup=2):
    for _ in range(warmup):
        call()
    clock = Clock(cuda)
    clock.mark()
    for _ in range(calls):
        call()
        clock.mark()
    return clock.seconds()


def matmul_rate(device, size):
    """Operations a second of the largest dense product in bf16, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=PRODUCT) for _ in range(2))
    return 2 * size**3 / min(time_calls(lambda: a @ b.t(), device == "cuda", 10))


def choose_attention(c):
    """The fastest fused attention that this torch has here, forward and backward at the model's shape; it stays set."""
    backends = torch.backends.cuda

    def allow(name):
        backends.enable_flash_sdp(name == "flash")
        backends.enable_cudnn_sdp(name == "cudnn")
        backends.enable_mem_efficient_sdp(False)
        backends.enable_math_sdp(False)

    def tensors(heads):
        return torch.randn(c["B"], c["T"], heads, c["P"], device="cuda", dtype=PRODUCT).transpose(1, 2).requires_grad_()

    times = {}
    for name in ("flash", "cudnn"):
        q, k, v = tensors(c["H"]), tensors(c["G"]), tensors(c["G"])
        allow(name)

        def call():
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=c["G"] < c["H"])
            torch.autograd.grad(y, (q, k, v), y)

        try:
            times[name] = statistics.median(time_calls(call, True, 5))
        except RuntimeError as error:
            say(f"attention by {name}: {str(error).splitlines()[0]}")
    if not times:
        for enable in (backends.enable_mem_efficient_sdp, backends.enable_math_sdp):
            enable(True)
        return "not fused", None
    best = min(times, key=times.get)
    allow(best)
    return best, {name: 1e3 * seconds for name, seconds in times.items()}


# ---- the run -------------------------------------------------------------------------------------------------------------


def run(c, arguments, device, compiled):
    """Times steps of a batch in micro-batches of c["B"] sequences. Returns seconds a step, losses, and the model."""
    torch.manual_seed(1)
    model = Model(c, torch.float32 if arguments.residual == "fp32" else PRODUCT).to(device)
    forward = model
    if compiled and arguments.compile == "whole":
        forward = torch.compile(model, mode=arguments.mode, dynamic=False)
    elif compiled:
        for block in model.blocks:
            block.compile(mode=arguments.mode, dynamic=False)
        model.loss = torch.compile(model.loss, mode=arguments.mode, dynamic=False)
    optimizer = make_optimizer(model)
    parameters = list(model.parameters())
    ids = torch.randint(c["V"], (arguments.batch, c["T"] + 1), device=device)
    micro_batches, losses = ids.split(c["B"]), []

    def step():
        optimizer.zero_grad(set_to_none=True)
        for micro in micro_batches:
            loss = forward(micro[:, :-1], micro[:, 1:]) / len(micro_batches)
            loss.backward()
            losses.append(loss.detach())
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()

    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    say(f"first step, with all that is compiled: {time.perf_counter() - begin:.1f} s")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = time_calls(step, device == "cuda", arguments.steps, arguments.warmup)
    count = len(micro_batches)
    return seconds, [float(sum(losses[i : i + count])) for i in range(0, len(losses), count)], model


def attempt(c, arguments, device, compiled):
    """The run with as many sequences at a time as fit: half as many whenever memory is short."""
    while True:
        try:
            return run(c, arguments, device, compiled)
        except torch.OutOfMemoryError as error:
            if c["B"] == 1:
                raise
            say(f"{c['B']} sequences at a time: {str(error).splitlines()[0]}")
        c["B"] //= 2
        say(f"now {c['B']} at a time, gradients added up over the batch")
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def measure(c, arguments, device):
    """As asked for, or without torch.compile where that fails: then the reason is in the figure."""
    if arguments.eager:
        return attempt(c, arguments, device, False) + (False, None)
    try:
        return attempt(c, arguments, device, True) + (True, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - of many kinds: no compiler, no headers, an operation it does not know
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    say(f"torch.compile failed, eager instead: {reason}")
    gc.collect()
    torch.compiler.reset()
    return attempt(c, arguments, device, False) + (False, reason)


def operations_per_token(c):
    """As cadre counts: 6 a parameter that a token multiplies with, and attention below the diagonal."""
    attention = c["D"] * c["P"] * (2 * c["H"] + 2 * c["G"])
    experts = c["D"] * c["E"] + 3 * c["K"] * c["D"] * c["F"]
    return 6 * (c["L"] * (attention + experts) + c["V"] * c["D"]) + 6 * c["L"] * c["H"] * c["P"] * c["T"]


def read_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10, help="timed (10)")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, after the first (2)")
    parser.add_argument("--batch", type=int, default=0, help="sequences in a step (32)")
    parser.add_argument("--micro", type=int, default=0, help="of these at a time (all)")
    parser.add_argument("--sequence-length", type=int, default=0, help="tokens of a sequence (1024)")
    parser.add_argument("--residual", choices=("fp32", "bf16"), default="fp32", help="the stream between blocks; cadre: fp32")
    parser.add_argument("--compile", choices=("blocks", "whole"), default="blocks", help="of the default: a block, once for "
                        "all of them, and the loss; or the whole model, which takes minutes (blocks)")  # fmt: skip
    parser.add_argument("--mode", default="default", help="of torch.compile: default, reduce-overhead, max-autotune, ...")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--tiny", action="store_true", help="a small model on the processor")
    arguments = parser.parse_args()
    if arguments.steps < 1 or arguments.warmup < 0:
        parser.error("--steps is at least 1, --warmup at least 0")
    return arguments


def main():
    arguments = read_arguments()
    if not grouped_mm:
        sys.exit(f"torch {torch.__version__} has no grouped_mm")
    if not arguments.tiny and not torch.cuda.is_available():
        sys.exit("torch finds no GPU; --tiny runs a small model on the processor")
    device = "cpu" if arguments.tiny else "cuda"
    c = dict(TINY if arguments.tiny else MOE_1B)
    c["T"] = arguments.sequence_length or c["T"]
    arguments.batch = arguments.batch or c["B"]
    c["B"] = min(arguments.micro or arguments.batch, arguments.batch)
    size = 256 if arguments.tiny else MATMUL_SIZE
    name = "cpu" if arguments.tiny else torch.cuda.get_device_name()

    rate = matmul_rate(device, size)
    print(json.dumps({"name": "peer_matmul", "peer": f"torch {torch.__version__}", "device": name, "precision": "bf16",
                      "case": f"{size}^3", "gflops": 1e-9 * rate}), flush=True)  # fmt: skip
    attention, attention_ms = ("default", None) if arguments.tiny else choose_attention(c)
    gc.collect()
    seconds, losses, model, compiled, reason = measure(c, arguments, device)
    rate = max(rate, matmul_rate(device, size))  # once more, on the warm machine
    median, tokens = statistics.median(seconds), arguments.batch * c["T"]
    achieved = operations_per_token(c) * tokens / median
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device == "cuda" else (None, None)
    print(json.dumps({
        "name": "peer_train", "peer": f"torch {torch.__version__}", "device": name, "case": "tiny" if arguments.tiny else "moe-1b",
        "precision": "bf16", "residual": arguments.residual, "compiled": arguments.compile if compiled else None,
        "mode": arguments.mode if compiled else None,
        "not_compiled_because": reason, "attention": attention, "attention_ms": attention_ms, "optimizer": "fused",
        "parameters": sum(p.numel() for p in model.parameters()), "batch_sequences": arguments.batch,
        "micro_batch_sequences": c["B"], "sequence_length": c["T"], "steps": len(seconds), "tokens_per_s": tokens / median,
        "ms": 1e3 * median, "ms_least": 1e3 * min(seconds), "ms_most": 1e3 * max(seconds), "gflops": 1e-9 * achieved,
        "roof_gflops": 1e-9 * rate, "share": achieved / rate, "peak_bytes": peak[0], "peak_reserved_bytes": peak[1],
        "loss_first": losses[0], "loss_last": losses[-1],
    }))  # fmt: skip


if __name__ == "__main__":
    main()
