"""Trains the demo model on one CUDA GPU.

Muon updates the attention and expert matrices, AdamW the embedding, the router
and the norms. Masters are float32; the model computes with bfloat16 copies.
For the last part of the run the copies are 4-bit quantised and back, the way
MLX does it, so that the shipped 4-bit weights are the ones that were trained.
The schedule follows the clock (`--minutes`), not a step count.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from model import DemoConfig, DemoModel, fake_quantize
from torch import Tensor, nn
from torch.nn import functional

SMALL_CONFIG = DemoConfig(
    hidden_size=64, num_hidden_layers=2, num_experts=16, num_experts_per_tok=4,
    moe_intermediate_size=64, num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip


class TokenStream:
    """Draws windows of one topic, each once per epoch, at a new offset every epoch."""

    def __init__(self, tokens: np.ndarray, length: int, device: str, seed: int) -> None:
        self.tokens = torch.from_numpy(tokens.astype(np.int16)).to(device)
        self.length = length
        self.random = np.random.default_rng(seed)
        self.starts = np.empty(0, dtype=np.int64)
        self.drawn = 0

    def take(self, count: int) -> np.ndarray:
        while len(self.starts) < count:
            first = int(self.random.integers(self.length))
            starts = np.arange(first, len(self.tokens) - self.length - 1, self.length)
            self.random.shuffle(starts)
            self.starts = np.concatenate([self.starts, starts])
        taken, self.starts = self.starts[:count], self.starts[count:]
        self.drawn += count * self.length
        return taken

    def windows(self, starts: np.ndarray) -> Tensor:  # -> [count, length + 1]
        first = torch.from_numpy(starts).to(self.tokens.device)
        index = first[:, None] + torch.arange(self.length + 1, device=first.device)
        return self.tokens[index].long() & 0xFFFF


class Mixture:
    """Batches whose windows come from topics in proportion to tokens ** exponent."""

    def __init__(self, streams: dict[str, TokenStream], exponent: float, seed: int) -> None:
        self.streams = list(streams.values())
        self.random = np.random.default_rng(seed)
        weights = np.array([len(s.tokens) for s in self.streams], dtype=np.float64) ** exponent
        self.shares = weights / weights.sum()

    def batch(self, size: int) -> Tensor:
        counts = self.random.multinomial(size, self.shares)
        return torch.cat(
            [
                stream.windows(stream.take(int(n)))
                for stream, n in zip(self.streams, counts, strict=True)
                if n
            ]
        )


def orthogonalize(g: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz iteration towards the nearest orthogonal matrix, for [..., r, c]."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = g.shape[-2] > g.shape[-1]
    x = g.bfloat16().mT if tall else g.bfloat16()
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        s = x @ x.mT
        x = a * x + (b * s + c * s @ s) @ x
    return x.mT if tall else x


class Optimizer:
    """Owns the float32 masters; `step` also refreshes the model's bfloat16 copies."""

    def __init__(self, model: DemoModel, lr: float, weight_decay: float, compiled: bool) -> None:
        self.model, self.lr, self.weight_decay = model, lr, weight_decay
        self.quantized = False
        groups: dict[tuple[int, ...], list[tuple[str, nn.Parameter]]] = {}
        plain: list[dict] = []
        self.embed = model.embed_tokens
        self.embed_master = self.embed.detach().float().clone()
        plain.append({"params": [self.embed_master], "lr_scale": 1.0, "weight_decay": 0.01})
        for name, p in model.named_parameters():
            if p.dim() == 1 or name.endswith("mlp.gate"):
                scale = 0.5 if p.dim() > 1 else 1.0
                plain.append({"params": [p], "lr_scale": scale, "weight_decay": 0.0})
            elif p is not self.embed:
                groups.setdefault(tuple(p.shape), []).append((name, p))
        self.names = [[name for name, _ in group] for group in groups.values()]
        self.params = [[p for _, p in group] for group in groups.values()]
        self.masters = [torch.stack([p.detach().float() for p in ps]) for ps in self.params]
        self.momenta = [torch.zeros_like(m) for m in self.masters]
        self.adam = torch.optim.AdamW(plain, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True)
        self.update = torch.compile(self._update, dynamic=False) if compiled else self._update
        self.quantizer = torch.compile(fake_quantize, dynamic=False) if compiled else fake_quantize

    @staticmethod
    def _update(master: Tensor, momentum: Tensor, grad: Tensor, lr: Tensor, decay: Tensor) -> None:
        momentum.lerp_(grad.float(), 0.05)
        u = orthogonalize(torch.lerp(grad.float(), momentum, 0.95))
        scale = 0.2 * max(master.shape[-2:]) ** 0.5  # update RMS 0.2, as AdamW's
        master.mul_(1 - lr * decay).sub_(u.float() * (lr * scale))

    @torch.no_grad()
    def refresh(self) -> None:
        """Writes the (quantised) masters into the model's copies."""
        view = self.quantizer if self.quantized else (lambda w: w)
        for params, masters in zip(self.params, self.masters, strict=True):
            torch._foreach_copy_(params, list(view(masters).unbind(0)))
        self.embed.copy_(view(self.embed_master))

    @torch.no_grad()
    def step(self, factor: float) -> None:
        lr = torch.tensor(self.lr * factor, device=self.embed.device)
        decay = torch.tensor(self.weight_decay, device=self.embed.device)
        for params, master, momentum in zip(self.params, self.masters, self.momenta, strict=True):
            self.update(master, momentum, torch.stack([p.grad for p in params]), lr, decay)
        self.embed_master.grad = self.embed.grad.float()
        for group in self.adam.param_groups:
            group["lr"] = self.lr * factor * group["lr_scale"]
        every = [p for g in self.adam.param_groups for p in g["params"]]
        nn.utils.clip_grad_norm_(every, 1.0)
        self.adam.step()
        self.refresh()
        for p in self.model.parameters():
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Master weights by parameter name, on the CPU."""
        out = {"embed_tokens": self.embed_master}
        for names, masters in zip(self.names, self.masters, strict=True):
            out.update(zip(names, masters.unbind(0), strict=True))
        for name, p in self.model.named_parameters():
            out.setdefault(name, p.detach())
        return {name: w.float().cpu().clone() for name, w in out.items()}


def lr_factor(progress: float, step: int, warmup: int, hold: float, floor: float = 0.01) -> float:
    """Linear warm-up, constant until `hold`, then linear down to `floor`."""
    decay = min(1.0, (1.0 - progress) / (1.0 - hold))
    return min(1.0, (step + 1) / warmup) * max(floor, decay)


def evaluate(
    forward: Callable[[Tensor], tuple[Tensor, ...]], tests: dict[str, Tensor], batch: int
) -> dict[str, float]:
    """Mean test loss in nats per token, by topic (not under no_grad: that would recompile)."""
    losses = {}
    for topic, windows in tests.items():
        total = 0.0
        for part in windows.split(batch):
            if len(part) < batch:  # one batch size only: no recompilation
                part = torch.cat([part, part[:1].expand(batch - len(part), -1)])
            total += float(forward(part)[0].detach().mean())
        losses[topic] = total / len(windows.split(batch))
    return losses


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=Path, required=True, help="folder of <topic>.train.npy")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoint and log")
    parser.add_argument("--minutes", type=float, default=12.0, help="training time")
    parser.add_argument("--batch", type=int, default=128, help="windows per step")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.01, help="load-balancing coefficient")
    parser.add_argument("--z-loss", type=float, default=1e-3)
    parser.add_argument("--exponent", type=float, default=0.85, help="topic share: tokens ** this")
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--hold", type=float, default=0.35, help="when the decay starts")
    parser.add_argument("--quantize-from", type=float, default=0.7, help="quantised from here on")
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--max-steps", type=int, default=10**9)
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the code")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main() -> None:
    args = setup_arg_parser().parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    log = open(args.out / "log.jsonl", "a", buffering=1)

    def report(**fields: object) -> None:
        line = json.dumps(fields)
        print(line, flush=True)
        log.write(line + "\n")

    streams, tests = {}, {}
    for path in sorted(args.tokens.glob("*.train.npy")):
        topic = path.name.split(".")[0]
        streams[topic] = TokenStream(np.load(path), args.length, device, args.seed)
        held_out = np.load(path.with_name(f"{topic}.test.npy"))
        test = TokenStream(held_out, args.length, device, 0)
        rows = max(1, (len(held_out) - 1) // args.length)
        picked = np.linspace(0, rows - 1, min(rows, 96)).astype(np.int64) * args.length
        tests[topic] = test.windows(picked)
    mixture = Mixture(streams, args.exponent, args.seed)
    report(shares=dict(zip(streams, mixture.shares.round(4).tolist(), strict=True)))

    config = SMALL_CONFIG if args.small else DemoConfig()
    model = DemoModel(config).to(device)
    for name, p in model.named_parameters():
        if device == "cuda" and p.dim() > 1 and not name.endswith("mlp.gate"):
            p.data = p.data.bfloat16()
    compiled = not args.no_compile and device == "cuda"
    optimizer = Optimizer(model, args.lr, args.weight_decay, compiled)

    def losses(windows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, balance, z, load = model(windows[:, :-1])
        target = windows[:, 1:].flatten()
        token_loss = functional.cross_entropy(
            logits.flatten(0, 1).float(), target, reduction="none"
        )
        return token_loss, balance, z, load

    forward = torch.compile(losses, dynamic=False) if compiled else losses
    # <|endoftext|> is token 0: the tokenizer trainer numbers special tokens first.
    hugging_face = config.to_hugging_face(eos_token_id=0)
    (args.out / "config.json").write_text(json.dumps(hugging_face, indent=2) + "\n")
    report(parameters=sum(p.numel() for p in model.parameters()), device=device)

    started = None
    best = float("inf")
    trained_tokens = 0
    for step in range(args.max_steps):
        if step == 12:  # the clock starts after compilation
            torch.cuda.synchronize() if device == "cuda" else None
            started, trained_tokens = time.perf_counter(), 0
        seconds = 0.0 if started is None else time.perf_counter() - started
        progress = seconds / (60 * args.minutes)
        if progress >= 1:
            break
        optimizer.quantized = progress >= args.quantize_from or (compiled and step == 5)
        windows = mixture.batch(args.batch)
        token_loss, balance, z, load = forward(windows)
        loss = token_loss.mean()
        (loss + args.balance * balance + args.z_loss * z).backward()
        optimizer.step(lr_factor(progress, step, args.warmup, args.hold))
        trained_tokens += args.batch * args.length
        if step % 50 == 0 or step in (1, 2, 5, 11):
            load_now = load.float().cpu()
            report(
                step=step,
                seconds=round(seconds, 1),
                loss=round(float(loss.detach()), 4),
                balance=round(float(balance.detach()), 3),
                z=round(float(z.detach()), 2),
                load_max=round(float(load_now.max()), 4),
                load_min=round(float(load_now.min()), 5),
                tokens_per_second=round(trained_tokens / seconds) if seconds > 1 else 0,
            )
        if step and step % args.eval_every == 0:
            scores = evaluate(forward, tests, args.batch)
            mean = sum(scores.values()) / len(scores)
            report(step=step, seconds=round(seconds, 1), test=scores, mean=mean)
            if mean < best and progress > max(0.8, args.quantize_from):
                best = mean
                torch.save(optimizer.state(), args.out / "best.pt")
    scores = evaluate(forward, tests, args.batch)
    mean = sum(scores.values()) / len(scores)
    epochs = {t: round(s.drawn / len(s.tokens), 2) for t, s in streams.items()}
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    report(
        done=True, steps=step, seconds=seconds, tokens=trained_tokens, epochs=epochs,
        test=scores, mean=mean, best_mean=min(best, mean), peak_bytes=peak,
    )  # fmt: skip
    if mean <= best:
        torch.save(optimizer.state(), args.out / "best.pt")
    (args.out / "done").touch()


if __name__ == "__main__":
    main()
