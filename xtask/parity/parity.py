#!/usr/bin/env python3
"""Compares our models with their reference implementations at the published sizes, stage by stage.

Usage: cargo xtask parity clap|t5|stable_audio|gradients|codecs|musicgen [--only SUBSTRING]

The published weights are not needed: the reference is built with seeded random weights at the full published
configuration and written in the layout of the published files; both sides read those and see the same audio and texts.
Makes a virtual environment with PyTorch and the references from PyPI under target/peers; the checkpoints
(up to 13.8 GB, MusicGen large) lie under target/parity until the next run.

For each stage: the largest absolute error, the same relative to the largest value, the smallest cosine of a row with its
counterpart, and `spread`, the largest cosine between the rows of two different inputs (1 would mean that the random
weights tell nothing apart, and that equality proves nothing). A stage beyond its bar makes the exit status 1.
"""

import argparse
import importlib.util
import pathlib
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures" / "dragon-encoders"
sys.path[:0] = [str(ROOT / "xtask" / "bench"), str(FIXTURES / "clap"), str(FIXTURES / "t5")]
import peers  # noqa: E402

# Each without what it requires: much of that is for training.
PACKAGES = [
    "laion-clap==1.1.7", "transformers==4.57.6", "tokenizers==0.22.1", "huggingface-hub==0.36.0", "safetensors==0.8.0",
    "torchlibrosa==0.1.0", "librosa==0.11.0", "lazy-loader==0.6", "soundfile==0.14.0", "cffi==2.1.1", "pycparser==3.12",
    "numba==0.68.1", "llvmlite==0.50.0", "scipy==1.17.1", "scikit-learn==1.9.1", "joblib==1.5.3", "threadpoolctl==3.6.0",
    "decorator==5.3.1", "audioread==3.1.0", "soxr==1.1.0", "msgpack==1.2.4", "pooch==1.9.0", "platformdirs==4.14.8",
    "packaging==26.4", "pyyaml==6.0.4", "regex==2026.11.19", "requests==2.34.2", "tqdm==4.70.1", "idna==3.20",
    "sentencepiece==0.2.3", "protobuf==7.36.2", "charset-normalizer==3.5.3", "urllib3==2.8.0", "certifi==2026.10.19.post1",
    "diffusers==0.36.0", "importlib-metadata==10.2.0", "zipp==4.1.2", "pillow==13.0.0", "torchsde==0.2.6", "trampoline==0.1.2",
    "httpx==0.28.1", "httpcore==1.0.9", "anyio==4.16.0", "h11==0.16.0", "sniffio==1.3.1",
    "peft==0.21.2", "accelerate==1.15.0", "psutil==7.2.2",
    "encodec==0.1.1", "einops==0.8.2", "descript-audio-codec==1.0.0", "torchvggish==0.2", "pyloudnorm==0.2.0",
]  # fmt: skip
# Bars in f32: relative error of the front end, then cosine and absolute error of embeddings.
MEL, COSINE, ABSOLUTE, T5 = 1e-5, 0.999999, 1e-4, 1e-4
WORK = ROOT / "target" / "parity"
failed = []


def compare(stage, ours, theirs, relative=None, absolute=None, cosine=None):
    """Prints a line; remembers a bar that is not met."""
    import torch.nn.functional as F

    ours, theirs = ours.double(), theirs.double()
    error = (ours - theirs).abs().max().item()
    scaled = error / theirs.abs().max().item()
    rows, other = theirs.flatten(1), ours.flatten(1)
    least = F.cosine_similarity(rows, other).min().item()
    unit = F.normalize(rows)
    spread = (unit @ unit.T).fill_diagonal_(-1).max().item()
    bars = [(relative, scaled), (absolute, error), (cosine and 1 - cosine, 1 - least)]
    ok = all(bar is None or value <= bar for bar, value in bars)
    print(f"  {stage:22} {error:10.2e} {scaled:10.2e} {1 - least:12.2e} {spread:8.4f}  {'ok' if ok else 'BEYOND ITS BAR'}")
    if not ok:
        failed.append(stage)


def head(name):
    print(f"{name}\n  {'stage':22} {'max error':>10} {'relative':>10} {'1 - cosine':>12} {'spread':>8}")


def faster_of_two(run):
    """What `run` gives, and the seconds of the faster of two passes: the first finds memory and threads cold."""
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def clips():
    """Ten seconds each: the music among the fixtures (its samples taken as 48 kHz), noise, a sawtooth."""
    import numpy as np
    import soundfile

    out = []
    for path in sorted((ROOT / "fixtures" / "music").glob("*.ogg")):
        samples = soundfile.read(path, dtype="float32")[0]
        samples = samples.mean(axis=1) if samples.ndim > 1 else samples
        out.append(np.resize(samples, 480_000))
    random = np.random.default_rng(0)
    out += [0.1 * random.standard_normal(480_000), np.arange(480_000) * 220 / 48_000 % 1 - 0.5]
    return np.stack(out).astype("float32")


def captions():
    lines = (ROOT / "fixtures" / "tiny" / "captions.txt").read_text().splitlines()
    long = " ".join(lines[:12])  # more than 77 tokens
    return lines[:: len(lines) // 5] + ["a dog barks, then it rains", "Trombones & tubas: 1920's jazz!", "naïve 音楽", long]


def roberta_tokenizer(folder, texts):
    """A byte-level tokenizer in RoBERTa's files, trained on `texts`; the one of roberta-base is not needed to compare."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import RobertaTokenizer, RobertaTokenizerFast

    made = ByteLevelBPETokenizer()
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    made.train_from_iterator(texts, vocab_size=2000, special_tokens=special, show_progress=False)
    made.save_model(str(folder))
    files = dict(vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"))
    RobertaTokenizerFast(**files).backend_tokenizer.save(str(folder / "tokenizer.json"))
    return RobertaTokenizer(**files)


def ours(binary, folder, *arguments):
    """Runs our side; gives its tensors and the facts that it printed."""
    from safetensors.torch import load_file

    out = folder / "ours.safetensors"
    text = peers.output(binary, *map(str, arguments), str(out))
    return load_file(out), dict(line.split() for line in text.splitlines())


def laion(name):
    """LAION's implementation at the size of a published file."""
    from reference import laion_clap

    site = pathlib.Path(importlib.util.find_spec("laion_clap").origin).parents[1]
    return laion_clap(site, "base" if name.startswith("music") else "tiny")


def laion_checkpoint(name):
    """A model with seeded random weights, and its file as published."""
    import torch
    from reference import laion_file, published_names, spread

    path = WORK / name.removesuffix(".pt") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    model = spread(laion(name), seed=0)
    torch.save(laion_file(published_names(model)), path)
    return model, path


def clap(binary, only):
    import torch
    import torch.nn.functional as F
    from reference import hugging_face_clap, spread
    from transformers import ClapFeatureExtractor

    sounds, texts = clips(), captions()
    for name in ["music_audioset_epoch_15_esc_90.14.pt", "630k-audioset-best.pt", "clap-htsat-unfused"]:
        if only not in name:
            continue
        folder = WORK / name.removesuffix(".pt")
        folder.mkdir(parents=True, exist_ok=True)
        sounds.tofile(folder / "clips.f32")
        (folder / "captions.txt").write_text("\n".join(texts) + "\n")
        tokenizer = roberta_tokenizer(folder, texts * 3)
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        inputs = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        theirs = {"ids": tokens.input_ids}
        if name.endswith(".pt"):
            model, path = laion_checkpoint(name)
            wave = torch.from_numpy(sounds)
            with torch.no_grad():
                branch = model.audio_branch
                theirs["log_mel"] = branch.logmel_extractor(branch.spectrogram_extractor(wave))[:, 0]
                embedding, audio_s = faster_of_two(lambda: branch({"waveform": wave}, device="cpu")["embedding"])
                theirs["embedding"] = embedding
                theirs["audio_embedding"] = F.normalize(model.audio_projection(embedding), dim=-1)
                theirs["pooled"] = model.text_branch(**inputs).pooler_output
                theirs["text_embedding"] = F.normalize(model.text_projection(theirs["pooled"]), dim=-1)
        else:
            model = spread(hugging_face_clap(), seed=0)
            path = folder
            extractor = ClapFeatureExtractor(
                frequency_min=50, frequency_max=14000, truncation="rand_trunc", padding="repeatpad"
            )
            model.save_pretrained(folder)
            extractor.save_pretrained(folder)
            features = extractor(list(sounds), sampling_rate=48000, return_tensors="pt")["input_features"]
            with torch.no_grad():
                theirs["log_mel"] = features[:, 0]
                run = lambda: model.audio_model(input_features=features).pooler_output
                theirs["embedding"], audio_s = faster_of_two(run)
                theirs["audio_embedding"] = F.normalize(model.audio_projection(theirs["embedding"]), dim=-1)
                theirs["pooled"] = model.text_model(**inputs).pooler_output
                theirs["text_embedding"] = F.normalize(model.text_projection(theirs["pooled"]), dim=-1)
        del model
        got, facts = ours(binary, folder, path, folder / "clips.f32", folder / "captions.txt")
        head(name)
        same = bool((got["ids"] == theirs["ids"]).all())
        print(f"  {'token ids':22} {'equal' if same else 'DIFFERENT'}")
        if not same:
            failed.append("token ids")
        compare("log-mel", got["log_mel"], theirs["log_mel"], relative=MEL)
        compare("audio branch", got["embedding"], theirs["embedding"])
        bars = dict(absolute=ABSOLUTE, cosine=COSINE)
        compare("audio embedding", got["audio_embedding"], theirs["audio_embedding"], **bars)
        compare("text branch, pooled", got["pooled"], theirs["pooled"])
        compare("text embedding", got["text_embedding"], theirs["text_embedding"], **bars)
        print(
            f"  loaded in {facts['load_s']} s, then {facts['load_peak_mib']} MiB resident at most for"
            f" {facts['weights_mib']} MiB of weights, {facts['peak_mib']} MiB at the end; {len(sounds)} clips:"
            f" {facts['log_mel_s']} s of log-mel and {facts['audio_s']} s of audio branch, PyTorch {audio_s:.3f} s"
            f" {'for both' if name.endswith('.pt') else 'of audio branch'}; mean cosine of twenty unlike captions"
            f" {facts['text_cosine']}"
        )


def t5_tokenizer(folder, texts):
    """A sentencepiece tokenizer in T5's files, trained on `texts`."""
    import sentencepiece
    from tokenizers import pre_tokenizers
    from transformers import T5Tokenizer, T5TokenizerFast

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_prefix=str(folder / "spiece"), vocab_size=400, hard_vocab_limit=False,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    model = str(folder / "spiece.model")
    fast = T5TokenizerFast(model).backend_tokenizer
    # as in the published files; the converter leaves the mark of the first word out
    mark = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), mark])
    fast.save(str(folder / "tokenizer.json"))
    return T5Tokenizer(model, legacy=False)


def t5_checkpoint(name):
    """A model with seeded random weights, its tokenizer and its folder as published."""
    import torch
    from published import published
    from transformers import T5ForConditionalGeneration

    folder = WORK / name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = t5_tokenizer(folder, captions() * 3)
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(published(name)).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if "layer_norm" in key:
                value.copy_(torch.rand_like(value) + 0.5)
    model.save_pretrained(folder, max_shard_size="1GB")  # `large` in parts
    return model, tokenizer, folder


def t5(binary, only):
    import torch
    from published import PUBLISHED

    texts = captions()
    n_tokens = 64
    for name in PUBLISHED:
        if only not in name:
            continue
        model, tokenizer, folder = t5_checkpoint(name)
        (folder / "captions.txt").write_text("\n".join(texts) + "\n")
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=n_tokens, return_tensors="pt")
        with torch.no_grad():
            encoder = model.get_encoder()
            inputs = dict(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            wide, seconds = faster_of_two(lambda: encoder(**inputs).last_hidden_state)
            narrow = encoder.bfloat16()(**inputs).last_hidden_state.float()
        del model, encoder
        mask = tokens.attention_mask[..., None]
        rows = lambda states: (states * mask).flatten(1)
        head(name)
        got, facts = ours(binary, folder, folder, folder / "captions.txt", "f32")
        same = bool((got["ids"] == tokens.input_ids).all())
        print(f"  {'token ids':22} {'equal' if same else 'DIFFERENT'}")
        if not same:
            failed.append("token ids")
        compare("states, f32", rows(got["states"]), rows(wide), absolute=T5, cosine=COSINE)
        print(
            f"  loaded in {facts['load_s']} s, then {facts['load_peak_mib']} MiB resident at most for"
            f" {facts['weights_mib']} MiB of weights; {len(texts)} texts: {facts['texts_s']} s, PyTorch {seconds:.3f} s"
        )
        # bf16 rounds to 1 in 256 at every step: as far from f32 as PyTorch's own is the bar, with a margin of half
        theirs = (rows(narrow) - rows(wide)).abs().max().item()
        got, facts = ours(binary, folder, folder, folder / "captions.txt", "bf16")
        compare("states, bf16", rows(got["states"]), rows(wide), absolute=1.5 * theirs)
        print(f"  PyTorch's bf16 is {theirs:.2e} from its f32; {facts['load_peak_mib']} MiB resident at most in bf16")


def stable_audio_folder():
    """Its folder, and a tokenizer for it."""
    folder = WORK / "stable-audio-open-1.0"
    folder.mkdir(parents=True, exist_ok=True)
    return folder, t5_tokenizer(folder, captions() * 3)


def stable_audio(binary, _):
    import stable_audio as pipeline

    folder, tokenizer = stable_audio_folder()
    pipeline.run(binary, folder, tokenizer, captions()[:2], ours, compare, head)


def gradients(binary, _):
    import gradients as script
    import stable_audio as pipeline

    folder, tokenizer = stable_audio_folder()
    script.run(binary, folder, pipeline.build(folder, tokenizer), ours, failed)


def codecs(binary, only):
    import codecs_parity

    codecs_parity.run(binary, only, WORK, ours, compare, head, faster_of_two, failed)


def musicgen(binary, only):
    import musicgen as pipeline

    spec = importlib.util.spec_from_file_location(
        "musicgen_published", ROOT / "fixtures" / "dragon-musicgen" / "musicgen" / "published.py"
    )
    sys.modules[spec.name] = published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    for name in published.PUBLISHED:
        # The larger ones on demand: they take 8 and 14 GB of disk and memory.
        if name != "musicgen-small" if not only else only not in name:
            continue
        folder = WORK / name
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = t5_tokenizer(folder, captions() * 3)
        pipeline.run(binary, folder, name, tokenizer, captions(), ours, compare, head, failed)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = [clap, t5, stable_audio, gradients, codecs, musicgen]
    models = {model.__name__: model for model in models}
    parser.add_argument("model", choices=list(models))
    parser.add_argument("--only", default="", help="the checkpoints whose name contains this")
    parser.add_argument("--binary", required=True, help="our side, an example of the workspace")
    args = parser.parse_args()
    peers.environment(__file__, *PACKAGES)
    models[args.model](args.binary, args.only)
    if failed:
        sys.exit(f"beyond their bars: {', '.join(failed)}")


if __name__ == "__main__":
    main()
