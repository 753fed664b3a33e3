//! Do songs do what their captions ask? Judged by CLAP, by a tagger, and by estimates of key and tempo.

use dragon_audio::Key;
use dragon_metrics::{Better, WinRate, clap_score, win_rate};
use serde::{Deserialize, Serialize};

use super::{CardConfig, System};
use crate::error::{Error, Result};

/// Songs and captions: is a caption's own song better for it than another song?
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CaptionTest {
    /// Who judges, and which songs.
    pub name: String,
    /// Mean score of a caption with its own song.
    pub own: f64,
    /// Mean score of a caption with another caption's song.
    pub other: f64,
    /// Share of the captions that fit their own song better.
    pub won: WinRate,
    /// One-sided binomial probability of as many wins by chance, among captions that are no tie.
    pub p_value: f64,
}

/// The key that a caption asks for: a tonic and a mode, as in "a reel in A dorian".
fn asked_key(caption: &str) -> Option<Key> {
    let words: Vec<&str> = words(caption).collect();
    words.windows(2).find_map(|pair| format!("{} {}", pair[0], pair[1]).parse().ok())
}

/// The tempo that a caption asks for, as in "at 96 bpm" or "96 beats per minute".
fn asked_bpm(caption: &str) -> Option<f64> {
    let words: Vec<&str> = words(caption).collect();
    words.windows(2).find_map(|pair| match pair[1] {
        "bpm" | "BPM" | "beats" => pair[0].parse().ok(),
        _ => None,
    })
}

fn words(caption: &str) -> impl Iterator<Item = &str> {
    caption.split(|c: char| !(c.is_alphanumeric() || c == '#')).filter(|word| !word.is_empty())
}

/// Whether a tempo is the one asked for, its half or its double, within 8 %.
fn same_tempo(found: f64, asked: f64) -> bool {
    [0.5, 1.0, 2.0].iter().any(|times| (found / (asked * times)).ln().abs() < 1.08f64.ln())
}

/// Key and tempo of a song, in a few words for the page.
pub(super) fn in_words(key: Option<Key>, bpm: Option<f64>) -> String {
    let key = key.map_or("no key".to_owned(), |key| key.to_string());
    let bpm = bpm.map_or("no pulse".to_owned(), |bpm| format!("{bpm:.0} bpm"));
    format!("{key}, {bpm}")
}

/// Each caption with its own song and with the song half the set away, for the real music and the generations.
pub(super) fn caption_tests(
    cfg: &CardConfig,
    systems: &[System],
    captions: &[&str],
    tags: &[String],
) -> Result<Vec<CaptionTest>> {
    let n = captions.len();
    let failed = |err: dragon_metrics::Error| Error::input("songs and captions")(err);
    let mut tests = Vec::new();
    let mut push = |name: String, own: Vec<f64>, other: Vec<f64>| -> Result<()> {
        let won = win_rate(&own, &other, Better::Higher).map_err(failed)?;
        let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
        // Ties decide nothing.
        let p_value = match won.n - won.ties {
            0 => 1.0,
            decided => dragon_metrics::binomial_p_value(won.wins, decided, 0.5).map_err(failed)?,
        };
        tests.push(CaptionTest { name, own: mean(&own), other: mean(&other), won, p_value });
        Ok(())
    };
    for system in [&systems[0], &systems[2]] {
        for (slot, source) in cfg.views.iter().enumerate() {
            let score = |song: usize, caption: usize| -> Result<Option<f64>> {
                let view = |i: usize| system.songs[i].view(slot).map_err(Error::input("a view"));
                let Some(text) = &view(caption)?.text else { return Ok(None) };
                clap_score(&view(song)?.embeddings, text, Default::default()).map(Some).map_err(failed)
            };
            let own: Option<Vec<f64>> = (0..n).map(|i| score(i, i)).collect::<Result<_>>()?;
            let other: Option<Vec<f64>> = (0..n).map(|i| score((i + n / 2) % n, i)).collect::<Result<_>>()?;
            if let (Some(own), Some(other)) = (own, other) {
                push(format!("CLAP score ({}), {}", source.encoder, system.name), own, other)?;
            }
        }
        // Tags that a caption names, word for word.
        let named: Vec<Vec<usize>> = captions
            .iter()
            .map(|caption| {
                let caption = caption.to_lowercase();
                let words: Vec<&str> = words(&caption).collect();
                (0..tags.len()).filter(|&t| words.contains(&tags[t].as_str())).collect()
            })
            .collect();
        let score = |song: usize, caption: usize| {
            let of = &named[caption];
            of.iter().map(|&t| f64::from(system.tags[song][t])).sum::<f64>() / of.len() as f64
        };
        let with_tags: Vec<usize> = (0..n).filter(|&i| !named[i].is_empty()).collect();
        if with_tags.len() >= 2 {
            let own = with_tags.iter().map(|&i| score(i, i)).collect();
            let other = with_tags.iter().map(|&i| score((i + n / 2) % n, i)).collect();
            push(format!("tags that the caption names (musicnn), {}", system.name), own, other)?;
        }
        // Key and tempo, right or wrong; a caption decides only where one of the two songs is right.
        let keys: Vec<Option<Key>> = captions.iter().map(|caption| asked_key(caption)).collect();
        let bpms: Vec<Option<f64>> = captions.iter().map(|caption| asked_bpm(caption)).collect();
        let right_key =
            |song: usize, caption: usize| keys[caption].map(|asked| system.keys[song] == Some(asked));
        let right_bpm = |song: usize, caption: usize| {
            bpms[caption].map(|asked| system.bpms[song].is_some_and(|found| same_tempo(found, asked)))
        };
        type Right<'a> = &'a dyn Fn(usize, usize) -> Option<bool>;
        for (judge, right) in
            [("key (estimated)", &right_key as Right), ("tempo (estimated)", &right_bpm as Right)]
        {
            let pairs: Vec<(f64, f64)> = (0..n)
                .filter_map(|i| Some((right(i, i)?, right((i + n / 2) % n, i)?)))
                .map(|(own, other)| (f64::from(u8::from(own)), f64::from(u8::from(other))))
                .collect();
            if pairs.iter().any(|(own, other)| own != other) {
                let (own, other) = pairs.into_iter().unzip();
                push(format!("{judge}, {}", system.name), own, other)?;
            }
        }
    }
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn captions_ask_for_keys_and_tempos() {
        let key = |caption| asked_key(caption).map(|key| key.to_string());
        assert_eq!(key("Violin with drums, medium-tempo, in A dorian."), Some("A minor".into()));
        assert_eq!(key("Eb major, fast, solo church organ"), Some("Eb major".into()));
        assert_eq!(key("A slow major tune for flute"), None);
        assert_eq!(key("solo acoustic guitar, major key, slow tempo"), None);
        assert_eq!(asked_bpm("Mid-tempo reel, 96 bpm, F major, church organ"), Some(96.0));
        assert_eq!(asked_bpm("harp in F# minor at 120 beats per minute"), Some(120.0));
        assert_eq!(asked_bpm("solo accordion in 6/8"), None);
    }

    #[test]
    fn half_and_double_tempo_count() {
        assert!(same_tempo(60.0, 120.0) && same_tempo(118.0, 120.0) && same_tempo(245.0, 120.0));
        assert!(!same_tempo(90.0, 120.0) && !same_tempo(131.0, 120.0));
    }
}
