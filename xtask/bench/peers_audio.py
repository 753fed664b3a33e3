#!/usr/bin/env python3
"""Times reading an hour of music as mono at another rate, ours and what fadtk does, in turn, and prints the ratio of the minima.

Usage: cargo xtask bench --peers audio [--rounds N] [--only SUBSTRING]

Makes a virtual environment under target/peers (the one of `--peers`, and soundfile and torchaudio from PyPI in it). The hour is
the music among the fixtures, one piece after the other, in stereo at 44.1 kHz; it is written once to target/peers-audio as FLAC
and MP3 by libsndfile. Theirs: soundfile decodes, the mean of the channels, torchaudio's resampling with the kaiser filter of
fadtk 1.1.0. Ours: `dragon_audio::read_mono`. To 48 kHz, one thread each, processes that stay, one run a round and side.
"""

import argparse
import ast
import importlib.util
import math
import pathlib
import sys
import time

import peers

ROOT = peers.ROOT
PACKAGES = ["soundfile==0.14.0", "cffi==2.0.0", "pycparser==2.23", "torchaudio==2.11.0"]
DATA = ROOT / "target" / "peers-audio"
RATE, HOUR, FROM = 48_000, 3600, 44_100
FILES = {"hour.mp3": "MP3, 192 kbit/s", "hour.flac": "FLAC, 16 bit"}


def draw():
    """Writes the hour."""
    import numpy as np
    import soundfile

    if (DATA / "done").exists():
        return
    print("writing an hour of music (once) …", file=sys.stderr)
    DATA.mkdir(parents=True, exist_ok=True)
    pieces = []
    for file in sorted((ROOT / "fixtures" / "music").glob("*.ogg")):
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        if rate == FROM:
            pieces.append(samples[:, [0, -1]] * 0.9)
    part = np.concatenate(pieces)
    for name, options in [
        ("hour.flac", {"format": "FLAC", "subtype": "PCM_16"}),
        ("hour.mp3", {"format": "MP3", "subtype": "MPEG_LAYER_III", "bitrate_mode": "CONSTANT", "compression_level": 0.4}),
    ]:
        with soundfile.SoundFile(DATA / name, "w", FROM, 2, **options) as file:
            left = HOUR * FROM
            while left > 0:
                file.write(part[:left])
                left -= len(part)
    (DATA / "done").touch()


def resample():
    """torchaudio's function, as it is there, without its libraries (they ask for another PyTorch)."""
    import torch

    path = pathlib.Path(importlib.util.find_spec("torchaudio").submodule_search_locations[0]) / "functional" / "functional.py"
    names = ["_get_sinc_resample_kernel", "_apply_sinc_resample_kernel", "resample"]
    found = [n for n in ast.parse(path.read_text()).body if getattr(n, "name", None) in names]
    for node in found:
        node.returns = None
        for a in node.args.args:
            a.annotation = None
    space = {"torch": torch, "math": math, "Tensor": torch.Tensor, "_CPU": torch.device("cpu")}
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return space["resample"]


def serve():
    """The peer's side of the protocol of `examples/peers_audio.rs`."""
    import soundfile
    import torch

    torch.set_num_threads(1)
    convert = resample()
    for line in sys.stdin:
        name, _ = line.split()
        begin = time.perf_counter()
        samples, rate = soundfile.read(DATA / name, dtype="float32", always_2d=True)
        x = torch.from_numpy(samples).mean(1)[None]
        y = convert(
            x, rate, RATE, lowpass_filter_width=64, rolloff=0.9475937167399596, resampling_method="sinc_interp_kaiser",
            beta=14.769656459379492,
        )  # fmt: skip
        seconds = time.perf_counter() - begin
        print(name, seconds, y.double().square().mean().sqrt().item(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="files whose name contains this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers.environment(__file__, *PACKAGES)
    if args.serve:
        return serve()
    draw()

    binary = peers.example("peers_audio", "cargo xtask bench --peers audio")
    sides = [peers.Side([str(binary), str(DATA), str(RATE)], 1), peers.Side([sys.executable, __file__, "--serve"], 1)]
    files = [name for name in FILES if args.only in name]
    best = {name: [float("inf")] * 2 for name in files}
    levels = {name: [0.0] * 2 for name in files}
    for round_ in range(args.rounds):
        for name in files:
            for i, side in enumerate(sides):
                seconds, levels[name][i] = side.run(name, 0)
                best[name][i] = min(best[name][i], seconds)
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    for side in sides:
        side.close()
    print(f"{args.rounds} rounds; {', '.join(PACKAGES)}, torch {peers.TORCH}; an hour, 44.1 kHz stereo to 48 kHz mono\n")
    print("| file | ours (s) | theirs (s) | ratio | bar | met | levels differ by |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: |")
    for name in files:
        (a, b), (x, y) = best[name], levels[name]
        met = "yes" if a / b <= 0.5 else "no"
        print(f"| {FILES[name]} | {a:.2f} | {b:.2f} | {a / b:.2f} | 0.50 | {met} | {abs(x - y) / y:.0e} |")


if __name__ == "__main__":
    main()
