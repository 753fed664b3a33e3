//! A tune as an arrangement for General MIDI instruments: seeded choices of instrument, accompaniment, tempo,
//! transposition and register, and the notes of an excerpt that starts at a bar.
//!
//! Reading order: `palette` is what there is to choose from; the arranger is here; `score` holds the notes.

mod palette;
mod score;
#[cfg(test)]
mod tests;

use serde::Serialize;

pub use palette::{Accompaniment, ChordStyle, Instrument, PALETTE, Register, Tempo};
pub use score::Sounding;

use crate::abc::{Bar, Key, Tune};
use crate::rng::Choices;
use palette::{ACCOMPANIMENTS, CHORD_INSTRUMENTS};
use score::{BASS, CHORDS, DRONE, KIT, MELODY, Score, harmonise};

/// What is heard in an excerpt; captions are made of these and nothing else.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Facts {
    /// Melody instrument.
    pub instrument: &'static str,
    /// Its General MIDI program, from 0.
    pub program: u8,
    /// What sounds beside it.
    pub accompaniment: Accompaniment,
    /// Instrument of the chords, if there are chords.
    pub chord_instrument: Option<&'static str>,
    /// How they are played.
    pub chord_style: Option<ChordStyle>,
    /// Felt beats per minute.
    pub tempo_bpm: u32,
    /// Its class.
    pub tempo: Tempo,
    /// Key as it sounds, "D major".
    pub key: String,
    /// Mode of the key.
    pub mode: &'static str,
    /// Kind of tune, if the source names it.
    pub tune_type: Option<&'static str>,
    /// Metre, "6/8".
    pub meter: String,
    /// Whether the metre is in three (3/4, 3/8).
    pub triple: bool,
    /// Whether its beats divide by three (6/8, 9/8, 12/8).
    pub compound: bool,
    /// Where the melody lies.
    pub register: Register,
    /// Semitones from the notation, octaves included.
    pub transposition: i32,
    /// First bar of the excerpt, from 0, repeats written out.
    pub start_bar: usize,
}

/// An arranged excerpt.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrangement {
    /// What is heard.
    pub facts: Facts,
    /// Program and volume (0 to 127) of each channel in use; the drum kit (9) too.
    pub channels: Vec<(u8, u8, u8)>,
    /// The notes, by onset.
    pub notes: Vec<Sounding>,
    /// Start of the excerpt in the tune, seconds.
    pub start_s: f64,
}

/// Arranges an excerpt of `clip_s` seconds of a regular tune; `None` if the choices leave none within the instrument's range.
pub fn arrange(tune: &Tune, clip_s: f64, choices: &mut Choices) -> Option<Arrangement> {
    let instrument = choices.pick(&PALETTE);
    let accompaniment = *choices.pick_weighted(&ACCOMPANIMENTS);
    let tempo = *choices.pick_weighted(&[(0.32, Tempo::Slow), (0.36, Tempo::Medium), (0.32, Tempo::Fast)]);
    let tempo_bpm = choices.between(tempo.range().0, tempo.range().1 + 1.0).floor();
    let second_per_tick = 60.0 / (tempo_bpm * f64::from(tune.meter.beat()));

    // starts and lengths of bars
    let starts: Vec<u32> = tune
        .bars
        .iter()
        .scan(0u32, |at, bar| {
            let start = *at;
            *at += bar.length;
            Some(start)
        })
        .collect();
    let total = starts.last()? + tune.bars.last()?.length;
    let ticks = (clip_s / second_per_tick).ceil() as u32;
    let candidates: Vec<usize> = (0..tune.bars.len())
        .filter(|&i| tune.bars[i].length == tune.meter.bar() && starts[i] + ticks <= total)
        .filter(|&i| !tune.bars[i].notes.is_empty())
        .collect();
    if candidates.is_empty() {
        return None;
    }
    let start_bar = *choices.pick(&candidates);
    let (from, to) = (starts[start_bar], starts[start_bar] + ticks);
    let inside: Vec<(usize, &Bar)> = tune
        .bars
        .iter()
        .enumerate()
        .filter(|(i, b)| starts[*i] < to && starts[*i] + b.length > from)
        .collect();

    // transposition: a key, then an octave within the instrument's range
    let key_shift = choices.below(12) as i32 - 5;
    let melody: Vec<u8> = inside.iter().flat_map(|(_, b)| b.notes.iter().map(|n| n.pitch)).collect();
    let (low, high) = (i32::from(*melody.iter().min()?), i32::from(*melody.iter().max()?));
    let octaves: Vec<i32> = (-3..=2)
        .map(|octave| key_shift + 12 * octave)
        .filter(|s| low + s >= i32::from(instrument.range.0) && high + s <= i32::from(instrument.range.1))
        .collect();
    if octaves.is_empty() {
        return None;
    }
    let transposition = *choices.pick(&octaves);
    let tonic = (i32::from(tune.key.tonic) + transposition).rem_euclid(12) as u8;
    let mean =
        melody.iter().map(|&p| f64::from(p)).sum::<f64>() / melody.len() as f64 + f64::from(transposition);
    let register = match mean {
        m if m < 57.0 => Register::Low,
        m if m > 74.0 => Register::High,
        _ => Register::Middle,
    };

    let mut score = Score { notes: Vec::new(), from, second_per_tick, clip_s };
    for (i, bar) in &inside {
        for note in &bar.notes {
            let onset = starts[*i] + note.onset;
            let on_beat = note.onset % tune.meter.beat() == 0;
            let velocity = if note.onset == 0 {
                104
            } else if on_beat {
                98
            } else {
                90
            };
            let key = (i32::from(note.pitch) + transposition) as u8;
            let jitter = choices.below(9) as u8;
            score.add(MELODY, key, velocity - 4 + jitter, onset, note.length * 19 / 20);
        }
    }

    let mut channels = vec![(MELODY, instrument.program, 110)];
    let has_chords =
        matches!(accompaniment, Accompaniment::Chords | Accompaniment::BassAndChords | Accompaniment::Band);
    let has_bass = matches!(accompaniment, Accompaniment::BassAndChords | Accompaniment::Band);
    let has_drums = matches!(accompaniment, Accompaniment::Drums | Accompaniment::Band);
    // chosen whether used or not, so that one choice does not move the others; never the melody's own kind
    let others: Vec<_> =
        CHORD_INSTRUMENTS.iter().filter(|(name, _)| !instrument.name.contains(name)).collect();
    let (chord_name, chord_program) = **choices.pick(&others);
    let style = ChordStyle::for_program(chord_program, choices);
    let bass_program = *choices.pick(&[32u8, 33, 38]);
    let pattern = choices.below(3);

    if accompaniment == Accompaniment::Drone {
        let program = *choices.pick(&[109u8, 48, 16]);
        channels.push((DRONE, program, 62));
        let root = 36 + tonic; // C2 to B2
        for key in [root, root + 7, root + 12] {
            score.add(DRONE, key, 80, from, to - from);
        }
    }
    if has_chords {
        channels.push((CHORDS, chord_program, 78));
    }
    if has_bass {
        channels.push((BASS, bass_program, 92));
    }
    if has_drums {
        channels.push((KIT, 0, 88));
    }
    let beat = tune.meter.beat();
    // cut time and common time change harmony with each of their two beats, other metres with the bar
    let span = if tune.meter.over == 4 && tune.meter.under == 4 { beat } else { tune.meter.bar() };
    for (i, bar) in &inside {
        if bar.length != tune.meter.bar() {
            continue; // an incomplete bar has no accompaniment
        }
        for at in (0..bar.length).step_by(span as usize) {
            let chord = harmonise(&tune.key, bar, at, span);
            let onset = starts[*i] + at;
            let root = (i32::from(chord[0]) + transposition).rem_euclid(12) as u8;
            if has_chords {
                let voices: Vec<u8> = chord
                    .iter()
                    .map(|&c| 53 + (i32::from(c) + transposition - 53).rem_euclid(12) as u8)
                    .collect();
                score.chord(&voices, onset, span, beat, style, tune.meter.is_compound());
            }
            if has_bass {
                let key = 36 + (i32::from(root) - 36).rem_euclid(12) as u8;
                for (n, b) in (0..span).step_by(beat as usize).enumerate() {
                    let fifth = if n % 2 == 1 { 7 } else { 0 };
                    let key = if key + fifth > 48 { key + fifth - 12 } else { key + fifth };
                    score.add(BASS, key, 92, onset + b, beat * 4 / 5);
                }
            }
        }
        if has_drums {
            score.drums(starts[*i], &tune.meter, pattern);
        }
    }
    score
        .notes
        .sort_by(|a, b| a.on_s.total_cmp(&b.on_s).then(a.channel.cmp(&b.channel)).then(a.key.cmp(&b.key)));

    Some(Arrangement {
        facts: Facts {
            instrument: instrument.name,
            program: instrument.program,
            accompaniment,
            chord_instrument: has_chords.then_some(chord_name),
            chord_style: has_chords.then_some(style),
            tempo_bpm: tempo_bpm as u32,
            tempo,
            key: Key::name(tonic, tune.key.mode),
            mode: tune.key.mode.name(),
            tune_type: tune_type(tune),
            meter: tune.meter.name(),
            triple: tune.meter.over == 3,
            compound: tune.meter.is_compound(),
            register,
            transposition,
            start_bar,
        },
        channels,
        notes: score.notes,
        start_s: f64::from(from) * second_per_tick,
    })
}

/// Kind of tune named by `R:` or the title.
fn tune_type(tune: &Tune) -> Option<&'static str> {
    const TYPES: [(&str, &str); 16] = [
        ("slip jig", "slip jig"),
        ("slipjig", "slip jig"),
        ("highland fling", "highland fling"),
        ("fling", "highland fling"),
        ("hornpipe", "hornpipe"),
        ("strathspey", "strathspey"),
        ("reel", "reel"),
        ("jig", "jig"),
        ("clog", "clog dance"),
        ("walkaround", "walkaround"),
        ("quick step", "quickstep"),
        ("quickstep", "quickstep"),
        ("march", "march"),
        ("minuet", "minuet"),
        ("waltz", "waltz"),
        ("gavotte", "gavotte"),
    ];
    let find = |text: &str| {
        let words: String =
            text.to_lowercase().chars().map(|c| if c.is_alphabetic() { c } else { ' ' }).collect();
        let words = format!(" {} ", words.split_whitespace().collect::<Vec<_>>().join(" "));
        TYPES.iter().find(|(kind, _)| words.contains(&format!(" {kind} "))).map(|(_, name)| *name)
    };
    find(&tune.rhythm).or_else(|| find(&tune.title))
}
