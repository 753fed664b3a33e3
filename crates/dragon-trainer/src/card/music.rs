//! What rewards of songs say of music itself: the share of captions that a tuned model would win over the base if it
//! answered each with music. A reward that does not prefer music to the base has another end than music.

use dragon_metrics::{Better, FrechetReference, WinRate, clap_score, win_rate};
use dragon_rewards::{Song, View};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::{CardConfig, System};
use crate::error::{Error, Result};

/// A reward of held-out music and of the generations for the same captions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MusicTest {
    /// The reward; a distance is to the reference half.
    pub name: String,
    /// Its mean over the music.
    pub music: f64,
    /// Its mean over the generations.
    pub generations: f64,
    /// Share of the captions for which the music is better.
    pub won: WinRate,
}

/// Per-song FAD by each view that has several windows a song, and the CLAP score by each that reads text; `references` hold the reference half, one a view.
pub(super) fn music_tests(
    cfg: &CardConfig,
    music: &System,
    generations: &System,
    references: &[FrechetReference],
) -> Result<Vec<MusicTest>> {
    let mut tests = Vec::new();
    for (slot, (source, reference)) in cfg.views.iter().zip(references).enumerate() {
        let each = |system: &System, score: Score| -> Result<Vec<f64>> {
            let one = |song: &Song| {
                let view = song.view(slot).map_err(Error::input("a view"))?;
                score(view).map_err(Error::input(system.name))
            };
            system.songs.par_iter().map(one).collect()
        };
        let mut push = |name: String, better: Better, score: Score| -> Result<()> {
            let (music, generations) = (each(music, score)?, each(generations, score)?);
            let won =
                win_rate(&music, &generations, better).map_err(Error::input("music and generations"))?;
            let mean = |x: &[f64]| x.iter().sum::<f64>() / x.len() as f64;
            tests.push(MusicTest { name, music: mean(&music), generations: mean(&generations), won });
            Ok(())
        };
        let all = |holds: &dyn Fn(&View) -> bool| {
            let mut songs = music.songs.iter().chain(&generations.songs);
            songs.all(|song| song.view(slot).is_ok_and(holds))
        };
        if all(&|view| view.embeddings.n() >= 2) {
            push(format!("per-song FAD, {}", source.encoder), Better::Lower, &|view| {
                reference.distance(&view.embeddings)
            })?;
        }
        if all(&|view| view.text.is_some()) {
            push(format!("CLAP score, {}", source.encoder), Better::Higher, &|view| {
                clap_score(&view.embeddings, view.text.as_deref().unwrap_or_default(), Default::default())
            })?;
        }
    }
    Ok(tests)
}

/// A reward of a song, by what a view sees of it.
type Score<'a> = &'a (dyn Fn(&View) -> dragon_metrics::Result<f64> + Sync);
