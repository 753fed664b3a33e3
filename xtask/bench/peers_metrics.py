#!/usr/bin/env python3
"""Times `dragon-metrics` and the tools it replaces in turn on the same embeddings, and prints the ratio of the minima.

Usage: cargo xtask bench --peers metrics [--rounds N] [--seconds S] [--only SUBSTRING]

Makes a virtual environment under target/peers with the peers from PyPI (the one of `--peers`, with PyTorch, and more in
it). Reference: `clap-laion-music` of the statistics that fadtk's package holds. Embeddings: drawn around these statistics
from a seed, f32, written once to target/peers-metrics; both sides read these files. Both sides take turns within each
round; the minimum over all rounds counts. One thread each, two where the table says so; there the peer's time is the
shorter of that with one and with two BLAS threads. Where the peer would be called many times, one call is measured and
multiplied.
"""

import argparse
import ast
import importlib.util
import os
import pathlib
import sys
import time

import peers

ROOT = peers.ROOT
PACKAGES = [
    "numpy==2.4.6", "scipy==1.17.1", "scikit-learn==1.9.1", "joblib==1.5.3", "threadpoolctl==3.6.0", "narwhals==2.26.0",
    "fadtk==1.1.0", "kadtk==1.1.0", "vendi-score==0.0.3",
]  # fmt: skip
DATA = ROOT / "target" / "peers-metrics"
SEED = 5
SONGS, PAIRS = 2185, 40

# Our case, the peer's case, what it is, threads, how often the peer's call is repeated, the bar (ours over theirs).
CASES = [
    ("song_9", "fadtk_song_9", "per-song FAD, 9 embeddings, fadtk", 1, 1, 1 / 5000),
    ("song_25", "fadtk_song_25", "per-song FAD, 25 embeddings, fadtk", 1, 1, 1 / 3000),
    ("song_32", "fadtk_song_32", "per-song FAD, 32 embeddings, fadtk", 1, 1, 1 / 2000),
    ("songs_32", "fadtk_song_32", "2185 songs x 32, fadtk", 2, SONGS, 1 / 4000),
    ("dataset_360", "fadtk_dataset_360", "dataset FAD, 360 rows, fadtk", 1, 1, 1 / 60),
    ("dataset_1000", "fadtk_dataset_1000", "dataset FAD, 1000 rows, fadtk", 1, 1, 1 / 20),
    ("bootstrap_9", "fadtk_bootstrap_9", "1000 bootstrap FADs of 40 x 9, fadtk", 2, 1000, 1 / 140),
    ("bootstrap_25", "fadtk_bootstrap_25", "1000 bootstrap FADs of 40 x 25, fadtk", 2, 1000, 1 / 45),
    ("algorithm1_9", "fadtk_dataset_360", "Algorithm 1, 40 pairs x 9, fadtk", 1, PAIRS + 2, 1 / 100),
    ("algorithm1_25", "fadtk_dataset_1000", "Algorithm 1, 40 pairs x 25, fadtk", 1, PAIRS + 2, 1 / 30),
    ("vendi_2185", "vendi_score_X", "Vendi 2185 x 512, `score_X`", 1, 1, 1 / 20),
    ("vendi_2185", "vendi_score_dual", "Vendi 2185 x 512, `score_dual`", 1, 1, 1.0),
    ("vendi_2185", "vendi_score_dual_f32", "the same, theirs in f32", 1, 1, None),
    ("kad_1000", "kadtk_given_1000", "KAD 4000 x 1000, kadtk", 1, 1, 1 / 5),
    ("kad_all_1000", "kadtk_own_1000", "the same, nothing made before, kadtk's bandwidth", 1, 1, None),
    ("kad_25", "kadtk_given_25", "KAD per song (25) against 4000, kadtk", 1, 1, 1 / 200),
]  # fmt: skip
FLOORS = [c[0] for c in CASES if not c[0].startswith("kad_all")]


def statistics():
    """The statistics file in fadtk's package."""
    return pathlib.Path(importlib.util.find_spec("fadtk").submodule_search_locations[0]) / "stats" / "fma_pop.npz"


def draw():
    """Writes the embeddings: songs around the reference's mean, windows around their song."""
    import numpy as np

    done = DATA / "done"
    if done.exists():
        return
    print("drawing embeddings (once) …", file=sys.stderr)
    DATA.mkdir(parents=True, exist_ok=True)
    reference = np.load(statistics())
    mean, cov = reference["clap-laion-music.mu"], reference["clap-laion-music.cov"]
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(np.maximum(values, 0))
    rng = np.random.default_rng(SEED)

    def songs(n, windows):
        # Half of the variance between songs, half within; all moved by a quarter of a standard deviation.
        song = rng.normal(size=(n, 1, len(mean))) * 0.5**0.5 + 0.25
        rows = song + rng.normal(size=(n, windows, len(mean))) * 0.5**0.5
        return (rows.reshape(n * windows, -1) @ root.T + mean).astype(np.float32)

    for windows, n in [(9, 2 * PAIRS), (25, 2 * PAIRS), (32, SONGS)]:
        np.save(DATA / f"songs_{windows}.npy", songs(n, windows))
    windows = np.load(DATA / "songs_32.npy").reshape(SONGS, 32, -1)
    np.save(DATA / f"means_{SONGS}.npy", windows.mean(1))
    np.save(DATA / "reference_4000.npy", (rng.normal(size=(4000, len(mean))) @ root.T + mean).astype(np.float32))
    np.save(DATA / "subsets.npy", rng.integers(0, PAIRS, size=(1000, PAIRS)).astype(np.float64))
    done.touch()


def function(package, file, names, space, text=lambda t: t):
    """Functions out of an installed package, as they are there, without importing its models."""
    path = pathlib.Path(importlib.util.find_spec(package).submodule_search_locations[0]) / file
    found = [n for n in ast.parse(text(path.read_text())).body if getattr(n, "name", None) in names]
    for node in found:
        node.returns = None
        for a in node.args.args:
            a.annotation = None
    exec(compile(ast.Module(found, []), str(path), "exec"), space)
    return [space[name] for name in names]


def peer_case(name):
    """A function that runs the case once and gives its number."""
    import numpy as np
    import torch

    load = lambda file: np.load(DATA / f"{file}.npy")
    tool, _, size = name.rpartition("_")
    if tool.startswith("fadtk"):
        from numpy.lib.scimath import sqrt as scisqrt
        from scipy import linalg

        class Log:
            info = warning = error = debug = lambda self, *a: None

        space = {"np": np, "linalg": linalg, "scisqrt": scisqrt, "log": Log()}
        wanted = ["calc_embd_statistics", "calc_frechet_distance"]
        stats, distance = function("fadtk", "fad.py", wanted, space)
        reference = np.load(statistics())
        reference = reference["clap-laion-music.mu"], reference["clap-laion-music.cov"]
        size = int(size)
        if tool == "fadtk_song":
            rows = load(f"songs_{size}")[:size].copy()
        elif tool == "fadtk_dataset":
            rows = load(f"songs_{size // PAIRS}")[:size].copy()
        else:
            songs = load(f"songs_{size}")[: PAIRS * size].reshape(PAIRS, size, -1)
            subset = load("subsets")[0].astype(int)
            return lambda: distance(*reference, *stats(songs[subset].reshape(PAIRS * size, -1)))
        return lambda: distance(*reference, *stats(rows))
    if name.startswith("vendi"):
        import scipy
        from sklearn import preprocessing

        space = {"np": np, "scipy": scipy, "preprocessing": preprocessing}
        # The name of a class that SciPy has moved.
        moved = lambda text: text.replace("scipy.sparse.csr.csr_matrix", "scipy.sparse.csr_matrix")
        wanted = ["weight_K", "normalize_K", "entropy_q", "score_K", "score_X", "score_dual"]
        _, _, _, _, score_X, score_dual = function("vendi_score", "vendi.py", wanted, space, moved)
        rows = load(f"means_{SONGS}")
        if not name.endswith("f32"):
            rows = rows.astype(np.float64)
        score = score_X if name == "vendi_score_X" else score_dual
        return lambda: score(rows)
    space = {"np": np, "torch": torch, "SCALE_FACTOR": 100}
    median, kad = function("kadtk", "kad.py", ["median_pairwise_distance", "calc_kernel_audio_distance"], space)
    reference, rows = torch.tensor(load("reference_4000")), torch.tensor(load("songs_25")[: int(size)])
    # Given the bandwidth of the reference, as ours has it; by itself kadtk takes that of the evaluated set.
    bandwidth = median(reference) if tool == "kadtk_given" else None
    return lambda: kad(reference, rows, (None, None), "cpu", bandwidth=bandwidth).item()


def serve():
    """The peers' side of the protocol of `examples/peers_metrics.rs`."""
    import warnings

    import torch

    warnings.filterwarnings("ignore")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for line in sys.stdin:
        name, seconds = line.split()
        run = peer_case(name)
        value = run()
        start, best, n = time.perf_counter(), float("inf"), 0
        while n < 2 or time.perf_counter() - start < float(seconds):
            begin = time.perf_counter()
            value = run()
            best = min(best, time.perf_counter() - begin)
            n += 1
        print(name, best, float(value), flush=True)


def in_words(seconds):
    for limit, factor, unit in [(1e-3, 1e6, "µs"), (1, 1e3, "ms"), (600, 1, "s")]:
        if seconds < limit:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 1000 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds / 60:.1f} min"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="per case, side and round")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers.environment(__file__, *PACKAGES)
    if args.serve:
        return serve()
    draw()

    binary = peers.example("peers_metrics", "cargo xtask bench --peers metrics")
    ours = [str(binary), str(statistics()), str(DATA)]
    theirs = [sys.executable, __file__, "--serve"]
    sides = {threads: (peers.Side(ours, threads), peers.Side(theirs, threads)) for threads in (1, 2)}
    cases = [c for c in CASES if args.only in c[0] or args.only in c[1]]
    best = {}  # (side, case, threads) -> (seconds, value)

    def measure(side, case, threads):
        seconds, value = sides[threads][side == "theirs"].run(case, args.seconds)
        key = side, case, threads
        best[key] = min(seconds, best.get(key, (float("inf"), 0))[0]), value

    for round_ in range(args.rounds):
        for case, peer, _, threads, _, _ in cases:
            measure("ours", case, threads)
            for t in range(1, threads + 1):
                measure("theirs", peer, t)
            if case in FLOORS:
                measure("floor", f"floor/{case}", threads)
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
    for pair in sides.values():
        for side in pair:
            side.close()

    print(f"{args.rounds} rounds of {args.seconds} s; {', '.join(PACKAGES)}, torch {peers.TORCH}\n")
    print("| work | threads | ours | theirs | theirs / ours | bar | met | ours / floor | values differ by |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for case, peer, title, threads, times, bar in cases:
        a, ours_value = best["ours", case, threads]
        b, value = min(best["theirs", peer, t] for t in range(1, threads + 1))
        b *= times
        floor = f"{a / best['floor', f'floor/{case}', threads][0]:.2f}" if case in FLOORS else ""
        known = f" (1 x {times})" if times > 1 else ""
        met = "" if bar is None else "yes" if a / b <= bar else "no"
        wanted = "" if bar is None else f"{1 / bar:.0f}"
        ratio = f"{b / a:.0f}" if b / a >= 100 else f"{b / a:.1f}" if b / a >= 10 else f"{b / a:.2f}"
        apart = abs(ours_value - value) / abs(value)
        print(
            f"| {title} | {threads} | {in_words(a)} | {in_words(b)}{known} | {ratio} | {wanted} | {met} | {floor} "
            f"| {apart:.0e} |"
        )


if __name__ == "__main__":
    main()
