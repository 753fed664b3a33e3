"""MusicGen beside transformers: text states, logits of every step, greedy codes, audio of given codes, and the times."""

import os
import time

PROMPTS, STEPS, SCALE = 2, 50, 3.0
# Bars in f32, absolute.
STATES, LOGITS, AUDIO = 1e-4, 1e-3, 1e-4


def run(binary, folder, name, tokenizer, prompts, ours, compare, head, failed):
    import torch
    from musicgen_published import PUBLISHED, build, greedy, spread
    from safetensors.torch import save_file

    prompts = prompts[:PROMPTS]
    model = spread(build(PUBLISHED[name]), seed=0)
    model.save_pretrained(folder, max_shard_size="5GB")  # medium and large in parts
    n_parameters = sum(value.numel() for value in model.decoder.parameters())
    tokens = dict(tokenizer(prompts, padding=True, return_tensors="pt"))
    n_frames = STEPS - model.config.decoder.num_codebooks + 1
    with torch.no_grad():
        states = model.text_encoder(**tokens).last_hidden_state
    # The faster of two passes: the first finds memory and threads cold.
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        codes, logits, _ = greedy(model, tokens, n_frames, SCALE, codec=False)
        seconds.append(time.perf_counter() - start)
    with torch.no_grad():
        decoding = []
        for _ in range(2):
            start = time.perf_counter()
            audio = model.audio_encoder.decode(codes[None], [None] * len(prompts)).audio_values
            decoding.append(time.perf_counter() - start)
    del model
    save_file(dict(codes=codes.contiguous()), folder / "given.safetensors")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    got, facts = ours(binary, folder, folder, folder / "prompts.txt", SCALE, folder / "given.safetensors")

    head(name)
    mask = tokens["attention_mask"][..., None]
    compare("text states", (got["states"] * mask).flatten(1), (states * mask).flatten(1), absolute=STATES)
    pieces = lambda x: x.transpose(0, 1).flatten(1)  # a row for each piece, with text and without
    compare(f"logits of {STEPS} steps", pieces(got["logits"]), pieces(logits), absolute=LOGITS)
    same = (got["codes"] == codes).float().mean().item()
    print(f"  {'greedy codes':22} {'equal' if same == 1 else f'{100 * same:.1f} % EQUAL'}")
    if same != 1:
        failed.append("greedy codes")
    compare("audio of given codes", got["audio"].flatten(1), audio.flatten(1), absolute=AUDIO)
    with_text, without = logits.unflatten(1, (2, -1)).unbind(1)
    guided = without + SCALE * (with_text - without)
    top = guided.topk(2, dim=-1).values
    gap = top[..., 0] - top[..., 1]
    print(
        f"  {codes.numel()} codes, {codes.unique().numel()} different ones; between the two likeliest: {gap.min().item():.1e} at least,"
        f" {gap.mean().item():.2f} in the mean; deviation of the logits {with_text.std().item():.2f}, of the audio {audio.std().item():.2f}"
    )
    print(
        f"  {n_parameters / 1e6:.0f} M parameters in the decoder; {len(prompts)} prompts: {STEPS} guided steps {facts['steps_s']} s"
        f" (PyTorch {min(seconds):.3f} s), {n_frames} frames decoded in {facts['decode_s']} s (PyTorch {min(decoding):.3f} s)"
    )
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    print(
        f"  loaded in {facts['load_s']} s, {facts['load_peak_mib']} MiB resident at most then, {facts['peak_mib']} MiB in the end;"
        f" the files have {size:.0f} MiB; PyTorch on {torch.get_num_threads()} threads of {os.cpu_count()}"
    )
