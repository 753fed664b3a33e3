#!/usr/bin/env python3
"""Times dragon-nn and PyTorch in turn on the same work and prints the ratio of the minima.

Usage: cargo xtask bench --peers [--rounds N] [--seconds S] [--only SUBSTRING] [--threads N] [--markdown]

Makes a virtual environment with PyTorch from PyPI under target/peers unless this Python has it already. Both sides
take turns within each round, so that a slow moment of the machine hits both; the minimum over all rounds counts.
Memory: each side runs one case in a process of its own and reports the peak of its resident memory, less that of a
process that runs a trivial case.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]

FORWARD = [
    "linear_192_768",
    "linear_512_2048",
    "conv1d_16_k7",
    "conv1d_64_k7",
    "conv1d_64_k7_d9",
    "conv1d_64_s4",
    "conv1d_512_k7",
    "conv_transpose1d_s4",
    "conv_transpose1d_s8",
    "attention_80",
    "attention_1024",
    "codec_encode",
    "codec_decode",
    "transformer_192x6",
    "transformer_512x8",
]
CASES = [c + s for c in FORWARD for s in ("", "+bwd")] + ["transformer_192x6_step", "transformer_512x8_step"]
MEMORY = ["codec_encode+bwd", "codec_decode+bwd", "transformer_192x6_step", "transformer_512x8_step"]


def environment():
    """Starts this script again under a Python that has PyTorch, if the present one has not."""
    try:
        import torch  # noqa: F401

        return
    except ImportError:
        pass
    venv = ROOT / "target" / "peers"
    python = venv / "bin" / "python"
    if not python.exists():
        print("making a virtual environment with PyTorch (once) …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "torch", "numpy"], check=True)
    os.execv(str(python), [str(python), __file__, *sys.argv[1:]])


def torch_case(name):
    """A function that runs the case once."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    backward = name.endswith("+bwd")
    kind = name.removesuffix("+bwd")
    torch.manual_seed(0)

    def operation(shapes, f):
        tensors = [torch.randn(s) * (0.05 if backward else 1.0) for s in shapes]
        for t in tensors:
            t.requires_grad_(backward)

        def run():
            if backward:
                for t in tensors:
                    t.grad = None
                f(*tensors).square().sum().backward()
            else:
                with torch.no_grad():
                    f(*tensors)

        return run

    # PyTorch's own layout, channels before time.
    conv = {
        "conv1d_16_k7": ((2, 16, 81920), (16, 16, 7), dict(padding=3)),
        "conv1d_64_k7": ((4, 64, 8192), (64, 64, 7), dict(padding=3)),
        "conv1d_64_k7_d9": ((4, 64, 8192), (64, 64, 7), dict(padding=27, dilation=9)),
        "conv1d_64_s4": ((4, 64, 8192), (128, 64, 8), dict(padding=2, stride=4)),
        "conv1d_512_k7": ((4, 512, 320), (512, 512, 7), dict(padding=3)),
    }
    if kind in conv:
        x, w, kw = conv[kind]
        return operation([x, w, (w[0],)], lambda x, w, b: F.conv1d(x, w, b, **kw))
    if kind == "conv_transpose1d_s4":
        shapes = [(4, 128, 2048), (128, 64, 8), (64,)]
        return operation(shapes, lambda x, w, b: F.conv_transpose1d(x, w, b, stride=4, padding=2))
    if kind == "conv_transpose1d_s8":
        shapes = [(4, 512, 80), (512, 256, 16), (256,)]
        return operation(shapes, lambda x, w, b: F.conv_transpose1d(x, w, b, stride=8, padding=4))
    if kind == "linear_512_2048":
        return operation([(640, 512), (2048, 512), (2048,)], F.linear)
    if kind == "linear_192_768":
        return operation([(1280, 192), (768, 192), (768,)], F.linear)
    attention = {"attention_80": (16, 6, 80, 32), "attention_1024": (2, 8, 1024, 64)}
    if kind in attention:
        return operation([attention[kind]] * 3, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.2))

    class Block(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
            self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)
            self.heads = heads

        def forward(self, x):
            b, t, c = x.shape
            h = F.layer_norm(x, (c,))
            q, k, v = (f(h).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
            x = x + self.out(h)
            gate, value = self.up(F.layer_norm(x, (c,))).chunk(2, -1)
            return x + self.down(F.silu(gate) * value)

    def network(model, x, step):
        parameters = list(model.parameters())
        optimiser = torch.optim.AdamW(parameters, fused=True) if step else None

        def run():
            if not (backward or step):
                with torch.no_grad():
                    model(x)
                return
            for p in parameters:
                p.grad = None
            model(x).square().mean().backward()
            if step:
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimiser.step()

        return run

    if kind.startswith("transformer"):
        width, depth = map(int, kind.split("_")[1].split("x"))
        heads, batch = (6, 16) if width == 192 else (8, 8)
        model = nn.Sequential(*[Block(width, heads) for _ in range(depth)])
        return network(model, torch.randn(batch, 80, width), kind.endswith("step"))

    # As `descript-audio-codec` has it: PyTorch compiles this activation with TorchScript.
    @torch.jit.script
    def snake(x, alpha):
        return x + (alpha + 1e-9).reciprocal() * torch.sin(alpha * x).pow(2)

    class Snake(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(1, c, 1))

        def forward(self, x):
            return snake(x, self.alpha)

    class Unit(nn.Module):
        def __init__(self, c, d):
            super().__init__()
            self.f = nn.Sequential(
                Snake(c), nn.Conv1d(c, c, 7, padding=3 * d, dilation=d), Snake(c), nn.Conv1d(c, c, 1)
            )

        def forward(self, x):
            return x + self.f(x)

    widths, strides = [16 << i for i in range(5)], [4, 4, 8, 8]
    layers = []
    if kind == "codec_encode":
        layers.append(nn.Conv1d(1, widths[0], 7, padding=3))
        for i, s in enumerate(strides):
            layers += [Unit(widths[i], d) for d in (1, 3, 9)]
            layers += [Snake(widths[i]), nn.Conv1d(widths[i], widths[i + 1], 2 * s, stride=s, padding=s // 2)]
        layers.append(nn.Conv1d(widths[4], 64, 3, padding=1))
        return network(nn.Sequential(*layers), torch.randn(2, 1, 40960), False)
    assert kind == "codec_decode", name
    layers.append(nn.Conv1d(32, widths[4], 7, padding=3))
    for i in range(4):
        s, a, b = strides[3 - i], widths[4 - i], widths[3 - i]
        layers += [Snake(a), nn.ConvTranspose1d(a, b, 2 * s, stride=s, padding=s // 2)]
        layers += [Unit(b, d) for d in (1, 3, 9)]
    layers += [Snake(widths[0]), nn.Conv1d(widths[0], 1, 7, padding=3)]
    return network(nn.Sequential(*layers), torch.randn(2, 32, 40), False)


def serve_torch(threads):
    """PyTorch's side of the protocol of `examples/peers.rs`."""
    import resource

    import torch

    torch.set_num_threads(threads)
    for line in sys.stdin:
        name, seconds = line.split()
        run = torch_case(name)
        run()
        start, best, n = time.perf_counter(), float("inf"), 0
        while n < 2 or time.perf_counter() - start < float(seconds):
            begin = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begin)
            n += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(name, best, peak, flush=True)


class Side:
    """A process that runs cases on request."""

    def __init__(self, command, threads):
        env = dict(os.environ, RAYON_NUM_THREADS=str(threads), OMP_NUM_THREADS=str(threads))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def run(self, case, seconds):
        self.process.stdin.write(f"{case} {seconds}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) != 3:
            sys.exit(f"error: a side stopped on `{case}`")
        return float(answer[1]), int(answer[2])

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case, side and round")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    environment()
    if args.serve:
        return serve_torch(args.threads)

    binary = ROOT / "target" / "release" / "examples" / "peers"
    if not binary.exists():
        sys.exit(f"error: `{binary}` is missing; start this script with `cargo xtask bench --peers`")
    ours = [str(binary)]
    theirs = [sys.executable, __file__, "--serve", "--threads", str(args.threads)]
    sides = [Side(ours, args.threads), Side(theirs, args.threads)]
    cases = [c for c in CASES if args.only in c]
    best = {c: [float("inf")] * 2 for c in cases}
    for round_ in range(args.rounds):
        for case in cases:
            for i, side in enumerate(sides):
                seconds, _ = side.run(case, args.seconds)
                best[case][i] = min(best[case][i], seconds)
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    for side in sides:
        side.close()

    import torch

    print(f"{args.rounds} rounds of {args.seconds} s, {args.threads} threads, torch {torch.__version__}\n")
    print("| case | dragon-nn (ms) | PyTorch (ms) | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for case, (a, b) in best.items():
        print(f"| `{case}` | {1e3 * a:.2f} | {1e3 * b:.2f} | {a / b:.2f} |")

    memory = [c for c in MEMORY if args.only in c]
    if memory:
        print("\n| peak memory above an idle process | dragon-nn (MiB) | PyTorch (MiB) | ratio |")
        print("| --- | ---: | ---: | ---: |")
    for case in memory:
        peaks = []
        for command in (ours, theirs):
            peak = {}
            for name in ("linear_192_768", case):
                side = Side(command, args.threads)
                peak[name] = side.run(name, 0.1)[1]
                side.close()
            peaks.append(peak[case] - peak["linear_192_768"])
        print(f"| `{case}` | {peaks[0]} | {peaks[1]} | {peaks[0] / max(peaks[1], 1):.2f} |")


if __name__ == "__main__":
    main()
