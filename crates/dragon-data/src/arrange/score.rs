//! The notes of an excerpt: melody, chords and drums put in by the part, in seconds.

use super::ChordStyle;
use crate::abc::{Bar, Key, Meter, Mode};

/// A note for the synthesiser.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sounding {
    /// MIDI channel; 9 is the drum kit.
    pub channel: u8,
    /// MIDI pitch, or drum.
    pub key: u8,
    /// MIDI velocity, 1 to 127.
    pub velocity: u8,
    /// Onset, seconds after the excerpt's start.
    pub on_s: f64,
    /// Release, seconds after the excerpt's start.
    pub off_s: f64,
}

/// Channels, fixed by part.
pub(super) const MELODY: u8 = 0;
pub(super) const CHORDS: u8 = 1;
pub(super) const BASS: u8 = 2;
pub(super) const DRONE: u8 = 3;
pub(super) const KIT: u8 = 9;

/// Notes of an excerpt, in seconds.
pub(super) struct Score {
    pub notes: Vec<Sounding>,
    /// Start of the excerpt, ticks.
    pub from: u32,
    pub second_per_tick: f64,
    /// Length of the excerpt, seconds.
    pub clip_s: f64,
}

impl Score {
    /// Adds a note that starts inside the excerpt; others are dropped.
    pub fn add(&mut self, channel: u8, key: u8, velocity: u8, onset: u32, length: u32) {
        if onset < self.from {
            return;
        }
        let on_s = f64::from(onset - self.from) * self.second_per_tick;
        if on_s < self.clip_s {
            let off_s = on_s + f64::from(length.max(1)) * self.second_per_tick;
            self.notes.push(Sounding { channel, key, velocity, on_s, off_s });
        }
    }

    /// A chord for `span` ticks.
    pub fn chord(
        &mut self,
        voices: &[u8],
        onset: u32,
        span: u32,
        beat: u32,
        style: ChordStyle,
        compound: bool,
    ) {
        let parts = if compound { 3 } else { 2 }; // pulses of a beat
        match style {
            ChordStyle::Held => {
                for &key in voices {
                    self.add(CHORDS, key, 78, onset, span * 19 / 20);
                }
            }
            ChordStyle::Beats | ChordStyle::OffBeats => {
                let late = if style == ChordStyle::OffBeats { beat / parts * (parts - 1) } else { 0 };
                for b in (0..span).step_by(beat as usize) {
                    let length = if late > 0 { (beat - late) * 3 / 4 } else { beat * 7 / 10 };
                    for &key in voices {
                        self.add(CHORDS, key, 80, onset + b + late, length);
                    }
                }
            }
            ChordStyle::Arpeggio => {
                let mut up = voices.to_vec();
                up.sort_unstable();
                let step = beat / parts;
                for (n, b) in (0..span).step_by(step as usize).enumerate() {
                    self.add(CHORDS, up[n % up.len()], 82, onset + b, step);
                }
            }
        }
    }

    /// One bar of drums: bass drum and snare in turn on the beats, a cymbal on the pulses.
    pub fn drums(&mut self, onset: u32, meter: &Meter, pattern: usize) {
        const BASS_DRUM: u8 = 36;
        const SNARE: u8 = 38;
        const CLOSED_HAT: u8 = 42;
        const RIDE: u8 = 51;
        let beat = meter.beat();
        let n_beats = meter.bar() / beat;
        let pulses = if meter.is_compound() || meter.over == 3 && meter.under == 8 { 3 } else { 2 };
        let mut hit = |key, velocity, at| self.add(KIT, key, velocity, onset + at, beat / 4);
        for b in 0..n_beats {
            let at = b * beat;
            let down = if n_beats == 3 { b == 0 } else { b % 2 == 0 };
            if down {
                hit(BASS_DRUM, 104, at);
            } else if !(n_beats == 3 && b == 1 && pattern == 1) {
                hit(SNARE, 92, at);
            }
            if pattern == 2 {
                hit(BASS_DRUM, 84, at + beat / pulses * (pulses - 1));
            }
            let cymbal = if pattern == 1 { RIDE } else { CLOSED_HAT };
            for p in 0..pulses {
                hit(cymbal, if p == 0 { 80 } else { 66 }, at + beat / pulses * p);
            }
        }
    }
}

/// The triad (pitch classes as notated, root first) that fits a bar's notes from `at` for `span` ticks best.
pub(super) fn harmonise(key: &Key, bar: &Bar, at: u32, span: u32) -> [u8; 3] {
    // preferred degrees, from 0: tonic, subdominant, dominant or the mode's typical neighbour, then the rest
    let preferred: &[(usize, f64)] = match key.mode {
        Mode::Major | Mode::Lydian => &[(0, 0.30), (4, 0.22), (3, 0.20), (5, 0.05), (1, 0.0)],
        Mode::Mixolydian => &[(0, 0.30), (6, 0.22), (3, 0.18), (4, 0.05)],
        Mode::Dorian => &[(0, 0.30), (6, 0.22), (3, 0.12), (2, 0.08)],
        _ => &[(0, 0.30), (6, 0.18), (2, 0.10), (3, 0.10), (5, 0.08)],
    };
    let scale = key.mode.scale();
    let triad = |degree: usize| [0, 2, 4].map(|third| (key.tonic + scale[(degree + third) % 7]) % 12);
    let score = |degree: usize, bonus: f64| {
        let chord = triad(degree);
        let mut total = bonus * f64::from(span);
        for note in &bar.notes {
            let (start, end) = (note.onset.max(at), (note.onset + note.length).min(at + span));
            if start < end {
                let weight = f64::from(end - start) * if note.onset == at { 1.5 } else { 1.0 };
                total += if chord.contains(&(note.pitch % 12)) { weight } else { -0.6 * weight };
            }
        }
        total
    };
    let best = preferred
        .iter()
        .map(|&(degree, bonus)| (degree, score(degree, bonus)))
        .max_by(|a, b| a.1.total_cmp(&b.1))
        .expect("every mode has preferred degrees");
    triad(best.0)
}
