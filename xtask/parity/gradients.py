"""Gradients of DPO and KTO for Stable Audio Open 1.0 beside PyTorch's: of adapters made by peft, and of all weights.

Both sides see the same latents, noise and texts. A line gives the largest error of a stage; of gradients it is the largest
over the tensors of |ours - theirs| / |theirs|, in Euclidean norms."""

import resource
import time

FRAMES, PAIRS, TOKENS, RANK, ALPHA = 48, 2, 128, 16, 16.0
HOP, RATE_HZ = 2048, 44_100
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
BAR = 1e-3


def loss_of(kind, policy, reference, beta):
    import torch
    import torch.nn.functional as F

    gap = reference.detach() - policy
    if kind == "dpo":
        return F.softplus(-0.5 * beta * (gap[::2] - gap[1::2])).mean()
    signs = torch.tensor([1.0, -1.0]).repeat(len(gap) // 2)
    baseline = gap.mean().clamp(min=0).detach()
    return (1 - torch.sigmoid(signs * beta * (gap - baseline))).mean()


def inputs():
    """Latents, noise, noise levels and texts, seeded."""
    import torch

    torch.manual_seed(2)
    n = 2 * PAIRS
    return dict(
        states=torch.randn(n, TOKENS, 768), mask=(torch.arange(TOKENS)[None] < torch.arange(9, 9 + 7 * n, 7)[:, None]).float(),
        x0=torch.randn(n, 64, FRAMES), noise=torch.randn(n, 64, FRAMES), sigmas=torch.tensor([0.4, 0.4, 3.0, 3.0])[:n],
    )  # fmt: skip


def told(projection, states, mask, frames):
    """What the network is told of whole pieces of so many frames: tokens, numbers and rotary positions."""
    import torch
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    n, seconds = len(states), frames * HOP / RATE_HZ
    with torch.no_grad():
        numbers = projection(start_seconds=torch.zeros(n), end_seconds=torch.full((n,), seconds))
    start, total = numbers.seconds_start_hidden_states, numbers.seconds_end_hidden_states
    rotary = get_1d_rotary_pos_embed(32, frames + 1, use_real=True, repeat_interleave_real=False)
    return torch.cat([states * mask[..., None], start, total], 1), torch.cat([start, total], 2), rotary


def error_function(projection, given):
    """The denoising errors of a model on the inputs."""
    import torch

    tokens, glob, rotary = told(projection, given["states"], given["mask"], given["x0"].shape[2])
    sigma = given["sigmas"][:, None, None]

    def errors(model):
        x = given["x0"] + sigma * given["noise"]
        total = sigma**2 + 1
        t = torch.atan(given["sigmas"]) * 2 / torch.pi
        v = model(x / total.sqrt(), t, tokens, glob, rotary_embedding=rotary, return_dict=False)[0]
        denoised = x / total - v * sigma / total.sqrt()
        return (denoised - given["x0"]).square().mean((1, 2)) * (total / sigma**2).flatten()

    return errors


def run(binary, folder, pipeline, ours, failed):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors.torch import save_file

    network, projection = pipeline.transformer.requires_grad_(False), pipeline.projection_model
    del pipeline
    given = inputs()
    errors = error_function(projection, given)

    def line(stage, error, bar=BAR):
        ok = error <= bar
        print(f"  {stage:44} {error:10.2e}  {'ok' if ok else 'BEYOND ITS BAR'}")
        if not ok:
            failed.append(stage)

    def relative(a, b):
        return ((a.double() - b.double()).norm() / b.double().norm()).item()

    def compare(name, got, value, policy, reference, grads, norms, facts, seconds):
        line(f"{name}: errors", max(relative(got["policy"], policy), relative(got["reference"], reference)))
        line(f"{name}: loss", relative(got["loss"], value))
        line(f"{name}: {len(grads)} gradients", max(relative(got[f"grad.{key}"], grad) for key, grad in grads.items()))
        line(f"{name}: norms of all {len(norms)} gradients", ((got["norms"] - norms) / norms).abs().max().item())
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"  {name}: a step {facts['step_s']} s (PyTorch {seconds:.3f} s), {facts['peak_mib']} MiB resident at most"
              f" (this process {peak:.0f} MiB so far)")  # fmt: skip

    def faster_of_two(step, model):
        best = None
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            begin = time.perf_counter()
            result = step()
            seconds = time.perf_counter() - begin
            best = seconds if best is None else min(best, seconds)
        return *result, best

    print("gradients of stable-audio-open-1.0\n  " + f"{'stage':44} {'error':>10}")
    torch.manual_seed(3)
    tuned = get_peft_model(network, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_B" in name:
                value.copy_(torch.randn_like(value) * 0.02)
    tuned.save_pretrained(folder / "adapters")
    save_file(given, folder / "given.safetensors")
    (folder / "out").mkdir(exist_ok=True)
    strip = lambda name: name.removeprefix("base_model.model.").replace(".default", "")
    for kind, beta in [("dpo", 20.0), ("kto", 20.0)]:
        def step():
            with torch.no_grad(), tuned.disable_adapter():
                reference = errors(tuned)
            policy = errors(tuned)
            value = loss_of(kind, policy, reference, beta)
            value.backward()
            return policy.detach(), reference, value.detach()

        policy, reference, value, seconds = faster_of_two(step, tuned)
        grads = {strip(name): p.grad for name, p in tuned.named_parameters() if p.grad is not None}
        norms = torch.stack([grads[name].double().norm() for name in sorted(grads)])
        arguments = folder, folder / "adapters", kind, beta, folder / "given.safetensors"
        got, facts = ours(binary, folder / "out", *arguments)
        compare(f"LoRA, {kind.upper()}", got, value, policy, reference, grads, norms, facts, seconds)
    network = tuned.unload()
    # What we write is what peft reads.
    again = PeftModel.from_pretrained(network, folder / "out" / "ours.safetensors.adapters")
    with torch.no_grad():
        line("adapters that we wrote, read by peft", relative(errors(again), policy), 1e-6)
    network = again.unload()
    for name, value in network.named_parameters():
        value.requires_grad_(True)
    # The policy is the base itself; a reference that is better here and worse there gives every row a gradient of its own.
    given["reference"] = reference * torch.tensor([1.02, 0.99]).repeat(PAIRS)
    save_file(given, folder / "given.safetensors")
    for kind, beta in [("dpo", 20.0), ("kto", 20.0)]:
        def step():
            policy = errors(network)
            value = loss_of(kind, policy, given["reference"], beta)
            value.backward()
            return policy.detach(), value.detach()

        policy, value, seconds = faster_of_two(step, network)
        grads = {name: p.grad for name, p in network.named_parameters()}
        norms = torch.stack([grads[name].double().norm() for name in sorted(grads)])
        # Both sides' gradients and weights together would not fit everywhere.
        last = f"transformer_blocks.{len(network.transformer_blocks) - 1}."
        kept = ("transformer_blocks.0.", last)
        grads = {name: g for name, g in grads.items() if name.startswith(kept) or "blocks" not in name}
        network.zero_grad(set_to_none=True)
        arguments = folder, "-", kind, beta, folder / "given.safetensors"
        got, facts = ours(binary, folder / "out", *arguments)
        compare(f"all weights, {kind.upper()}", got, value, policy, given["reference"], grads, norms, facts, seconds)
