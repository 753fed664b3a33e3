#!/usr/bin/env python3
"""Times published models at their published sizes, ours and the reference implementations, and takes their peak memory.

Usage: cargo xtask bench --peers models [--rounds N] [--only SUBSTRING] [--threads N]

Weights are seeded and random, in the layouts of the published files: those of `cargo xtask parity`, made here if they are
missing. Every round gives each side of a case a process of its own, in turn: it loads the weights, runs once to warm up and
then some more times. The shortest of all runs counts, and the largest peak of resident memory, loading included. Both sides
read the same inputs, and what they compute must agree.
"""

import argparse
import os
import pathlib
import resource
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "xtask" / "bench"), str(ROOT / "xtask" / "parity")]
import parity  # noqa: E402
import peers  # noqa: E402

STABLE_AUDIO = "stable-audio-open-1.0"
# Kind (that of `examples/peers_models.rs`), checkpoint, latent frames, runs in a process beside the one to warm up.
CASES = {
    "clap_music": ("clap", "music_audioset_epoch_15_esc_90.14.pt", None, 3),
    "clap_630k": ("clap", "630k-audioset-best.pt", None, 3),
    **{name: ("t5", name, None, 5) for name in ["t5-base", "t5-large", "flan-t5-small", "flan-t5-base", "flan-t5-large"]},
    "oobleck_decode": ("decode", STABLE_AUDIO, 108, 2),
    "dit_guided_108": ("guided", STABLE_AUDIO, 108, 3),
    "dit_guided_1024": ("guided", STABLE_AUDIO, 1024, 1),
    "dit_adapters_step": ("adapters", STABLE_AUDIO, None, 2),
    "dit_all_weights": ("all_weights", STABLE_AUDIO, None, 2),
}
# Relative difference of the mean absolute values on both sides; adapters are updated from different random numbers.
AGREE, AGREE_ADAPTERS = 1e-3, 1e-2


def checkpoint(kind, name):
    """Its path; makes it if it is missing."""
    if kind == "clap":
        path = parity.WORK / name.removesuffix(".pt") / name
        if not path.exists():
            parity.laion_checkpoint(name)
            parity.roberta_tokenizer(path.parent, parity.captions() * 3)
        return path
    path = parity.WORK / name
    if kind == "t5":
        if not (path / "config.json").exists():
            parity.t5_checkpoint(name)
    elif not (path / "model_index.json").exists():
        import stable_audio

        stable_audio.build(*parity.stable_audio_folder())
    return path


def inputs(kind, path, frames):
    import gradients
    import torch

    torch.manual_seed(4)
    if kind == "clap":
        return {"clips": torch.from_numpy(parity.clips())}
    if kind == "t5":
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
        tokenizer.enable_truncation(64)
        tokenizer.enable_padding(length=64)
        texts = tokenizer.encode_batch(parity.captions())
        return {"ids": torch.tensor([t.ids for t in texts]), "mask": torch.tensor([t.attention_mask for t in texts])}
    if kind in ("adapters", "all_weights"):
        return gradients.inputs()
    given = {"x": torch.randn(1, 64, frames)}
    if kind == "guided":
        given |= {"states": torch.randn(1, gradients.TOKENS, 768), "mask": torch.ones(1, gradients.TOKENS)}
    return given


def reference(kind, path, given):
    """A function that runs the reference implementation once."""
    import gradients
    import torch

    if kind == "clap":
        model = parity.laion(path.name)
        state = torch.load(path, map_location="cpu", weights_only=False)["state_dict"]
        state = {name.removeprefix("module."): value for name, value in state.items()}
        state.pop("text_branch.embeddings.position_ids")
        model.load_state_dict(state)
        return lambda: model.get_audio_embedding([{"waveform": clip} for clip in given["clips"]])
    if kind == "t5":
        from transformers import T5EncoderModel

        model, mask = T5EncoderModel.from_pretrained(path), given["mask"]
        return lambda: model(given["ids"], attention_mask=mask).last_hidden_state * mask[..., None]

    from diffusers import AutoencoderOobleck, StableAudioDiTModel
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    if kind == "decode":
        vae = AutoencoderOobleck.from_pretrained(path / "vae")
        return lambda: vae.decode(given["x"]).sample
    network = StableAudioDiTModel.from_pretrained(path / "transformer")
    projection = StableAudioProjectionModel.from_pretrained(path / "projection_model")
    if kind == "guided":
        tokens, glob, rotary = gradients.told(projection, given["states"], given["mask"], given["x"].shape[2])
        tokens, glob, t = torch.cat([torch.zeros_like(tokens), tokens]), torch.cat([glob, glob]), torch.full((2,), 0.5)

        def guided():  # at noise level 1
            both = torch.cat([given["x"], given["x"]]) / 2**0.5
            v = network(both, t, tokens, glob, rotary_embedding=rotary, return_dict=False)[0]
            without, with_text = v.chunk(2)
            return given["x"] / 2 - (without + 7.0 * (with_text - without)) / 2**0.5

        return guided
    errors = gradients.error_function(projection, given)
    if kind == "adapters":
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=gradients.RANK, lora_alpha=gradients.ALPHA, target_modules=gradients.TARGETS)
        network = get_peft_model(network, config)
    else:
        network.requires_grad_(True)
    trained = [p for p in network.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=1e-4, fused=True) if kind == "adapters" else None

    def step():
        for p in trained:
            p.grad = None
        policy = errors(network)
        if optimiser:
            with torch.no_grad(), network.disable_adapter():
                base = errors(network)
        else:
            base = policy.detach() * 1.01
        gradients.loss_of("dpo", policy, base, 20.0).backward()
        if optimiser:
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimiser.step()
        return policy.detach()

    return step


def serve(name, given, runs, threads):
    """PyTorch's side: prints what `examples/peers_models.rs` prints."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(threads)
    kind, file, _, _ = CASES[name]
    run = reference(kind, checkpoint(kind, file), load_file(given))
    with torch.inference_mode(kind not in ("adapters", "all_weights")):
        result, best = run(), float("inf")
        for _ in range(runs):
            del result
            start = time.perf_counter()
            result = run()
            best = min(best, time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(best, peak, result.float().abs().mean().item(), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    peers.environment(__file__, *parity.PACKAGES)
    if args.serve:
        name, given, runs = args.serve
        return serve(name, given, int(runs), args.threads)

    from safetensors.torch import save_file

    binary = peers.example("peers_models", "cargo xtask bench --peers models")
    folder = parity.WORK / "inputs"
    folder.mkdir(parents=True, exist_ok=True)
    commands = {}
    for name, (kind, file, frames, runs) in CASES.items():
        if args.only in name:
            path, given = checkpoint(kind, file), folder / f"{name}.safetensors"
            save_file(inputs(kind, path, frames), given)
            theirs = [sys.executable, __file__, "--threads", args.threads, "--serve", name, given, runs]
            commands[name] = [binary, kind, path, given, runs], theirs
    best = {name: [[float("inf"), 0]] * 2 for name in commands}
    for round_ in range(args.rounds):
        for name, sides in commands.items():
            values = []
            for i, command in enumerate(sides):
                run = subprocess.run([str(word) for word in command], env=peers.variables(args.threads), text=True, stdout=-1)
                if run.returncode:
                    sys.exit(f"error: a side stopped on `{name}`")
                seconds, peak, value = map(float, run.stdout.split()[-3:])
                best[name][i] = [min(best[name][i][0], seconds), max(best[name][i][1], peak)]
                values.append(value)
                print(f"{name}, {['ours', 'PyTorch'][i]}: {seconds:.3f} s, {peak:.0f} MiB", file=sys.stderr)
            bar = AGREE_ADAPTERS if name == "dit_adapters_step" else AGREE
            if not abs(values[0] / values[1] - 1) < bar:
                sys.exit(f"error: `{name}` computes {values[0]} here and {values[1]} in PyTorch")
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)

    print(f"{args.rounds} rounds, {args.threads} threads, torch {peers.TORCH}\n")
    print("| case | ours (s) | PyTorch (s) | ratio | peak memory: ours (MiB) | PyTorch (MiB) | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, ((a, p), (b, q)) in best.items():
        print(f"| `{name}` | {a:.3f} | {b:.3f} | {a / b:.2f} | {p:.0f} | {q:.0f} | {p / q:.2f} |")


if __name__ == "__main__":
    main()
