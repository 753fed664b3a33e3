//! Clips as latents, encoded once and kept in a cache.
//!
//! A part of the cache is a file of [`SHARD_CLIPS`] clips' latents, named by a hash of what they depend on: the contents of
//! the VAE's two files and of the clips' audio, and the number of frames. Trainings that differ in the DiT only share it,
//! clips may change their names, and what changes under the same name is encoded anew.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use dragon_data::manifest::Entry;
use dragon_nn::write_safetensors;
use dragon_vae::AudioVae;
use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::super::check_rate;
use super::DataConfig;
use crate::embed::read_song;
use crate::error::{Error, Result};
use crate::inputs::sha256;
use crate::run::{RunContext, hex};

/// Latents with captions.
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSet {
    /// `[N, C, T]`, row by row; unit variance per channel.
    pub latents: Vec<f32>,
    /// Channels `C`.
    pub channels: usize,
    /// Frames `T`.
    pub n_frames: usize,
    /// `N` captions.
    pub captions: Vec<String>,
}

impl LatentSet {
    /// Number of clips.
    pub fn len(&self) -> usize {
        self.captions.len()
    }

    /// Whether there is no clip.
    pub fn is_empty(&self) -> bool {
        self.captions.is_empty()
    }

    /// The clips at `rows`, `[B, C, T]`.
    pub(super) fn batch(&self, rows: &[usize], device: &Device) -> Result<Tensor> {
        let size = self.channels * self.n_frames;
        let values: Vec<f32> =
            rows.iter().flat_map(|&i| self.latents[i * size..(i + 1) * size].to_vec()).collect();
        Ok(Tensor::from_vec(values, (rows.len(), self.channels, self.n_frames), device)?)
    }
}

/// Clips encoded and stored at a time.
const SHARD_CLIPS: usize = 128;
/// Clips encoded in one call.
const ENCODE_CLIPS: usize = 8;

/// The normalised latents (means) of clips, from the cache where they are there.
///
/// # Errors
/// If the VAE or a clip cannot be read, a clip is too short, the cache cannot be written, or `ctx` is asked to stop.
pub fn latents(cfg: &DataConfig, entries: &[&Entry], device: &Device, ctx: &RunContext) -> Result<LatentSet> {
    let vae = AudioVae::load(&cfg.vae, DType::F32, device).map_err(Error::input("cannot load the VAE"))?;
    let vae_config = vae.config().clone();
    if vae_config.latent_mean.is_empty() {
        return Err(Error::Content {
            path: cfg.vae.join("config.json"),
            problem: "has no latent statistics".into(),
            hint: "`dragon pretrain vae` measures them at its end".into(),
        });
    }
    let vae_hash = sha256(&["config.json", "model.safetensors"].map(|file| cfg.vae.join(file)))?;
    std::fs::create_dir_all(&cfg.cache).map_err(Error::io("create", &cfg.cache))?;
    let folder = cfg.manifest.parent().unwrap_or(Path::new("."));
    let rate = vae_config.sample_rate_hz;
    entries.iter().try_for_each(|clip| check_rate(clip, &cfg.manifest, rate, "data.vae"))?;
    let mut all = Vec::new();
    let n_shards = entries.len().div_ceil(SHARD_CLIPS);
    let mut n_encoded = 0;
    for (shard, clips) in entries.chunks(SHARD_CLIPS).enumerate() {
        if ctx.stopped() {
            return Err(Error::Data {
                problem: format!("stopped after encoding {shard} of {n_shards} parts of the clips"),
                hint: "what is encoded is kept; start again to go on".into(),
            });
        }
        let audio: Vec<PathBuf> = clips.iter().map(|clip| folder.join(&clip.path)).collect();
        let audio: Vec<String> =
            audio.par_iter().map(|path| sha256(std::slice::from_ref(path))).collect::<Result<_>>()?;
        let mut key = Sha256::new();
        key.update(format!("{vae_hash} {}\n{}", cfg.n_frames, audio.join("\n")));
        let path = cfg.cache.join(format!("latents-{}.safetensors", &hex(&key.finalize())[..24]));
        if !path.exists() {
            let tensor = encode_clips(&vae, folder, cfg.n_frames, clips, device)?;
            write_safetensors(&path, &BTreeMap::from([("latents".to_owned(), tensor)]), &BTreeMap::new())
                .map_err(Error::input(format!("cannot write `{}`", path.display())))?;
            n_encoded += clips.len();
            tracing::info!("encoded part {} of {n_shards} of the clips", shard + 1);
        }
        let tensor = candle_core::safetensors::load(&path, &Device::Cpu)
            .ok()
            .and_then(|mut file| file.remove("latents"))
            .filter(|t| t.dims() == [clips.len(), vae_config.latent_dim, cfg.n_frames])
            .ok_or_else(|| Error::Content {
                path: path.clone(),
                problem: "is not a part of the latent cache".into(),
                hint: "remove the file; it will be made again".into(),
            })?;
        all.extend(tensor.flatten_all()?.to_vec1::<f32>()?);
    }
    tracing::info!("{} clips, {n_encoded} of them encoded now", entries.len());
    Ok(LatentSet {
        latents: all,
        channels: vae_config.latent_dim,
        n_frames: cfg.n_frames,
        captions: entries.iter().map(|e| e.caption.clone()).collect(),
    })
}

fn encode_clips(
    vae: &AudioVae,
    folder: &Path,
    n_frames: usize,
    clips: &[&Entry],
    device: &Device,
) -> Result<Tensor> {
    let config = vae.config();
    let n_samples = n_frames * config.hop();
    let mut parts = Vec::new();
    for group in clips.chunks(ENCODE_CLIPS) {
        let mut samples = Vec::with_capacity(group.len() * n_samples);
        for clip in group {
            let path = folder.join(&clip.path);
            let audio = read_song(&path, config.sample_rate_hz, n_samples).map_err(Error::input(format!(
                "cannot use clip `{}` for {n_frames} latent frames (`data.n_frames`)",
                clip.id
            )))?;
            for _ in 0..config.audio_channels {
                samples.extend_from_slice(&audio.samples[..n_samples]);
            }
        }
        let audio = Tensor::from_vec(samples, (group.len(), config.audio_channels, n_samples), device)?;
        parts.push(vae.encode_normalized(&audio)?.detach().to_device(&Device::Cpu)?);
    }
    Ok(Tensor::cat(&parts, 0)?)
}

#[cfg(test)]
mod tests {
    use dragon_audio::{Clip, SampleFormat, write_wav};
    use dragon_data::{CaptionSource, Corpus, Split};
    use dragon_nn::Params;

    use super::*;

    fn write_vae(dir: &Path, seed: u64) {
        let config = dragon_vae::Config {
            latent_mean: vec![0.0; 4],
            latent_std: vec![1.0; 4],
            ..dragon_vae::Config::tiny()
        };
        let params = Params::new(seed);
        AudioVae::new(&config, params.builder(DType::F32, &Device::Cpu)).unwrap();
        dragon_vae::vae::save(dir, &config, &params.tensors().unwrap()).unwrap();
    }

    fn write_tone(path: &Path, step: f32) {
        let samples = (0..200).map(|i| 0.3 * (i as f32 * step).sin()).collect();
        write_wav(path, &Clip { samples, sample_rate_hz: 1000 }, SampleFormat::Int16).unwrap();
    }

    fn entry(name: &str) -> Entry {
        Entry {
            id: name.into(),
            piece: name.into(),
            path: format!("{name}.wav"),
            start_s: 0.0,
            duration_s: 0.2,
            sample_rate_hz: 1000,
            caption: "a tone".into(),
            caption_source: CaptionSource::User,
            split: Split::Train,
            corpus: Corpus::Import,
            attributes: Default::default(),
        }
    }

    #[test]
    fn the_cache_notices_other_audio_and_another_vae_under_the_same_names() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let cfg = DataConfig {
            manifest: dir.join("manifest.jsonl"),
            vae: dir.join("vae"),
            cache: dir.join("cache"),
            n_frames: 16,
            max_tokens: 8,
            valid_clips: 1,
        };
        write_vae(&cfg.vae, 1);
        for (name, step) in [("a", 0.1), ("b", 0.2)] {
            write_tone(&dir.join(name).with_extension("wav"), step);
        }
        let of = |names: &[&str], cfg: &DataConfig| {
            let entries: Vec<Entry> = names.iter().map(|name| entry(name)).collect();
            let entries: Vec<&Entry> = entries.iter().collect();
            latents(cfg, &entries, &Device::Cpu, &RunContext::new(dir)).unwrap().latents
        };
        let n_cached = || std::fs::read_dir(dir.join("cache")).unwrap().count();
        let first = of(&["a", "b"], &cfg);
        assert_eq!((of(&["a", "b"], &cfg) == first, n_cached()), (true, 1));

        std::fs::copy(dir.join("a.wav"), dir.join("c.wav")).unwrap();
        assert_eq!((of(&["c", "b"], &cfg) == first, n_cached()), (true, 1), "a name changes nothing");

        write_tone(&dir.join("a.wav"), 0.3);
        let second = of(&["a", "b"], &cfg);
        let half = first.len() / 2;
        assert!(second[..half] != first[..half] && second[half..] == first[half..]);

        write_vae(&cfg.vae, 2);
        let third = of(&["a", "b"], &cfg);
        assert!(third[..half] != second[..half] && third[half..] != second[half..]);
        assert_eq!(n_cached(), 3);
        let short = DataConfig { n_frames: 8, ..cfg.clone() };
        assert_eq!((of(&["a", "b"], &short).len(), n_cached()), (half, 4));
    }
}
