//! Training of the audio VAE: one optimiser step of reconstruction, KL and, once it begins, the adversarial stage
//! (the DAC recipe, arXiv:2306.06546 section 3.4, with a KL term for its quantiser losses; paper Appendix E).

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, bail};
use dragon_nn::{AdamW, AdamWConfig, Ema, Params, Rng};
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::discriminator::{self, Discriminator};
use crate::losses::{
    Floor, MelLoss, StftLoss, discriminator_loss, feature_matching_loss, generator_loss, l1, si_sdr,
};
use crate::vae::{self, AudioVae};

/// Weights of the terms of the generator's loss.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossWeights {
    /// Multi-resolution log-mel distance (DAC: 15).
    pub mel: f64,
    /// Multi-resolution STFT distance (DAC: 0 in its final recipe).
    pub stft: f64,
    /// Mean absolute difference of samples; it is what makes phases follow. DAC: 0.
    pub waveform: f64,
    /// KL divergence per latent value, in nats.
    pub kl: f64,
    /// Least-squares adversarial loss (DAC: 1).
    pub adversarial: f64,
    /// Feature matching (DAC: 2).
    pub feature_matching: f64,
}

/// Settings of [`Training`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainingConfig {
    /// Steps of the whole run; the learning rate falls to a twentieth along a half cosine until then.
    pub n_steps: usize,
    /// Steps over which the learning rate rises from 0.
    pub warmup_steps: usize,
    /// Highest learning rate of encoder and decoder.
    pub lr: f64,
    /// Highest learning rate of the discriminators.
    pub discriminator_lr: f64,
    /// Largest norm of the gradient of all weights of one optimiser; above it, the gradient is scaled down.
    pub max_grad_norm: f64,
    /// Decay per step of the average of the weights that is exported.
    pub ema_decay: f64,
    /// Weights of the loss terms.
    pub weights: LossWeights,
    /// Level of a sine below which the logarithms of the mel and STFT losses hear little, in dB of full scale ([`Floor::Level`]);
    /// none: DAC's floor, far below 16-bit audio. Validation always measures with DAC's.
    pub log_floor_db: Option<f64>,
    /// Step at which the adversarial stage begins; none: it never does.
    pub adversarial_from: Option<usize>,
    /// Sizes of the discriminators.
    pub discriminator: discriminator::Config,
    /// Leaves the encoder as it is, so that latents made before stay valid.
    pub freeze_encoder: bool,
}

impl TrainingConfig {
    /// Settings of a small training; the preset `pretrain/vae` has those of the shipped model.
    pub fn tiny_music() -> Self {
        Self {
            n_steps: 4000,
            warmup_steps: 50,
            lr: 8e-4,
            discriminator_lr: 3e-4,
            max_grad_norm: 3.0,
            ema_decay: 0.995,
            weights: LossWeights {
                mel: 1.0,
                stft: 1.0,
                waveform: 5.0,
                kl: 1e-4,
                adversarial: 0.1,
                feature_matching: 0.5,
            },
            log_floor_db: Some(-80.0),
            adversarial_from: None,
            discriminator: discriminator::Config::tiny_music(),
            freeze_encoder: false,
        }
    }
}

/// Model, average, optimisers and discriminators of a run.
pub struct Training {
    cfg: TrainingConfig,
    model: AudioVae,
    encoder: Group,
    decoder: Group,
    averaged: AudioVae,
    mel: MelLoss,
    stft: StftLoss,
    mel_distance: MelLoss,
    discriminator: Discriminator,
    discriminator_group: Group,
    /// Mean and deviation of the latents as the folder has them that the training started from.
    started_with: Option<(Vec<f32>, Vec<f32>)>,
}

/// Variables that one optimiser updates.
struct Group {
    params: Params,
    ema: Ema,
    optimiser: AdamW,
}

impl Group {
    fn new(params: Params, cfg: &TrainingConfig, lr: f64) -> Result<Self> {
        let adam = AdamWConfig {
            lr,
            // DAC's second moments follow faster than Adam's usual 0.9, 0.999.
            beta1: 0.8,
            beta2: 0.99,
            eps: 1e-8,
            weight_decay: 0.0,
            max_grad_norm: Some(cfg.max_grad_norm),
        };
        Ok(Self { ema: Ema::new(&params, cfg.ema_decay)?, optimiser: AdamW::new(&params, adam)?, params })
    }

    fn update(&mut self, grads: &candle_core::backprop::GradStore, lr: f64) -> Result<f64> {
        self.optimiser.set_lr(lr);
        let norm = self.optimiser.step(grads)?;
        self.ema.update(&self.params)?;
        Ok(norm)
    }

    fn state(&self, prefix: &str, out: &mut BTreeMap<String, Tensor>) -> Result<()> {
        for (name, var) in self.params.names_and_vars() {
            out.insert(format!("{prefix}.weights.{name}"), var.as_tensor().copy()?);
        }
        for (name, var) in self.ema.shadow().names_and_vars() {
            out.insert(format!("{prefix}.ema.{name}"), var.as_tensor().copy()?);
        }
        for (name, tensor) in self.optimiser.state()? {
            out.insert(format!("{prefix}.optimiser.{name}"), tensor);
        }
        Ok(())
    }

    fn load_state(&mut self, prefix: &str, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let map: HashMap<String, Tensor> = state.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
        self.params.load_tensors(&map, &format!("{prefix}.weights.")).map_err(candle_core::Error::wrap)?;
        self.ema.shadow().load_tensors(&map, &format!("{prefix}.ema.")).map_err(candle_core::Error::wrap)?;
        let optimiser_prefix = format!("{prefix}.optimiser.");
        let optimiser = state
            .iter()
            .filter_map(|(k, v)| Some((k.strip_prefix(&optimiser_prefix)?.to_string(), v.clone())));
        self.optimiser.load_state(&optimiser.collect())
    }
}

impl Training {
    /// A model with new weights, on the CPU in f32 or on `device`; the weights' noise comes from `seed`.
    ///
    /// # Errors
    /// If a config is not valid.
    pub fn new(model: &Config, cfg: &TrainingConfig, seed: u64, device: &Device) -> Result<Self> {
        let dtype = DType::F32;
        let floor = cfg.log_floor_db.map_or(Floor::Dac, Floor::Level);
        let (encoder, decoder, critic) = (Params::new(seed), Params::new(seed), Params::new(seed));
        let vae =
            AudioVae::from_parts(model, encoder.builder(dtype, device), decoder.builder(dtype, device))?;
        let discriminator = Discriminator::new(&cfg.discriminator, critic.builder(dtype, device))?;
        initialise(model, &encoder, &decoder)?;
        let encoder = Group::new(encoder, cfg, cfg.lr)?;
        let decoder = Group::new(decoder, cfg, cfg.lr)?;
        let averaged = AudioVae::from_parts(
            model,
            encoder.ema.shadow().builder(dtype, device),
            decoder.ema.shadow().builder(dtype, device),
        )?;
        Ok(Self {
            discriminator_group: Group::new(critic, cfg, cfg.discriminator_lr)?,
            mel: MelLoss::dac(model.sample_rate_hz, floor, dtype, device)?,
            stft: StftLoss::new(&[2048, 1024, 512, 128], floor),
            mel_distance: MelLoss::dac(model.sample_rate_hz, Floor::Dac, dtype, device)?,
            cfg: cfg.clone(),
            model: vae,
            encoder,
            decoder,
            averaged,
            discriminator,
            started_with: None,
        })
    }

    /// The model with averaged weights: the one to validate and to export.
    pub fn averaged(&self) -> &AudioVae {
        &self.averaged
    }

    /// Number of scalars of encoder and decoder.
    pub fn len_params(&self) -> usize {
        self.encoder.params.len_params() + self.decoder.params.len_params()
    }

    /// Starts from the weights of a model folder of the same config (average and weights alike; new optimiser).
    ///
    /// # Errors
    /// If the folder cannot be read or does not fit.
    pub fn load_weights(&mut self, dir: &Path) -> Result<()> {
        let tensors = candle_core::safetensors::load(dir.join("model.safetensors"), &Device::Cpu)?;
        for (group, part) in [(&self.encoder, "encoder."), (&self.decoder, "decoder.")] {
            let part: HashMap<_, _> = tensors
                .iter()
                .filter(|(name, _)| name.starts_with(part))
                .map(|(name, tensor)| (name.clone(), tensor.clone()))
                .collect();
            group.params.load_tensors(&part, "").map_err(candle_core::Error::wrap)?;
            group.ema.shadow().load_tensors(&part, "").map_err(candle_core::Error::wrap)?;
        }
        let config = vae::read_config(&dir.join("config.json")).map_err(candle_core::Error::wrap)?;
        self.started_with =
            Some((config.latent_mean, config.latent_std)).filter(|(mean, _)| !mean.is_empty());
        Ok(())
    }

    /// Learning rate at a step, as a fraction of the highest.
    fn lr_scale(&self, step: usize) -> f64 {
        let warmup = ((step + 1) as f64 / self.cfg.warmup_steps.max(1) as f64).min(1.0);
        let progress = (step as f64 / self.cfg.n_steps.max(1) as f64).min(1.0);
        warmup * (0.05 + 0.95 * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos()))
    }

    /// One step: forward, backward, update. Returns named values for the log.
    ///
    /// # Shapes
    /// - `audio`: `[B, audio_channels, T * hop]`.
    /// - `noise`: standard normal, `[B, latent_dim, T]`.
    ///
    /// # Errors
    /// If the shapes do not fit the model, or the loss is not finite (nothing is updated then).
    pub fn step(&mut self, step: usize, audio: &Tensor, noise: &Tensor) -> Result<Vec<(&'static str, f64)>> {
        let scale = self.lr_scale(step);
        let posterior = self.model.encode(audio)?;
        let (mean, log_var) = (&posterior.mean, &posterior.log_var);
        let posterior = if self.cfg.freeze_encoder {
            vae::Posterior { mean: mean.detach(), log_var: log_var.detach() }
        } else {
            posterior.clone()
        };
        let estimate = self.model.decode(&posterior.sample(noise)?)?;
        let (batch, channels, samples) = audio.dims3()?;
        let rows = (batch * channels, samples);
        let (estimate, audio) = (estimate.reshape(rows)?, audio.reshape(rows)?); // [B*channels, samples]

        let w = &self.cfg.weights;
        let mut terms: Vec<(&'static str, f64, Tensor)> = vec![
            ("mel", w.mel, self.mel.forward(&estimate, &audio)?),
            ("stft", w.stft, self.stft.forward(&estimate, &audio)?),
            ("waveform", w.waveform, l1(&estimate, &audio)?),
            ("kl", w.kl, posterior.kl()?),
        ];
        let mut log = Vec::new();
        if self.cfg.adversarial_from.is_some_and(|from| step >= from) {
            let real = self.discriminator.forward(&audio)?;
            let fake = self.discriminator.forward(&estimate.detach())?;
            let loss = discriminator_loss(&fake, &real)?;
            log.push(("discriminator", scalar(&loss)?));
            let lr = self.cfg.discriminator_lr * scale;
            log.push((
                "discriminator_grad_norm",
                self.discriminator_group.update(&dragon_nn::backward(&loss)?, lr)?,
            ));
            let judge = self.discriminator.frozen();
            let fake = judge.forward(&estimate)?;
            let real = judge.forward(&audio)?;
            terms.push(("adversarial", w.adversarial, generator_loss(&fake)?));
            terms.push(("feature_matching", w.feature_matching, feature_matching_loss(&fake, &real)?));
        }

        let mut loss = Tensor::zeros((), audio.dtype(), audio.device())?;
        for (name, weight, term) in &terms {
            log.push((name, scalar(term)?));
            if *weight != 0.0 {
                loss = (loss + (term * *weight)?)?;
            }
        }
        let value = scalar(&loss)?;
        log.push(("loss", value));
        if !value.is_finite() {
            let terms: Vec<String> = log.iter().map(|(name, value)| format!("{name} {value}")).collect();
            bail!("VAE training: the loss of step {step} is not finite ({})", terms.join(", "));
        }
        let grads = dragon_nn::backward(&loss)?;
        let lr = self.cfg.lr * scale;
        if !self.cfg.freeze_encoder {
            log.push(("encoder_grad_norm", self.encoder.update(&grads, lr)?));
        }
        log.push(("decoder_grad_norm", self.decoder.update(&grads, lr)?));
        log.push(("latent_rms", scalar(&posterior.mean.sqr()?.mean_all()?)?.sqrt()));
        log.push(("latent_noise", scalar(&(&posterior.log_var * 0.5)?.exp()?.mean_all()?)?));
        log.push(("lr", lr));
        Ok(log)
    }

    /// Mean over clips of the reconstruction's distance, by the averaged weights and the posterior's mean:
    /// `mel_distance` (as in DAC's recipe, seven resolutions summed, log10), `si_sdr_db`, `level_db` (RMS of the
    /// reconstruction over that of the audio), `kl`.
    ///
    /// # Errors
    /// If a clip does not fit the model.
    pub fn validate(&self, clips: &[Tensor]) -> Result<Vec<(&'static str, f64)>> {
        if clips.is_empty() {
            bail!("VAE validation: expected at least one clip, found none");
        }
        let mut sums = [0f64; 4];
        for audio in clips {
            let posterior = self.averaged.encode(audio)?;
            let estimate = self.averaged.decode(&posterior.mean)?;
            let (batch, channels, samples) = audio.dims3()?;
            let rows = (batch * channels, samples);
            let (estimate, audio) = (estimate.reshape(rows)?, audio.reshape(rows)?);
            let rms = |x: &Tensor| -> Result<f64> { Ok(scalar(&x.sqr()?.mean_all()?)?.sqrt().max(1e-8)) };
            sums[0] += scalar(&self.mel_distance.forward(&estimate, &audio)?)?;
            sums[1] += scalar(&si_sdr(&estimate, &audio)?.mean_all()?)?;
            sums[2] += 20.0 * (rms(&estimate)? / rms(&audio)?).log10();
            sums[3] += scalar(&posterior.kl()?)?;
        }
        let names = ["mel_distance", "si_sdr_db", "level_db", "kl"];
        Ok(names.into_iter().zip(sums.map(|s| s / clips.len() as f64)).collect())
    }

    /// Everything needed to go on bit for bit: weights, averages, moments, discriminators.
    ///
    /// # Errors
    /// Those of copying tensors.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut out = BTreeMap::new();
        self.encoder.state("encoder", &mut out)?;
        self.decoder.state("decoder", &mut out)?;
        self.discriminator_group.state("discriminator", &mut out)?;
        Ok(out)
    }

    /// Takes up a state of [`Training::state`].
    ///
    /// # Errors
    /// If tensors are missing or misshapen.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        self.encoder.load_state("encoder", state)?;
        self.decoder.load_state("decoder", state)?;
        self.discriminator_group.load_state("discriminator", state)
    }

    /// Writes the averaged model with the statistics of its latents over `clips` (posterior means), or, where the encoder
    /// stays, with those that it had: a diffusion model that was trained on its latents expects them.
    ///
    /// # Errors
    /// If a clip does not fit the model, or a file cannot be written.
    pub fn export(&self, dir: &Path, clips: &[Tensor]) -> Result<()> {
        let (mean, std) = match &self.started_with {
            Some(known) if self.cfg.freeze_encoder => known.clone(),
            _ => latent_stats(&self.averaged, clips)?,
        };
        let cfg = Config { latent_mean: mean, latent_std: std, ..self.averaged.config().clone() };
        let mut tensors = BTreeMap::new();
        for group in [&self.encoder, &self.decoder] {
            for (name, var) in group.ema.shadow().names_and_vars() {
                tensors.insert(name, var.as_tensor().clone());
            }
        }
        vae::save(dir, &cfg, &tensors).map_err(candle_core::Error::wrap)
    }
}

/// Changes the layers' initial biases and gains so that the signal, not the biases, is what later layers see.
///
/// With PyTorch's default (biases of the weights' size, gains of 1/√3) the latents' share in the decoder's output is half a
/// percent at the start, and training settles on one spectrum for all music; DAC starts with zero biases too
/// (`init_weights`). Gains: 1 keeps the variance in a convolution with stride 1; a transposed one reads two taps of
/// `Cin` per sample, which asks for `√(stride · Cout / Cin)`; the second convolution of a residual unit starts low. The ends
/// map audio of RMS 0.1 to latents of RMS 1 and back, and the posterior starts with a deviation of e^-2.
fn initialise(cfg: &Config, encoder: &Params, decoder: &Params) -> Result<()> {
    let n = cfg.strides.len();
    let (first, last) = ("encoder.block.0".to_string(), format!("encoder.block.{}", n + 2));
    let decoder_last = format!("decoder.model.{}", n + 2);
    for (name, var) in encoder.names_and_vars().into_iter().chain(decoder.names_and_vars()) {
        let Some((layer, parameter)) = name.rsplit_once('.') else { continue };
        let dims = var.dims().to_vec();
        let mut values = vec![0f32; var.elem_count()];
        match parameter {
            "bias" if layer == last => values[cfg.inner_dim()..].fill(-4.0),
            "bias" => {}
            "weight_g" if layer == last => {
                values[..cfg.inner_dim()].fill(1.0);
                values[cfg.inner_dim()..].fill(0.05);
            }
            "weight_g" if layer == first => values.fill(4.0),
            "weight_g" if layer == decoder_last => values.fill(0.15),
            // Names have 3 parts at the ends, 5 in a stage, 7 in a residual unit of a stage.
            "weight_g" if layer.split('.').count() == 7 && layer.ends_with(".3") => values.fill(0.3),
            "weight_g" if layer.starts_with("decoder") && layer.split('.').count() == 5 => {
                let stage: usize = layer.split('.').nth(2).and_then(|s| s.parse().ok()).unwrap_or(1);
                let (stride, to) = (cfg.strides[n - stage], cfg.decoder_channels[n - stage]);
                values.fill((stride as f32 * to as f32 / dims[0] as f32).sqrt());
            }
            "weight_g" => values.fill(1.0),
            _ => continue,
        }
        var.set(&Tensor::from_vec(values, dims, var.device())?.to_dtype(var.dtype())?)?;
    }
    Ok(())
}

/// Mean and standard deviation of each latent channel (posterior means) over clips `[B, audio_channels, samples]`.
///
/// # Errors
/// If there is no clip, or one does not fit the model.
pub fn latent_stats(model: &AudioVae, clips: &[Tensor]) -> Result<(Vec<f32>, Vec<f32>)> {
    let channels = model.config().latent_dim;
    let (mut sum, mut squares, mut count) = (vec![0f64; channels], vec![0f64; channels], 0usize);
    for audio in clips {
        let latents = model.encode(audio)?.mean; // [B, C, T]
        let rows = latents.transpose(0, 1)?.flatten_from(1)?.to_dtype(DType::F64)?.to_vec2::<f64>()?; // [C, B*T]
        count += rows[0].len();
        for (c, row) in rows.iter().enumerate() {
            sum[c] += row.iter().sum::<f64>();
            squares[c] += row.iter().map(|v| v * v).sum::<f64>();
        }
    }
    if count == 0 {
        bail!("latent statistics: expected at least one clip, found none");
    }
    let n = count as f64;
    let mean: Vec<f64> = sum.iter().map(|s| s / n).collect();
    let std = squares.iter().zip(&mean).map(|(s, m)| (s / n - m * m).max(1e-12).sqrt() as f32).collect();
    Ok((mean.into_iter().map(|m| m as f32).collect(), std))
}

/// Mono clips held in memory as 16-bit samples, from which random crops are drawn.
#[derive(Debug, Clone, Default)]
pub struct Clips {
    clips: Vec<Vec<i16>>,
}

impl Clips {
    /// Adds a clip of samples in [-1, 1]; what lies outside is clipped.
    pub fn push(&mut self, samples: &[f32]) {
        self.clips
            .push(samples.iter().map(|s| (s * 32767.0).round().clamp(-32767.0, 32767.0) as i16).collect());
    }

    /// Number of clips.
    pub fn len(&self) -> usize {
        self.clips.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.clips.is_empty()
    }

    /// `batch` random crops of `samples`, `[batch, 1, samples]`; a shorter clip is followed by silence.
    ///
    /// # Errors
    /// If there is no clip.
    pub fn crops(&self, batch: usize, samples: usize, rng: &mut Rng, device: &Device) -> Result<Tensor> {
        if self.clips.is_empty() {
            bail!("VAE training: expected at least one clip, found none");
        }
        let mut data = Vec::with_capacity(batch * samples);
        for _ in 0..batch {
            let clip = &self.clips[rng.below(self.clips.len())];
            let start = rng.below(clip.len().saturating_sub(samples) + 1);
            let end = (start + samples).min(clip.len());
            data.extend(clip[start..end].iter().map(|s| f32::from(*s) / 32767.0));
            data.resize(data.len() + samples - (end - start), 0.0);
        }
        Tensor::from_vec(data, (batch, 1, samples), device)
    }

    /// The `index`-th clip as `[1, 1, samples]`, cut to a multiple of `hop`.
    ///
    /// # Errors
    /// If it is shorter than one hop.
    pub fn whole(&self, index: usize, hop: usize, device: &Device) -> Result<Tensor> {
        let clip = &self.clips[index];
        let samples = clip.len() / hop * hop;
        if samples == 0 {
            bail!("VAE training: clip {index} has {} samples, expected at least one hop, {hop}", clip.len());
        }
        let data: Vec<f32> = clip[..samples].iter().map(|s| f32::from(*s) / 32767.0).collect();
        Tensor::from_vec(data, (1, 1, samples), device)
    }
}

fn scalar(x: &Tensor) -> Result<f64> {
    x.to_dtype(DType::F64)?.to_scalar::<f64>()
}
