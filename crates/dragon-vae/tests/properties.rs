//! What holds for every autoencoder of this crate, whatever its weights.

use candle_core::{DType, Device, Tensor};
use dragon_nn::{Params, Rng};
use dragon_testkit::{Tol, assert_close};
use dragon_vae::discriminator::{self, Discriminator};
use dragon_vae::losses::{discriminator_loss, feature_matching_loss, generator_loss};
use dragon_vae::training::{Clips, LossWeights, Training, TrainingConfig};
use dragon_vae::{AudioVae, Config, Posterior};

fn noise(shape: impl Into<candle_core::Shape>) -> Tensor {
    Rng::new(5).normal_tensor(shape, DType::F32, &Device::Cpu).unwrap()
}

fn build(cfg: &Config) -> (Params, AudioVae) {
    let params = Params::new(2);
    let vae = AudioVae::new(cfg, params.builder(DType::F32, &Device::Cpu)).unwrap();
    (params, vae)
}

fn scalar(x: &Tensor) -> f32 {
    x.to_scalar::<f32>().unwrap()
}

/// Fails unless every variable has a finite gradient that is not zero.
fn assert_every_gradient(params: &Params, loss: &Tensor) {
    let grads = loss.backward().unwrap();
    for (name, var) in params.names_and_vars() {
        let grad = grads.get(&var).unwrap_or_else(|| panic!("`{name}` has no gradient"));
        let size = scalar(&grad.abs().unwrap().sum_all().unwrap());
        assert!(size.is_finite() && size > 0.0, "`{name}`: gradient of size {size}");
    }
}

fn folded() -> Config {
    Config { frames_per_latent: 2, ..Config::tiny() }
}

fn odd_strides() -> Config {
    Config { strides: vec![3, 5], encoder_units: vec![2, 0], decoder_units: vec![1, 2], ..Config::tiny() }
}

#[test]
fn every_parameter_gets_a_gradient() {
    let (params, vae) = build(&Config::tiny());
    let audio = (noise((2, 1, 64)) * 0.3).unwrap();
    let posterior = vae.encode(&audio).unwrap();
    let estimate = vae.decode(&posterior.sample(&noise((2, 4, 8))).unwrap()).unwrap();
    let loss =
        ((estimate - audio).unwrap().sqr().unwrap().mean_all().unwrap() + posterior.kl().unwrap()).unwrap();
    assert_every_gradient(&params, &loss);
}

#[test]
fn shapes_are_as_documented() {
    for cfg in [Config::tiny(), odd_strides(), folded()] {
        let (_, vae) = build(&cfg);
        let posterior = vae.encode(&noise((2, 1, 6 * cfg.hop()))).unwrap();
        assert_eq!(posterior.mean.dims(), [2, 4, 6]);
        assert_eq!(posterior.log_var.dims(), [2, 4, 6]);
        assert_eq!(vae.decode(&posterior.mean).unwrap().dims(), [2, 1, 6 * cfg.hop()]);
    }
}

#[test]
fn input_that_does_not_fit_is_refused_with_both_numbers() {
    let (_, vae) = build(&Config::tiny());
    let message = |r: candle_core::Result<Posterior>| r.err().unwrap().to_string();
    assert!(message(vae.encode(&noise((1, 1, 12)))).contains("multiple of the hop, 8 samples, found 12"));
    assert!(message(vae.encode(&noise((1, 2, 16)))).contains("expected audio of 1 channels, found 2"));
    let error = vae.decode(&noise((1, 3, 2))).err().unwrap().to_string();
    assert!(error.contains("expected latents of 4 channels, found 3"));
    let error = vae.decode_normalized(&noise((1, 4, 2))).err().unwrap().to_string();
    assert!(error.contains("`latent_mean` and `latent_std` are missing"));
}

#[test]
fn chunked_decode_equals_whole_decode() {
    for cfg in
        [Config::tiny(), odd_strides(), folded(), Config { decoder_units: vec![0, 1], ..Config::tiny() }]
    {
        let (_, vae) = build(&cfg);
        let latents = noise((2, 4, 61));
        let whole = vae.decode(&latents).unwrap();
        for chunk in [1, 7, 16, 60, 61, 100] {
            let chunked = vae.decode_chunked(&latents, chunk).unwrap();
            assert_close(&chunked, &whole, Tol { atol: 1e-5, rtol: 0.0 });
        }
    }
}

#[test]
fn the_receptive_field_is_no_wider_than_needed() {
    let cfg = Config::tiny();
    let params = Params::new(2);
    let decoder = dragon_vae::model::Decoder::new(&cfg, params.builder(DType::F32, &Device::Cpu)).unwrap();
    let (from, to) = decoder.receptive_field(40, 41);
    let latents = candle_core::Var::from_tensor(&noise((1, 4, 81))).unwrap();
    let frame = decoder.forward(&latents).unwrap().narrow(2, 40 * cfg.hop(), cfg.hop()).unwrap();
    let grads = frame.sqr().unwrap().sum_all().unwrap().backward().unwrap();
    let reach = grads.get(&latents).unwrap().abs().unwrap().sum((0, 1)).unwrap().to_vec1::<f32>().unwrap();
    let first = reach.iter().position(|g| *g > 0.0).unwrap() as i64;
    let last = reach.iter().rposition(|g| *g > 0.0).unwrap() as i64;
    assert_eq!((first, last + 1), (from, to));
}

#[test]
fn kl_has_its_closed_form_and_vanishes_at_the_standard_normal() {
    let zeros = Tensor::zeros((2, 3, 4), DType::F32, &Device::Cpu).unwrap();
    let standard = Posterior { mean: zeros.clone(), log_var: zeros.clone() };
    assert_eq!(scalar(&standard.kl().unwrap()), 0.0);
    // Mean 2, deviation 3: ln(1/3) + (9 + 4)/2 - 1/2.
    let posterior = Posterior { mean: (&zeros + 2.0).unwrap(), log_var: (&zeros + 9f64.ln()).unwrap() };
    let want = -(3f32.ln()) + 6.0;
    assert!((scalar(&posterior.kl().unwrap()) - want).abs() < 1e-5);
    let sample = posterior.sample(&(&zeros + 1.0).unwrap()).unwrap();
    assert!((scalar(&sample.mean_all().unwrap()) - 5.0).abs() < 1e-5);
}

#[test]
fn normalisation_is_undone() {
    let (_, mut vae) = build(&Config::tiny());
    vae.set_latent_stats(vec![0.5, -1.0, 2.0, 0.0], vec![2.0, 0.1, 1.0, 3.0]).unwrap();
    let latents = noise((2, 4, 5));
    let back = vae.denormalize(&vae.normalize(&latents).unwrap()).unwrap();
    assert_close(&back, &latents, Tol { atol: 1e-5, rtol: 1e-5 });
}

#[test]
fn every_parameter_of_the_discriminators_gets_a_gradient() {
    let params = Params::new(4);
    let builder = params.builder(DType::F32, &Device::Cpu);
    let discriminator = Discriminator::new(&discriminator::Config::tiny(), builder).unwrap();
    let (real, fake) = (noise((2, 400)), (noise((2, 400)).sin().unwrap() * 0.5).unwrap());
    let fake = candle_core::Var::from_tensor(&fake).unwrap();
    let (real_maps, fake_maps) =
        (discriminator.forward(&real).unwrap(), discriminator.forward(&fake).unwrap());
    assert_every_gradient(&params, &discriminator_loss(&fake_maps, &real_maps).unwrap());
    for loss in [generator_loss(&fake_maps).unwrap(), feature_matching_loss(&fake_maps, &real_maps).unwrap()]
    {
        let grads = loss.backward().unwrap();
        let size = scalar(&grads.get(&fake).unwrap().abs().unwrap().sum_all().unwrap());
        assert!(size.is_finite() && size > 0.0);
    }
}

fn training_config(freeze_encoder: bool) -> TrainingConfig {
    TrainingConfig {
        n_steps: 100,
        warmup_steps: 1,
        lr: 3e-3,
        log_floor_db: None,
        adversarial_from: Some(2),
        discriminator: discriminator::Config::tiny(),
        weights: LossWeights { kl: 1e-3, ..TrainingConfig::tiny_music().weights },
        freeze_encoder,
        ..TrainingConfig::tiny_music()
    }
}

fn sines() -> Clips {
    let mut clips = Clips::default();
    for k in 1..5 {
        let wave: Vec<f32> = (0..4000).map(|i| 0.5 * (i as f32 * 0.02 * k as f32).sin()).collect();
        clips.push(&wave);
    }
    clips
}

fn steps(training: &mut Training, rng: &mut Rng, steps: std::ops::Range<usize>) -> Vec<f64> {
    let clips = sines();
    let mut losses = Vec::new();
    for step in steps {
        let audio = clips.crops(2, 1200, rng, &Device::Cpu).unwrap();
        let noise = rng.normal_tensor((2, 4, 150), DType::F32, &Device::Cpu).unwrap();
        let log = training.step(step, &audio, &noise).unwrap();
        losses.push(log.iter().find(|(name, _)| *name == "mel").unwrap().1);
    }
    losses
}

#[test]
fn training_lowers_the_distance_and_resumes_bit_for_bit() {
    let mut rng = Rng::new(1);
    let mut training = Training::new(&Config::tiny(), &training_config(false), 1, &Device::Cpu).unwrap();
    let losses = steps(&mut training, &mut rng, 0..12);
    assert!(losses[10] + losses[11] < losses[0] + losses[1], "{losses:?}");
    let mut resumed = Training::new(&Config::tiny(), &training_config(false), 2, &Device::Cpu).unwrap();
    resumed.load_state(&training.state().unwrap()).unwrap();
    let mut rng_resumed = rng.clone();
    let on = steps(&mut training, &mut rng, 12..15);
    assert_eq!(on, steps(&mut resumed, &mut rng_resumed, 12..15));
}

#[test]
fn a_frozen_encoder_stays_and_the_exported_folder_loads() {
    let dir = tempfile::tempdir().unwrap();
    let mut training = Training::new(&Config::tiny(), &training_config(true), 1, &Device::Cpu).unwrap();
    let clip = sines().whole(0, 8, &Device::Cpu).unwrap();
    let before = training.averaged().encode(&clip).unwrap().mean;
    let decoded = training.averaged().decode(&before).unwrap();
    steps(&mut training, &mut Rng::new(1), 0..3);
    assert_close(&training.averaged().encode(&clip).unwrap().mean, &before, Tol { atol: 0.0, rtol: 0.0 });
    training.export(dir.path(), std::slice::from_ref(&clip)).unwrap();
    let loaded = AudioVae::load(dir.path(), DType::F32, &Device::Cpu).unwrap();
    let latents = loaded.encode_normalized(&clip).unwrap();
    let mean = scalar(&latents.mean_all().unwrap());
    assert!(mean.abs() < 1e-4, "{mean}");
    let again = loaded.decode_normalized(&latents).unwrap();
    let want = training.averaged().decode(&before).unwrap();
    assert_close(&again, &want, Tol { atol: 1e-5, rtol: 1e-4 });
    assert!(scalar(&(again - decoded).unwrap().abs().unwrap().max_all().unwrap()) > 0.0);

    // Trained on from that folder with other clips, the latents keep their scale, for the diffusion models made before.
    let other = sines().whole(3, 8, &Device::Cpu).unwrap();
    for (freeze_encoder, same) in [(true, true), (false, false)] {
        let config = training_config(freeze_encoder);
        let mut training = Training::new(&Config::tiny(), &config, 2, &Device::Cpu).unwrap();
        training.load_weights(dir.path()).unwrap();
        let next = tempfile::tempdir().unwrap();
        training.export(next.path(), std::slice::from_ref(&other)).unwrap();
        let next = AudioVae::load(next.path(), DType::F32, &Device::Cpu).unwrap();
        assert_eq!(next.config().latent_std == loaded.config().latent_std, same);
    }
}

#[test]
fn a_folder_of_another_shape_is_refused_with_all_differences() {
    let dir = tempfile::tempdir().unwrap();
    let training = Training::new(&Config::tiny(), &training_config(false), 1, &Device::Cpu).unwrap();
    training.export(dir.path(), &[sines().whole(0, 8, &Device::Cpu).unwrap()]).unwrap();
    let path = dir.path().join("config.json");
    let json = std::fs::read_to_string(&path).unwrap();
    let mut cfg: Config = serde_json::from_str(&json).unwrap();
    cfg.encoder_channels = vec![4, 8, 32];
    std::fs::write(&path, serde_json::to_string(&cfg).unwrap()).unwrap();
    let message = AudioVae::load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("does not fit this config"), "{message}");
    assert!(
        message.contains("encoder.block.3.alpha") && message.contains("encoder.block.4.weight_v"),
        "{message}"
    );
    std::fs::write(&path, "{\"hop\": 3}").unwrap();
    let message = AudioVae::load(dir.path(), DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("config.json` is not a VAE config: unknown field `hop`"), "{message}");
    let message =
        AudioVae::load(&dir.path().join("nowhere"), DType::F32, &Device::Cpu).unwrap_err().to_string();
    assert!(message.contains("cannot access"), "{message}");
}

#[test]
fn encoding_in_chunks_equals_encoding_at_once() {
    for cfg in [Config::tiny(), Config { strides: vec![3, 2], frames_per_latent: 2, ..Config::tiny() }] {
        let vae = AudioVae::new(&cfg, Params::new(1).builder(DType::F32, &Device::Cpu)).unwrap();
        let hop = cfg.hop();
        let noise = Rng::from_key("audio", 0).normal_tensor((2, 1, 61 * hop + 5), DType::F32, &Device::Cpu);
        let audio = noise.unwrap();
        let whole = vae.encode(&audio.narrow(2, 0, 61 * hop).unwrap()).unwrap().mean;
        for chunk in [1, 7, 60, 61, 100] {
            assert_close(&vae.encode_mean_chunked(&audio, chunk).unwrap(), &whole, Tol::EXACT);
        }
        assert!(vae.encode_mean_chunked(&audio.narrow(2, 0, hop - 1).unwrap(), 4).is_err());
    }
}
