"""EnCodec, DAC and VGGish against their packages at the published sizes; used by parity.py."""

import importlib.util
import math
import pathlib

import numpy as np
import soundfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Largest absolute error of encoding and decoding, in f32.
BAR = 1e-4
# Part of the codes that may differ.
CODES = 1e-3
# Of the log-mel spectrogram, relative to its largest value.
MEL = 1e-5


def beside(folder):
    """The module `reference` of a folder of fixtures; several folders have one."""
    spec = importlib.util.spec_from_file_location(f"reference_{folder.name}", folder / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def song(sample_rate, seconds):
    """Mono music of the fixtures, its samples taken as those of `sample_rate`."""
    samples = soundfile.read(ROOT / "fixtures" / "music" / "pd_bach_bwv1047.ogg", dtype="float32")[0]
    samples = samples.mean(axis=1) if samples.ndim > 1 else samples
    return np.resize(samples, int(sample_rate * seconds)).astype("float32")


def audio(sample_rate, seconds, channels):
    """Two clips: music, and a sawtooth with noise; stereo: louder on the right."""
    import torch

    music = song(sample_rate, seconds)
    random = np.random.default_rng(0)
    saw = np.arange(len(music)) * 220 / sample_rate % 1 - 0.5
    clips = np.stack([music, 0.5 * saw + 0.05 * random.standard_normal(len(music))]).astype("float32")
    gains = np.linspace(0.6, 1.0, channels, dtype="float32")[None, :, None]
    return torch.from_numpy(clips[:, None] * gains)


def loudness(samples, rate):
    """As audiotools 0.7.2 measures it (`core/loudness.py`): pyloudnorm's K-weighting, blocks of 0.4 s every 0.1 s, the last
    filled up with zeros; in f64."""
    import pyloudnorm
    import scipy.signal

    x = samples.astype("float64")
    x = np.pad(x, (0, max(0, int(0.5 * rate) - len(x))))
    for stage in pyloudnorm.Meter(rate)._filters.values():
        x = stage.passband_gain * scipy.signal.lfilter(stage.b, stage.a, x)
    size, step = int(0.4 * rate), int(0.4 * rate * 0.25)
    n = math.ceil((max(len(x), size) - size) / step) + 1
    x = np.pad(x, (0, (n - 1) * step + size - len(x)))
    power = np.array([(x[i * step : i * step + size] ** 2).sum() / (0.4 * rate) for i in range(n)])
    level = -0.691 + 10 * np.log10(np.maximum(power, 1e-30))
    gate = -0.691 + 10 * np.log10(power[level > -70].mean()) - 10
    return -0.691 + 10 * np.log10(power[(level > -70) & (level > gate)].mean())


def fadtk_rows(kind, model, samples, rate, channels, segment):
    """What fadtk 1.1.0 embeds of a mono song (`model_loader.py`), without its rounding to 16 bits."""
    import torch

    with torch.no_grad():
        if kind == "encodec":
            wave = torch.from_numpy(samples).expand(1, channels, -1)
            step = segment or wave.shape[-1]
            parts = [model.encoder(wave[..., i : i + step])[0].T for i in range(0, wave.shape[-1], step)]
            return torch.cat(parts)
        gain = np.exp((-16 - loudness(samples, rate)) * np.log(10) / 20)
        x = samples * np.float32(gain)
        x = x / max(1.0, np.abs(x).max())
        window = int(5.0 * rate // 4 * 4)
        whole = math.ceil(len(x) / rate / (window / rate)) * window
        x = np.pad(x, (window // 2, whole - len(x) + window // 2)).astype("float32")
        starts = range(0, len(x) - window + 1, window // 2)
        parts = [model.encoder(torch.from_numpy(x[i : i + window])[None, None])[0].T for i in starts]
        return torch.cat(parts)


def run(binary, only, work, ours, compare, head, faster_of_two, failed):
    import torch
    from safetensors.torch import save_file

    def codec(kind, name, path, model, stages, rate, channels, segment=None, n_codebooks=None, seconds=2.0):
        """Encodes, quantises and decodes on both sides; `path` holds the weights."""
        folder = path if path.is_dir() else path.parent
        wave = audio(rate, seconds, channels)
        if segment:  # of the length that the model is made for
            wave = wave[..., :segment]
        found, _ = faster_of_two(lambda: stages(model, wave, n_codebooks))
        with torch.no_grad():
            _, encode_s = faster_of_two(lambda: model.encoder(wave))
            quantizer = model.quantizer
            if hasattr(quantizer, "from_codes"):
                decode = lambda: model.decoder(quantizer.from_codes(found["codes"])[0])
            else:
                layers = getattr(quantizer, "vq", quantizer).layers
                decode = lambda: model.decoder(
                    sum(layer.decode(found["codes"][:, i]) for i, layer in enumerate(layers[: found["codes"].shape[1]]))
                )
            _, decode_s = faster_of_two(decode)
        music = song(rate, 12.3)
        rows = fadtk_rows(kind, model, music, rate, channels, segment)
        given = {"audio": wave, "latents": found["latents"], "codes": found["codes"], "song": torch.from_numpy(music)}
        save_file({key: value.contiguous() for key, value in given.items()}, folder / "given.safetensors")
        got, facts = ours(binary, folder, kind, path, folder / "given.safetensors")
        head(name)
        compare("latents", got["latents"], found["latents"], absolute=BAR)
        # Of two vectors that are equally near, rounding decides.
        differ, n = (got["codes"].long() != found["codes"]).sum().item(), found["codes"].numel()
        print(f"  {'codes':22} {differ} of {n} differ  {'ok' if differ <= CODES * n else 'BEYOND ITS BAR'}")
        if differ > CODES * n:
            failed.append(f"{name}: codes")
        compare("decoded", got["decoded"], found["decoded"], absolute=BAR)
        compare("rows of a song", got["rows"].T, rows.T, absolute=BAR)
        print(
            f"  loaded in {facts['load_s']} s; two clips of {wave.shape[-1] / rate:g} s: encode {facts['encode_s']} s, PyTorch"
            f" {encode_s:.3f} s; decode {facts['decode_s']} s, PyTorch {decode_s:.3f} s; {facts['peak_mib']} MiB resident at most"
        )

    fixtures = ROOT / "fixtures" / "dragon-vae"
    encodec = beside(fixtures / "encodec")
    for name, file, channels in [("encodec_24khz", "encodec_24khz-d7cc33bc.th", 1), ("encodec_48khz", "encodec_48khz-7e698e3e.th", 2)]:
        if only in name:
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            model = encodec.encodec(name, seed=0)
            torch.save(model.state_dict(), folder / file)
            codec("encodec", name, folder / file, model, encodec.stages, model.sample_rate, channels, model.segment_length)
    for name, channels, segment in [("encodec_24khz", 1, None), ("encodec_48khz", 2, 48000), ("encodec_32khz", 1, None)]:
        if only in f"hugging_face_{name}":
            folder = work / f"hugging_face_{name}"
            model = encodec.hugging_face(name, seed=0)
            model.save_pretrained(folder)
            rate = model.config.sampling_rate
            codec("encodec", f"hugging_face_{name}", folder, model, encodec.stages, rate, channels, segment)
    dac = beside(fixtures / "dac_codec")
    for name in dac.DESCRIPT:
        if only in name:
            folder = work / name
            folder.mkdir(parents=True, exist_ok=True)
            model = dac.descript_model(name, seed=0)
            torch.save(dac.descript_file(name, model), folder / "weights.pth")
            codec("dac", name, folder / "weights.pth", model, dac.stages, model.sample_rate, 1)
    for name in dac.HUGGING_FACE:
        if only in f"hugging_face_{name}":
            folder = work / f"hugging_face_{name}"
            model = dac.hugging_face(name, seed=0)
            model.save_pretrained(folder)
            codec("dac", f"hugging_face_{name}", folder, model, dac.stages, model.config.sampling_rate, 1)
    if only in "vggish":
        vggish = beside(ROOT / "fixtures" / "dragon-encoders" / "vggish")
        folder = work / "vggish"
        folder.mkdir(parents=True, exist_ok=True)
        model = vggish.vggish(seed=0)
        torch.save(model.state_dict(), folder / "vggish-10086976.pth")
        samples = song(16000, 20.5)
        save_file({"audio": torch.from_numpy(samples)}, folder / "given.safetensors")
        theirs, seconds = faster_of_two(lambda: vggish.embeddings(model, samples))
        got, facts = ours(binary, folder, "vggish", folder / "vggish-10086976.pth", folder / "given.safetensors")
        head("vggish")
        log_mel = torch.from_numpy(vggish.log_mel(samples))
        compare("log-mel", got["log_mel"], log_mel, relative=MEL)
        compare("embeddings", got["embeddings"], theirs, absolute=BAR)
        print(
            f"  loaded in {facts['load_s']} s; {len(samples) / 16000:g} s of music: {facts['embed_s']} s, torchvggish {seconds:.3f} s;"
            f" {facts['peak_mib']} MiB resident at most"
        )
