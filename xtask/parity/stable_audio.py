"""Stable Audio Open 1.0 beside diffusers: text encoder, conditioners, network, twenty guided steps, autoencoder."""

import shutil
import time

STEPS, SCALE, SECONDS, FRAMES = 20, 7.0, 2.0, 48
# Bars in f32 of the stages, absolute; of sampled latents, in their standard deviation.
STAGE, SAMPLED = 1e-4, 1e-3


def build(folder, tokenizer):
    """The published configuration with seeded random weights, written as diffusers writes it."""
    import torch
    from diffusers import AutoencoderOobleck, CosineDPMSolverMultistepScheduler, StableAudioDiTModel, StableAudioPipeline
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel
    from published import published
    from transformers import T5EncoderModel

    torch.manual_seed(0)
    text = T5EncoderModel(published("t5-base")).eval()  # without dropout
    transformer = StableAudioDiTModel().eval()
    projection = StableAudioProjectionModel(768, 768, 0, 512).eval()
    vae = AutoencoderOobleck().eval()
    with torch.no_grad():  # away from special initial values
        for module in (text, transformer, vae):
            for name, value in module.state_dict().items():
                if "norm" in name and name.endswith("weight"):
                    value.copy_(torch.rand_like(value) + 0.5)
                elif name.endswith(("alpha", "beta")):
                    value.copy_(torch.randn_like(value) * 0.3)
                elif "process_conv" in name:
                    value.copy_(torch.randn_like(value) * 0.05)
    pipeline = StableAudioPipeline(
        vae=vae, text_encoder=text, projection_model=projection, tokenizer=tokenizer, transformer=transformer,
        scheduler=CosineDPMSolverMultistepScheduler(),
    )  # fmt: skip
    pipeline.save_pretrained(folder, max_shard_size="2GB")
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer")  # the published folder has it too
    return pipeline


def run(binary, folder, tokenizer, prompts, ours, compare, head):
    import diffusers.schedulers.scheduling_cosine_dpmsolver_multistep as scheduling
    import torch
    from diffusers.models.embeddings import get_1d_rotary_pos_embed
    from safetensors.torch import save_file

    pipeline = build(folder, tokenizer)
    torch.manual_seed(1)
    n = len(prompts)
    noise = torch.randn(STEPS + 1, n, 64, FRAMES)
    given = dict(noise=noise, x=torch.randn(n, 64, FRAMES), t=torch.linspace(0.2, 0.9, n))
    given["audio"] = torch.randn(n, 2, 2048 * FRAMES) * 0.2
    given["latents"] = torch.randn(n, 64, FRAMES)
    theirs, seconds = {}, {}

    def timed(name, f):
        start = time.perf_counter()
        out = f()
        seconds[name] = time.perf_counter() - start
        return out

    draws = iter(noise[1:])

    class Given:
        def __init__(self, *args, **kwargs):
            pass

        def __call__(self, sigma, sigma_next):
            return next(draws)

    scheduling.BrownianTreeNoiseSampler = Given
    network, projection, vae = pipeline.transformer, pipeline.projection_model, pipeline.vae
    with torch.no_grad():
        tokens = pipeline.tokenizer(
            prompts, padding="max_length", max_length=128, truncation=True, return_tensors="pt"
        )
        states = pipeline.text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        theirs["states"] = states * tokens.attention_mask[..., None]
        numbers = projection(
            start_seconds=torch.zeros(n), end_seconds=torch.full((n,), SECONDS)
        )
        start, total = numbers.seconds_start_hidden_states, numbers.seconds_end_hidden_states
        theirs["tokens"] = torch.cat([theirs["states"], start, total], 1)
        glob = torch.cat([start, total], 2)
        rotary = get_1d_rotary_pos_embed(32, FRAMES + 1, use_real=True, repeat_interleave_real=False)

        def evaluate(x, t, cond, glob):
            return network(x, t, cond, glob, rotary_embedding=rotary, return_dict=False)[0]

        theirs["network"] = timed("network", lambda: evaluate(given["x"], given["t"], theirs["tokens"], glob))

        def sample():
            scheduler = pipeline.scheduler
            scheduler.set_timesteps(STEPS)
            latents = noise[0] * scheduler.init_noise_sigma
            cond = torch.cat([torch.zeros_like(theirs["tokens"]), theirs["tokens"]])
            globs = torch.cat([glob, glob])
            for step in scheduler.timesteps:
                both = scheduler.scale_model_input(torch.cat([latents, latents]), step)
                without, with_text = evaluate(both, step[None].expand(2 * n), cond, globs).chunk(2)
                latents = scheduler.step(without + SCALE * (with_text - without), step, latents).prev_sample
            return latents

        theirs["latents"] = timed("sampling", sample)
        theirs["decoded"] = timed("decode", lambda: vae.decode(given["latents"]).sample)
        posterior = timed("encode", lambda: vae.encode(given["audio"]).latent_dist)
        theirs["encoded"] = torch.cat([posterior.mean, posterior.std], 1)
    del pipeline, network, projection, vae
    save_file(given, folder / "given.safetensors")
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n")
    arguments = folder, folder / "prompts.txt", SECONDS, STEPS, SCALE, folder / "given.safetensors"
    got, facts = ours(binary, folder, *arguments)
    mask = tokens.attention_mask[..., None]
    head("stable-audio-open-1.0")
    compare("text states", got["states"] * mask, theirs["states"], absolute=STAGE)
    compare("tokens", got["tokens"], theirs["tokens"], absolute=STAGE)
    compare("one evaluation", got["network"], theirs["network"], absolute=STAGE)
    spread = theirs["latents"].std().item()
    compare(f"{STEPS} guided steps", got["latents"], theirs["latents"], absolute=SAMPLED * spread)
    compare("decoder", got["decoded"], theirs["decoded"], absolute=STAGE)
    compare("encoder", got["encoded"], theirs["encoded"], absolute=STAGE)
    times = ", ".join(f"{name} {facts[name + '_s']} s (PyTorch {s:.3f} s)" for name, s in seconds.items())
    print(f"  loaded in {facts['load_s']} s, {facts['load_peak_mib']} MiB resident at most then, {facts['peak_mib']} MiB in the end")
    print(f"  {n} prompts of {FRAMES} frames: {times}")
