//! Against descript-audio-codec 1.0.0 and torch: `fixtures/dragon-vae/dac/generate.py`.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use dragon_nn::{Checkpoint, Loader};
use dragon_testkit::{Tol, assert_close};
use dragon_vae::discriminator::{self, Discriminator};
use dragon_vae::losses::{Floor, MelLoss};
use dragon_vae::published::Layout;
use dragon_vae::stft::Stft;
use dragon_vae::{AudioVae, Config};

const LAYER: Tol = Tol { atol: 1e-5, rtol: 1e-4 };
const MODEL: Tol = Tol { atol: 1e-4, rtol: 1e-3 };

fn case() -> HashMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-vae/dac/case.safetensors");
    candle_core::safetensors::load(path, &Device::Cpu).unwrap()
}

fn weights(case: &HashMap<String, Tensor>) -> VarBuilder<'static> {
    let weights = case.iter().filter_map(|(k, v)| Some((k.strip_prefix("weights.")?.to_string(), v.clone())));
    VarBuilder::from_tensors(weights.collect(), DType::F32, &Device::Cpu)
}

#[test]
fn encoder_and_decoder_match_the_reference() {
    let case = case();
    let vae = AudioVae::new(&Config::tiny(), weights(&case)).unwrap();
    let posterior = vae.encode(&case["audio"]).unwrap();
    let got = Tensor::cat(&[posterior.mean, posterior.log_var], 1).unwrap();
    assert_close(&got, &case["posterior"], MODEL);
    assert_close(&vae.decode(&case["latents"]).unwrap(), &case["decoded"], MODEL);
}

#[test]
fn oobleck_matches_its_references() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-vae/oobleck/case.safetensors");
    let case = candle_core::safetensors::load(&path, &Device::Cpu).unwrap();
    let cfg = Config {
        latent_dim: 4,
        strides: vec![2, 4],
        encoder_channels: vec![8, 8, 16],
        decoder_channels: vec![8, 8, 16],
        encoder_units: vec![3, 3],
        decoder_units: vec![3, 3],
        ..Config::stable_audio_open()
    };
    for (prefix, layout) in
        [("stable_audio_tools", Layout::StableAudioTools), ("diffusers", Layout::Diffusers)]
    {
        let loader = Loader::new(Checkpoint::open(&path).unwrap(), move |name| {
            vec![format!("{prefix}.{}", layout.name(name))]
        });
        let vb = loader.builder(DType::F32, &Device::Cpu);
        let vae = AudioVae::new(&cfg, vb).unwrap();
        let posterior = vae.encode(&case["audio"]).unwrap();
        assert_close(&posterior.mean, &case["mean"], MODEL);
        assert_close(&(posterior.log_var * 0.5).unwrap().exp().unwrap(), &case["std"], MODEL);
        assert_close(&vae.decode(&case["latents"]).unwrap(), &case["decoded"], MODEL);
    }
}

#[test]
fn stable_audio_open_asks_for_the_published_tensors() {
    for (file, prefix, layout) in [
        ("stable_audio_tools.shapes", "pretransform.model.", Layout::StableAudioTools),
        ("diffusers.shapes", "", Layout::Diffusers),
    ] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/dragon-vae/oobleck").join(file);
        let text = std::fs::read_to_string(path).unwrap();
        let shapes = text.lines().map(|line| {
            let (name, shape) = line.split_once(' ').unwrap();
            let numbers = shape.trim_matches(['[', ']']).split(", ");
            (name.to_string(), numbers.map(|n| n.parse().unwrap()).collect())
        });
        let loader = Loader::new(Checkpoint::without_data(shapes), move |name| {
            vec![format!("{prefix}{}", layout.name(name))]
        });
        AudioVae::new(&Config::stable_audio_open(), loader.builder(DType::F32, &Device::Cpu)).unwrap();
        let tensors = loader.finish(|_| false).unwrap();
        let n: usize = tensors.values().map(Tensor::elem_count).sum();
        assert_eq!(n, 156_112_514, "{file}");
    }
}

#[test]
fn discriminators_match_the_reference() {
    let case = case();
    let cfg = discriminator::Config {
        periods: vec![3],
        period_channels: vec![4, 8, 8, 8, 8],
        fft_sizes: vec![64],
        band_channels: 4,
    };
    let discriminator = Discriminator::new(&cfg, weights(&case)).unwrap();
    let audio = case["audio"].squeeze(1).unwrap();
    let maps = discriminator.forward(&audio).unwrap();
    for (i, maps) in maps.iter().enumerate() {
        for (j, got) in maps.iter().enumerate() {
            let want = &case[&format!("map.{i}.{j}")];
            let got = if i == 0 {
                let (rows, length, channels) = got.dims3().unwrap(); // [B*period, L, C]
                got.reshape((rows / 3, 3, length, channels)).unwrap().permute((0, 3, 2, 1)).unwrap() // [B, C, L, period]
            } else {
                got.permute((0, 3, 1, 2)).unwrap() // [B, C, T, F]
            };
            assert_close(&got, want, MODEL);
        }
        assert!(!case.contains_key(&format!("map.{i}.{}", maps.len())));
    }
}

#[test]
fn magnitudes_and_mel_filters_match_the_references() {
    let case = case();
    let audio = case["audio"].squeeze(1).unwrap();
    let magnitude = Stft::quarter(64).magnitude(&audio).unwrap();
    assert_close(&magnitude, &case["stft_magnitude"], LAYER);
    let mel = MelLoss::new(1000, &[(64, 10)], Floor::Dac, DType::F32, &Device::Cpu).unwrap();
    assert_close(&mel.log_mels(&audio).unwrap()[0], &case["log_mel"], LAYER);
}
