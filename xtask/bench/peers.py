#!/usr/bin/env python3
"""Times our layers and models and PyTorch's in turn on the same work and prints the ratio of the minima.

Usage: cargo xtask bench --peers [--rounds N] [--seconds S] [--only SUBSTRING] [--threads N]

Makes a virtual environment with PyTorch from PyPI under target/peers (needs a C compiler, as this project does). Both
sides take turns within each round, so that a slow moment of the machine hits both; the minimum over all rounds counts.
Memory: each side runs one case in a process of its own and reports the peak of its resident memory, less that of a
process that runs a trivial case.
"""

import argparse
import os
import pathlib
import re
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TORCH = "2.15.0"
# What `import torch` needs; its other requirements are CUDA libraries of some gigabytes.
PACKAGES = [
    f"torch=={TORCH}", "nvidia-cuda-runtime==13.2.*", "filelock", "typing-extensions", "setuptools", "sympy", "mpmath",
    "networkx", "jinja2", "markupsafe", "fsspec", "numpy",
]  # fmt: skip

LAYERS = [
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
]
MODELS = ["dit_tiny", "dit_512x8", "vae_encode", "vae_decode"]
CASES = [c + s for c in LAYERS for s in ("", "+bwd")] + [c + s for c in MODELS for s in ("", "+bwd", "_step")]
MEMORY = [c + "_step" for c in MODELS]


def environment(script, *more):
    """Starts `script` again under the Python of an environment that has PyTorch and `more` packages (each with its version,
    without what it requires); makes it on the first run."""
    venv = ROOT / "target" / "peers"
    python = venv / "bin" / "python"
    if pathlib.Path(sys.prefix) == venv:
        return
    done = venv / f"torch-{TORCH}"
    if not done.exists():
        print("making a virtual environment with PyTorch (once; downloads about 600 MB) …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(venv)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *PACKAGES], check=True)
        where = "import sysconfig; print(sysconfig.get_path('platlib'))"
        without_cuda(pathlib.Path(output(str(python), "-c", where).strip()) / "torch" / "lib")
        done.touch()
    missing = [p for p in more if not (venv / p).exists()]
    if missing:
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", *missing], check=True)
        for package in missing:
            (venv / package).touch()
    os.execv(str(python), [str(python), script, *sys.argv[1:]])


def example(name, command):
    """Our side, which `command` builds before it starts the script."""
    target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    binary = target / "release" / "examples" / name
    if not binary.exists():
        sys.exit(f"error: `{binary}` is missing; start this script with `{command}`")
    return binary


def output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def without_cuda(folder):
    """Puts empty libraries in the place of the CUDA libraries that PyTorch's are linked with.

    PyPI has no CPU-only build for Linux. The code that computes on the CPU is the same in both builds, and none of the
    functions below is ever called without a GPU; each would report an error.
    """
    libraries = sorted(folder.glob("*.so"))
    needed = {name for lib in libraries for name in re.findall(r"(\S+) => not found", output("ldd", str(lib)))}
    stubs = {name: {} for name in needed - {"libcuda.so.1"}}  # library -> version -> functions
    for lib in libraries:
        owner = {}
        for part in output("readelf", "-V", "-W", str(lib)).split("File: ")[1:]:
            owner |= {version: part.split()[0] for version in re.findall(r"Name: (\S+)", part)}
        for line in output("nm", "-D", "--undefined-only", "--with-symbol-versions", str(lib)).splitlines():
            name, _, version = line.split()[-1].partition("@")
            # Functions without a version begin with the library's name.
            begins = [stub for stub in stubs if name.lower().startswith(stub[3:].split(".")[0].lower())]
            library = owner.get(version) if version else max(begins, key=len, default=None)
            if library in stubs:
                stubs[library].setdefault(version, set()).add(name)
    script = folder / "versions.tmp"
    for library, versions in stubs.items():
        code = "".join(f"int {name}(void) {{ return 1; }}\n" for names in versions.values() for name in sorted(names))
        script.write_text("".join(f"{v} {{ {'; '.join(sorted(names))}; }};\n" for v, names in versions.items() if v))
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(folder / library), "-x", "c", "-"]
        command[3:3] = [f"-Wl,--version-script,{script}"] if any(versions) else []
        subprocess.run(command, input=code, text=True, check=True)
    script.unlink(missing_ok=True)


def torch_case(name):
    """A function that runs the case once, and the number of parameters."""
    import torch
    import torch.nn.functional as F

    kind = name.removesuffix("+bwd").removesuffix("_step")
    backward, step = name != kind, name.endswith("_step")
    torch.manual_seed(0)

    def operation(shapes, f):
        tensors = [torch.randn(s) * (0.05 if backward else 1.0) for s in shapes]
        for t in tensors:
            t.requires_grad_(backward)
        gradient = torch.randn_like(f(*tensors))

        def run():
            if backward:
                for t in tensors:
                    t.grad = None
                f(*tensors).backward(gradient)
            else:
                with torch.inference_mode():
                    f(*tensors)

        return run, sum(t.numel() for t in tensors[1:])

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

    if kind.startswith("dit"):
        model, loss = diffusion(kind)
    else:
        model, loss = autoencoder(kind == "vae_decode")
    parameters = list(model.parameters())
    with torch.no_grad():
        for p in parameters:
            p += 0.02 * torch.randn_like(p)
    optimiser = torch.optim.AdamW(parameters, fused=True) if step else None

    def run():
        if not backward:
            with torch.inference_mode():
                loss()
            return
        for p in parameters:
            p.grad = None
        loss().backward()
        if step:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()

    return run, sum(p.numel() for p in parameters)


def diffusion(kind):
    """The diffusion transformer of `dragon-diffusion` as PyTorch code, and its training loss."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    channels, frames, tokens = 32, 80, 24
    if kind == "dit_tiny":
        batch, width, depth, heads, hidden, text, features, rotary, rank = 16, 192, 6, 6, 512, 192, 64, 16, 48
    else:
        batch, width, depth, heads, hidden, text, features, rotary, rank = 8, 512, 8, 8, 1376, 512, 256, 32, None
    half = rotary // 2
    angles = torch.arange(frames)[:, None, None] * 500.0 ** (-torch.arange(half) / half)
    cos, sin = angles.cos(), angles.sin()  # [T, 1, rotary / 2]

    def rotate(x):  # [B, T, H, D]
        a, b = x[..., :half], x[..., half:rotary]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., rotary:]], -1)

    def norm(x, shift, scale):
        return F.layer_norm(x, (width,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            names = ("query", "key", "value", "text_key", "text_value", "attention_out")
            self.maps = nn.ModuleDict({n: nn.Linear(width, width, bias=False) for n in names})
            self.modulation = nn.Linear(rank or width, 6 * width)
            self.ffn_in = nn.Linear(width, 2 * hidden, bias=False)
            self.ffn_out = nn.Linear(hidden, width, bias=False)

        def forward(self, h, level, text, bias):
            def split(name, x):
                return self.maps[name](x).unflatten(-1, (heads, -1))  # [B, T, H, D]

            shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(level).chunk(6, -1)
            x = norm(h, shift1, scale1)
            k = torch.cat([rotate(split("key", x)), split("text_key", text)], 1).transpose(1, 2)
            v = torch.cat([split("value", x), split("text_value", text)], 1).transpose(1, 2)
            q = rotate(split("query", x)).transpose(1, 2)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
            h = h + gate1[:, None] * self.maps["attention_out"](a)
            gate, value = self.ffn_in(norm(h, shift2, scale2)).chunk(2, -1)
            return h + gate2[:, None] * self.ffn_out(F.silu(gate) * value)

    class Dit(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent_in, self.text_in = nn.Linear(channels, width), nn.Linear(text, width)
            self.null_text = nn.Parameter(torch.zeros(width))
            level = [nn.Linear(features, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()]
            self.level = nn.Sequential(*level, *([nn.Linear(width, rank)] if rank else []))
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.final_modulation = nn.Linear(rank or width, 2 * width)
            self.latent_out = nn.Linear(width, channels)

        def forward(self, x, c_noise, states, mask):
            frequencies = torch.logspace(0, 6, features // 2, base=2.0)
            angles = c_noise[:, None] * frequencies
            level = self.level(torch.cat([angles.cos(), angles.sin()], -1))
            states = states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            text = torch.cat([self.null_text.expand(x.shape[0], 1, -1), self.text_in(states)], 1)
            # The null token is seen where there is no text.
            seen = torch.cat([torch.ones(x.shape[0], frames), (mask.sum(1, keepdim=True) == 0).float(), mask], 1)
            bias = torch.zeros_like(seen).masked_fill(seen == 0, -torch.inf)[:, None, None]
            h = self.latent_in(x.transpose(1, 2))
            for block in self.blocks:
                h = block(h, level, text, bias)
            shift, scale = self.final_modulation(level).chunk(2, -1)
            return self.latent_out(norm(h, shift, scale)).transpose(1, 2)

    model = Dit()
    x0 = torch.randn(batch, channels, frames)
    sigma = 0.1 * 1.4 ** torch.arange(batch)
    level = sigma[:, None, None]
    x = x0 + level * torch.randn_like(x0)
    states, mask = torch.randn(batch, tokens, text), torch.ones(batch, tokens)

    def loss():
        root = (level**2 + 1).sqrt()
        denoised = x / root**2 + level / root * model(x / root, sigma.log() / 4, states, mask)
        return ((level**2 + 1) / level**2 * (denoised - x0).square()).mean()

    return model, loss


def autoencoder(decode):
    """Encoder or decoder of `dragon-vae` as PyTorch code, and a loss."""
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import weight_norm

    def conv(a, b, kernel, **kwargs):
        return weight_norm(nn.Conv1d(a, b, kernel, **kwargs))

    class Snake(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(1, c, 1))

        def forward(self, x):
            return x + (self.alpha + 1e-9).reciprocal() * torch.sin(self.alpha * x).square()

    class Unit(nn.Module):
        def __init__(self, c, d):
            super().__init__()
            self.f = nn.Sequential(Snake(c), conv(c, c, 7, padding=3 * d, dilation=d), Snake(c), conv(c, c, 1))

        def forward(self, x):
            return x + self.f(x)

    strides = [4, 4, 8, 8]
    if decode:
        widths, units = [16, 32, 64, 160, 320], [1, 2, 3, 3]
        layers = [conv(32, widths[4], 7, padding=3)]
        for i in (3, 2, 1, 0):
            a, b, s = widths[i + 1], widths[i], strides[i]
            layers += [Snake(a), weight_norm(nn.ConvTranspose1d(a, b, 2 * s, stride=s, padding=s // 2))]
            layers += [Unit(b, 3**j) for j in range(units[i])]
        layers += [Snake(widths[0]), conv(widths[0], 1, 7, padding=3), nn.Tanh()]
        x = torch.randn(2, 32, 40)
    else:
        widths, units = [16, 32, 64, 128, 256], [0, 1, 2, 3]
        layers = [conv(1, widths[0], 7, padding=3)]
        for i, s in enumerate(strides):
            layers += [Unit(widths[i], 3**j) for j in range(units[i])]
            layers += [Snake(widths[i]), conv(widths[i], widths[i + 1], 2 * s, stride=s, padding=s // 2)]
        layers += [Snake(widths[4]), conv(widths[4], 64, 3, padding=1)]
        x = torch.randn(2, 1, 40960)
    model = nn.Sequential(*layers)

    def loss():
        y = model(x)
        if decode:
            return y.square().mean()
        mean, log_var = y.chunk(2, 1)
        log_var = log_var.clamp(-30.0, 20.0)
        return 0.5 * (mean.square() + log_var.exp() - log_var - 1).mean()

    return model, loss


def serve_torch(threads):
    """PyTorch's side of the protocol of `examples/peers.rs`."""
    import resource

    import torch

    torch.set_num_threads(threads)
    for line in sys.stdin:
        name, seconds = line.split()
        run, n_parameters = torch_case(name)
        run()
        start, best, n = time.perf_counter(), float("inf"), 0
        while n < 2 or time.perf_counter() - start < float(seconds):
            begin = time.perf_counter()
            run()
            best = min(best, time.perf_counter() - begin)
            n += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print(name, best, peak, n_parameters, flush=True)


def variables(threads):
    """The environment of either side."""
    names = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"]
    # Beside the threads, what the `dragon` binary sets for itself.
    env = dict(os.environ, CANDLE_NUM_THREADS="1", MIMALLOC_PURGE_DELAY="-1")
    return env | {name: str(threads) for name in names}


class Side:
    """A process that runs cases on request."""

    def __init__(self, command, threads):
        pipe, env = subprocess.PIPE, variables(threads)
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def run(self, case, seconds):
        """What the side answers: the best time in seconds, and more."""
        self.process.stdin.write(f"{case} {seconds}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().split()
        if len(answer) < 2:
            sys.exit(f"error: a side stopped on `{case}`")
        return [float(x) for x in answer[1:]]

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
    environment(__file__)
    if args.serve:
        return serve_torch(args.threads)

    binary = example("peers", "cargo xtask bench --peers")
    ours = [str(binary)]
    theirs = [sys.executable, __file__, "--serve", "--threads", str(args.threads)]
    sides = [Side(ours, args.threads), Side(theirs, args.threads)]
    cases = [c for c in CASES if args.only in c]
    best = {c: [float("inf")] * 2 for c in cases}
    for round_ in range(args.rounds):
        for case in cases:
            counts = []
            for i, side in enumerate(sides):
                seconds, _, n_parameters = side.run(case, args.seconds)
                best[case][i] = min(best[case][i], seconds)
                counts.append(n_parameters)
            if counts[0] != counts[1]:
                sys.exit(f"error: `{case}` has {counts[0]:.0f} parameters here and {counts[1]:.0f} in PyTorch")
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    for side in sides:
        side.close()

    print(f"{args.rounds} rounds of {args.seconds} s, {args.threads} threads, torch {TORCH}\n")
    print("| case | ours (ms) | PyTorch (ms) | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for case, (a, b) in best.items():
        print(f"| `{case}` | {1e3 * a:.2f} | {1e3 * b:.2f} | {a / b:.2f} |")

    memory = [c for c in MEMORY if args.only in c]
    if memory:
        print("\n| peak memory above an idle process | ours (MiB) | PyTorch (MiB) | ratio |")
        print("| --- | ---: | ---: | ---: |")
    for case in memory:
        peaks = []
        for command in (ours, theirs):
            peak = {}
            for name in ("attention_80+bwd", case):
                side = Side(command, args.threads)
                peak[name] = side.run(name, 0.1)[1]
                side.close()
            peaks.append(peak[case] - peak["attention_80+bwd"])
        print(f"| `{case}` | {peaks[0]:.0f} | {peaks[1]:.0f} | {peaks[0] / max(peaks[1], 1):.2f} |")


if __name__ == "__main__":
    main()
