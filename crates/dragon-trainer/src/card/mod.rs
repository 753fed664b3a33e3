//! The model card of a base: what the VAE, the CLAP and the diffusion model of a model folder are worth, measured on music
//! that none of them was trained on.
//!
//! The held-out pieces are cut into two halves. The first is the reference; the second, its way through the VAE, the
//! generations for its captions, decoded noise and an untrained network are measured against it. So every distance
//! stands between the best that a finite sample of real music reaches and what needs no model at all.

mod asked;
mod music;
mod page;

use std::ops::Range;
use std::path::{Path, PathBuf};

pub use asked::CaptionTest;
use candle_core::{DType, Tensor};
use dragon_audio::Key;
use dragon_data::{Entry, Split, read_manifest};
use dragon_diffusion::{DiffusionModel, SamplerConfig};
use dragon_encoders::clap::ClapEncoder;
use dragon_encoders::musicnn::Musicnn;
use dragon_metrics::{FrechetReference, Rows};
use dragon_nn::Params;
use dragon_rewards::{Song, Source};
use dragon_vae::losses::{Floor, MelLoss, si_sdr};
pub use music::MusicTest;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::bundle::Bundle;
use crate::embedder::{Batch, EmbedConfig, Embedder, EncoderConfig, no_clap};
use crate::error::{Error, Result};
use crate::pretrain::clap::Retrieval;
use crate::rollout::{self, TextCache};
use crate::run::{Meter, RunContext, write_atomic};

/// Everything a model card depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CardConfig {
    /// Seed of the prompts' noise and of the untrained weights.
    pub seed: u64,
    /// Clips of each half, and generations; fewer where the manifest has fewer.
    pub n_songs: usize,
    /// How latents are sampled.
    pub sampler: SamplerConfig,
    /// Songs handled at a time; bounds memory and changes no number.
    pub batch: usize,
    /// Songs of the second half that go into the report with their round trip and the generation for their caption.
    pub examples: usize,
    /// Splits of the manifest that no training saw.
    pub splits: Vec<Split>,
    /// Encoders and settings that the views name.
    pub embed: EmbedConfig,
    /// In whose eyes the Fréchet distances are measured; CLAP scores too where the encoder reads text.
    pub views: Vec<Source>,
    /// musicnn's weights, whose tags are compared with the instruments of the captions.
    pub tagger: PathBuf,
}

/// What the card says; written to `card.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Card {
    /// Clips in the reference half and in the other.
    pub n_clips: (usize, usize),
    /// Reconstruction by the VAE.
    pub vae: VaeCard,
    /// One entry a kind of songs, real music first.
    pub systems: Vec<SystemCard>,
    /// Whether songs follow their captions; one entry a judge.
    pub captions: Vec<CaptionTest>,
    /// What rewards of songs say of music beside the generations.
    pub music: Vec<MusicTest>,
    /// Retrieval among held-out pieces, if the model folder has a CLAP.
    pub clap: Option<Retrieval>,
}

/// Reconstruction of held-out clips by the VAE, means over clips.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VaeCard {
    /// L1 of log10 mel magnitudes, summed over DAC's seven resolutions.
    pub mel_distance: f64,
    /// The same for each clip against its own median mel spectrum, held constant: what a drone of the right colour reaches.
    pub mel_distance_of_median: f64,
    /// Scale-invariant signal-to-distortion ratio, dB.
    pub si_sdr_db: f64,
}

/// A kind of songs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SystemCard {
    /// What they are.
    pub name: String,
    /// Dataset FAD to the reference half, in the eyes of each view.
    pub fad: Vec<f64>,
    /// Mean level, dBFS.
    pub level_dbfs: f64,
    /// Mean spectral centroid, Hz.
    pub centroid_hz: f64,
}

impl CardConfig {
    /// Checks everything that can be checked before weights are read.
    ///
    /// # Errors
    /// For the first key that cannot work.
    pub fn check(&self) -> Result<()> {
        for (key, value, least) in [
            ("n_songs", self.n_songs, 4),
            ("batch", self.batch, 1),
            ("sampler.n_steps", self.sampler.n_steps, 1),
        ] {
            if value < least {
                return Err(Error::config(key, format!("at least {least}"), value));
            }
        }
        if self.splits.is_empty() {
            return Err(Error::config("splits", "at least one of train, valid, test", "none"));
        }
        self.sampler.guidance.check().map_err(Error::input("sampler.guidance"))?;
        for source in &self.views {
            if !self.embed.encoders.contains_key(&source.encoder) {
                return Err(Error::config("views.encoder", "a name under `embed.encoders`", &source.encoder));
            }
            if !self.embed.settings.contains_key(&source.setting) {
                return Err(Error::config("views.setting", "a name under `embed.settings`", &source.setting));
            }
        }
        Ok(())
    }
}

/// Songs of one kind as the views see them, in the order of the second half's captions.
#[derive(Default)]
struct System {
    name: &'static str,
    songs: Vec<Song>,
    tags: Vec<Vec<f32>>,
    keys: Vec<Option<Key>>,
    bpms: Vec<Option<f64>>,
    level_dbfs: f64,
    centroid_hz: f64,
    examples: Vec<Vec<f32>>,
}

/// Measures the model folder `bundle` on the held-out clips of `manifest`; writes `card.json` and `card.html` to `ctx.out_dir`.
///
/// # Errors
/// If the config cannot work, a file is missing or broken, there are too few held-out clips, or `ctx.stop` was set.
pub fn run(cfg: &CardConfig, bundle: &Path, manifest: &Path, ctx: &RunContext) -> Result<Card> {
    cfg.check()?;
    let [reference, other] = halves(cfg, manifest)?;
    let bundle = Bundle::load(bundle, &ctx.device)?;
    let measure = Measure {
        cfg,
        bundle: &bundle,
        embedder: Embedder::load(&cfg.embed, &cfg.views, &ctx.device)?,
        tagger: Musicnn::load(&cfg.tagger).map_err(Error::input("cannot load musicnn"))?,
        folder: manifest.parent().unwrap_or(Path::new(".")),
        ctx,
    };
    let captions: Vec<&str> = other.iter().map(|e| e.caption.as_str()).collect();
    let texts = TextCache::default();
    let sampled = |model: &dyn DiffusionModel, range: Range<usize>| -> Result<Vec<Vec<f32>>> {
        let part = &captions[range];
        let keys: Vec<(&str, u64)> = part.iter().map(|&caption| (caption, cfg.seed)).collect();
        let (noise, cond) = (rollout::noise(&bundle, &keys), texts.get(&bundle, part)?);
        let latents = rollout::latents(model, &cond, &noise, &cfg.sampler, cfg.batch, ctx, part)?;
        bundle.decode(&latents.ok_or_else(stopped)?)
    };
    let base = bundle.diffusion.base()?;
    let random = Params::new(cfg.seed).builder(DType::F32, &ctx.device);
    let untrained = bundle.diffusion.architecture.build(random)?;

    let first = measure.system("reference half", &reference, &|range| measure.clips(&reference[range]))?;
    let references: Vec<FrechetReference> = (0..cfg.views.len())
        .map(|slot| {
            FrechetReference::from_rows(&rows_of(&first.songs, slot)?)
                .map_err(Error::input("the reference half of the held-out music"))
        })
        .collect::<Result<_>>()?;
    let systems = [
        measure.system("held-out music, other half", &other, &|range| measure.clips(&other[range]))?,
        measure.system("its round trip through the VAE", &other, &|range| {
            bundle.decode(&measure.latents(&measure.clips(&other[range])?)?)
        })?,
        measure.system("generations for its captions", &other, &|range| sampled(base.as_ref(), range))?,
        measure.system("untrained network", &other, &|range| sampled(untrained.as_ref(), range))?,
        measure.system("decoded noise", &other, &|range| {
            let keys: Vec<(&str, u64)> = captions[range].iter().map(|&caption| (caption, cfg.seed)).collect();
            bundle.decode(&rollout::noise(&bundle, &keys).draw()?)
        })?,
    ];
    let mut cards = Vec::new();
    for system in &systems {
        let fad = references
            .iter()
            .enumerate()
            .map(|(slot, reference)| {
                reference.distance(&rows_of(&system.songs, slot)?).map_err(Error::input(system.name))
            })
            .collect::<Result<_>>()?;
        cards.push(SystemCard {
            name: system.name.to_owned(),
            fad,
            level_dbfs: system.level_dbfs,
            centroid_hz: system.centroid_hz,
        });
    }
    let card = Card {
        n_clips: (reference.len(), other.len()),
        vae: measure.vae(&other)?,
        captions: asked::caption_tests(cfg, &systems, &captions, measure.tagger.tags())?,
        music: music::music_tests(cfg, &systems[0], &systems[2], &references)?,
        systems: cards,
        clap: measure.retrieval(manifest)?,
    };
    let json = serde_json::to_vec_pretty(&card).map_err(|err| Error::Bug(err.to_string()))?;
    std::fs::create_dir_all(&ctx.out_dir).map_err(Error::io("create", &ctx.out_dir))?;
    write_atomic(&ctx.out_dir.join("card.json"), &json)?;
    page::page(cfg, &card, &systems, &captions, bundle.sample_rate_hz(), ctx)
        .write(&ctx.out_dir.join("card.html"))?;
    Ok(card)
}

fn stopped() -> Error {
    Error::Data {
        problem: "stopped before the end".into(),
        hint: "nothing was written; start the command again".into(),
    }
}

/// The held-out clips, cut into two halves that share no piece, at most `n_songs` each, spread over the pieces.
fn halves(cfg: &CardConfig, manifest: &Path) -> Result<[Vec<Entry>; 2]> {
    let entries = read_manifest(manifest).map_err(Error::input("the held-out music"))?;
    let held_out: Vec<Entry> = entries.into_iter().filter(|e| cfg.splits.contains(&e.split)).collect();
    let mut pieces: Vec<&str> = held_out.iter().map(|e| e.piece.as_str()).collect();
    pieces.sort_unstable();
    pieces.dedup();
    let mut halves = [Vec::new(), Vec::new()];
    for entry in &held_out {
        let at = pieces.binary_search(&entry.piece.as_str()).expect("taken from the same entries");
        halves[at % 2].push(entry.clone());
    }
    for half in &mut halves {
        if half.len() < 4 {
            return Err(Error::Data {
                problem: format!(
                    "`{}` has {} held-out clips, too few for two halves of at least 4",
                    manifest.display(),
                    held_out.len()
                ),
                hint: "add pieces, or name more splits".into(),
            });
        }
        let keep = cfg.n_songs.min(half.len());
        *half = (0..keep).map(|i| half[i * half.len() / keep].clone()).collect();
    }
    Ok(halves)
}

/// What every kind of songs is measured with.
struct Measure<'a> {
    cfg: &'a CardConfig,
    bundle: &'a Bundle,
    embedder: Embedder,
    tagger: Musicnn,
    folder: &'a Path,
    ctx: &'a RunContext,
}

impl Measure<'_> {
    /// Makes songs, some at a time, and keeps what the views and the tagger see of them.
    fn system(
        &self,
        name: &'static str,
        entries: &[Entry],
        songs: &dyn Fn(Range<usize>) -> Result<Vec<Vec<f32>>>,
    ) -> Result<System> {
        let mut system = System { name, ..System::default() };
        let mut meter = Meter::new(self.ctx.progress, entries.len(), 0, 1.0, "songs");
        tracing::info!("{name}");
        let rate = self.bundle.sample_rate_hz();
        for start in (0..entries.len()).step_by(self.cfg.batch) {
            if self.ctx.stopped() {
                return Err(stopped());
            }
            let range = start..(start + self.cfg.batch).min(entries.len());
            let captions: Vec<&str> = entries[range.clone()].iter().map(|e| e.caption.as_str()).collect();
            let clips = songs(range)?;
            let batch = Batch {
                clips: &clips,
                sample_rate_hz: rate,
                latents: None,
                captions: Some(&captions),
                bundle: Some(self.bundle),
            };
            system.songs.extend(self.embedder.songs(&self.cfg.views, &batch)?);
            let tags = clips.par_iter().map(|clip| self.tags(clip, rate)).collect::<Result<Vec<_>>>()?;
            system.tags.extend(tags);
            system.keys.par_extend(clips.par_iter().map(|clip| dragon_audio::key(clip, rate)));
            system.bpms.par_extend(clips.par_iter().map(|clip| dragon_audio::tempo_bpm(clip, rate)));
            let share = clips.len() as f64 / entries.len() as f64;
            let [_, level, _, centroid] = rollout::mean_monitors(&clips, rate);
            system.level_dbfs += share * level;
            system.centroid_hz += share * centroid;
            let missing = self.cfg.examples.saturating_sub(system.examples.len());
            system.examples.extend(clips.into_iter().take(missing));
            meter.update(system.songs.len(), &[], &[], false);
        }
        meter.finish();
        Ok(system)
    }

    /// Audio of clips at the VAE's rate, of a generation's length.
    fn clips(&self, entries: &[Entry]) -> Result<Vec<Vec<f32>>> {
        let rate = self.bundle.sample_rate_hz();
        let samples = self.bundle.info.n_frames * self.bundle.vae.config().hop();
        entries
            .par_iter()
            .map(|entry| {
                let clip = dragon_audio::read_mono(&self.folder.join(&entry.path), rate)
                    .map_err(Error::input("the held-out music"))?;
                let mut audio = clip.samples;
                audio.resize(samples, 0.0);
                Ok(audio)
            })
            .collect()
    }

    fn latents(&self, clips: &[Vec<f32>]) -> Result<Tensor> {
        self.bundle.encode(&clips.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    /// Probabilities of the tagger's tags, in its order.
    fn tags(&self, clip: &[f32], rate: u32) -> Result<Vec<f32>> {
        const RATE_HZ: u32 = 16_000;
        let clip = dragon_audio::resample(clip, rate, RATE_HZ).map_err(Error::input("cannot tag a song"))?;
        let found = self.tagger.tag_clip(&clip).map_err(Error::input("cannot tag a song"))?;
        let of = |name: &String| found.iter().find(|(tag, _)| tag == name).map_or(0.0, |(_, p)| *p);
        Ok(self.tagger.tags().iter().map(of).collect())
    }

    fn vae(&self, entries: &[Entry]) -> Result<VaeCard> {
        let rate = self.bundle.sample_rate_hz();
        let mel = MelLoss::dac(rate, Floor::Dac, DType::F32, &self.ctx.device)?;
        let mut sums = [0.0; 3];
        for part in entries.chunks(self.cfg.batch) {
            let clips = self.clips(part)?;
            let decoded = self.bundle.decode(&self.latents(&clips)?)?;
            for (clip, estimate) in clips.iter().zip(&decoded) {
                let row = |samples: &[f32]| Tensor::new(samples, &self.ctx.device)?.unsqueeze(0);
                let (clip, estimate) = (row(clip)?, row(estimate)?); // [1, samples]
                sums[0] += f64::from(mel.forward(&estimate, &clip)?.to_scalar::<f32>()?);
                sums[1] += mel_distance_of_median(&mel, &clip)?;
                sums[2] += f64::from(si_sdr(&estimate, &clip)?.mean_all()?.to_scalar::<f32>()?);
            }
        }
        let [mel_distance, mel_distance_of_median, si_sdr_db] = sums.map(|sum| sum / entries.len() as f64);
        Ok(VaeCard { mel_distance, mel_distance_of_median, si_sdr_db })
    }

    /// Retrieval of all held-out pieces by the first CLAP among the encoders.
    fn retrieval(&self, manifest: &Path) -> Result<Option<Retrieval>> {
        let dir = self.cfg.embed.encoders.values().find_map(|encoder| match encoder {
            EncoderConfig::Clap { dir } => Some(dir),
            _ => None,
        });
        let Some(dir) = dir else { return Ok(None) };
        let clap = ClapEncoder::load(dir, &self.ctx.device).map_err(no_clap)?;
        Ok(Some(Retrieval::on_pieces(&clap, manifest, &self.cfg.splits, usize::MAX)?))
    }
}

/// Mel distance between a clip and its own median spectrum, held over all frames.
fn mel_distance_of_median(mel: &MelLoss, clip: &Tensor) -> Result<f64> {
    let mut sum = 0.0;
    for level in mel.log_mels(clip)? {
        let rows = level.squeeze(0)?.t()?.to_vec2::<f32>()?; // [bands, frames]
        let (mut distance, mut n) = (0.0, 0);
        for mut band in rows {
            band.sort_unstable_by(f32::total_cmp);
            let median = band[band.len() / 2];
            distance += band.iter().map(|x| f64::from((x - median).abs())).sum::<f64>();
            n += band.len();
        }
        sum += distance / n as f64;
    }
    Ok(sum)
}

fn rows_of(songs: &[Song], slot: usize) -> Result<Rows> {
    let rows: Vec<&Rows> = songs
        .iter()
        .map(|song| song.view(slot).map(|view| &view.embeddings))
        .collect::<std::result::Result<_, _>>()
        .map_err(Error::input("a view"))?;
    Rows::concat(&rows).map_err(Error::input("cannot put embeddings together"))
}
