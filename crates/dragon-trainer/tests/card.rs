//! The model card of the shipped model on a handful of tones: everything runs, real music comes out nearest to itself.

use std::collections::BTreeMap;
use std::f32::consts::TAU;
use std::path::{Path, PathBuf};

use dragon_audio::{Clip, SampleFormat, write_wav};
use dragon_data::{CaptionSource, Corpus, Entry, Split, write_manifest};
use dragon_encoders::{Setting, Tail};
use dragon_rewards::Source;
use dragon_testkit::fixture;
use dragon_trainer::card::{self, CardConfig};
use dragon_trainer::embedder::{EmbedConfig, EncoderConfig};
use dragon_trainer::{RunContext, SamplerConfig};

/// Tones of four partials, one piece each, all held out.
fn tones(dir: &Path, n: usize) -> PathBuf {
    let entries: Vec<Entry> = (0..n)
        .map(|i| {
            let hz = 220.0 * 1.06f32.powi(i as i32);
            let sample =
                |t: usize| (1..5).map(|k| (TAU * hz * (k * t) as f32 / 16e3).sin() / k as f32).sum::<f32>();
            let samples = (0..81_920).map(|t| 0.2 * sample(t)).collect();
            let path = format!("{i:02}.wav");
            write_wav(&dir.join(&path), &Clip { samples, sample_rate_hz: 16_000 }, SampleFormat::Int16)
                .unwrap();
            Entry {
                id: i.to_string(),
                piece: format!("piece-{i:02}"),
                path,
                start_s: 0.0,
                duration_s: 5.12,
                sample_rate_hz: 16_000,
                caption: format!("{} in the key of {i}", ["slow violin", "fast piano"][i % 2]),
                caption_source: CaptionSource::User,
                split: Split::Test,
                corpus: Corpus::Import,
                attributes: Default::default(),
            }
        })
        .collect();
    let manifest = dir.join("manifest.jsonl");
    write_manifest(&manifest, &entries).unwrap();
    manifest
}

fn config() -> CardConfig {
    let weights = fixture("musicnn/mtt_musicnn.safetensors");
    let source = |encoder: &str, setting: &str| Source { encoder: encoder.into(), setting: setting.into() };
    CardConfig {
        seed: 0,
        n_songs: 500,
        sampler: SamplerConfig { n_steps: 1, ..SamplerConfig::default() },
        batch: 4,
        examples: 1,
        splits: vec![Split::Test],
        embed: EmbedConfig {
            encoders: BTreeMap::from([
                ("musicnn".to_owned(), EncoderConfig::Musicnn { weights: weights.clone() }),
                ("clap".to_owned(), EncoderConfig::Clap { dir: fixture("tiny/clap") }),
            ]),
            settings: BTreeMap::from([
                ("windows".to_owned(), Setting::Fadtk { hop_s: 0.512, tail: Tail::WholeWindows }),
                ("ma".to_owned(), Setting::MA),
            ]),
        },
        views: vec![source("musicnn", "windows"), source("clap", "ma")],
        tagger: weights,
    }
}

#[test]
fn the_card_of_the_shipped_model_puts_real_music_before_noise() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = tones(dir.path(), 8);
    let out = dir.path().join("card");
    let card = card::run(&config(), &fixture("tiny"), &manifest, &RunContext::new(&out)).unwrap();
    assert_eq!(card.n_clips, (4, 4));
    let fad = |name: &str| {
        card.systems
            .iter()
            .find(|s| s.name.contains(name))
            .unwrap_or_else(|| panic!("no `{name}`"))
            .fad
            .clone()
    };
    for view in 0..2 {
        let (music, trip, noise) =
            (fad("other half")[view], fad("round trip")[view], fad("decoded noise")[view]);
        assert!(music < trip && trip < noise, "view {view}: {music} {trip} {noise}");
        assert!(fad("generations")[view] > music);
    }
    assert!(card.vae.si_sdr_db > 0.0, "{:?}", card.vae);
    assert_eq!(card.clap.as_ref().unwrap().n, 8);
    // CLAP and tagger on the music and on the generations.
    assert_eq!(card.captions.len(), 4);
    let names: Vec<&str> = card.music.iter().map(|test| test.name.as_str()).collect();
    assert_eq!(names, ["per-song FAD, musicnn", "per-song FAD, clap", "CLAP score, clap"]);
    let fad = &card.music[0];
    assert!(fad.won.n == 4 && fad.music < fad.generations && fad.won.rate > 0.5, "{fad:?}");
    let json = std::fs::read(out.join("card.json")).unwrap();
    assert_eq!(json, serde_json::to_vec_pretty(&card).unwrap());
    assert!(std::fs::read_to_string(out.join("card.html")).unwrap().contains("fast piano"));
}

#[test]
fn too_little_held_out_music_is_refused_before_weights_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let manifest = tones(dir.path(), 6);
    let none = Path::new("no-such-model");
    let text = card::run(&config(), none, &manifest, &RunContext::new(dir.path())).unwrap_err().to_string();
    assert!(text.contains("6 held-out clips"), "{text}");
}
