//! What an arrangement is chosen from: instruments, accompaniments, ways to play chords, tempi, registers.

use serde::Serialize;

use crate::rng::Choices;

/// A melody instrument.
#[derive(Debug, PartialEq, Eq)]
pub struct Instrument {
    /// Name used in captions.
    pub name: &'static str,
    /// General MIDI program, from 0.
    pub program: u8,
    /// Lowest and highest MIDI pitch at which it sounds like itself.
    pub range: (u8, u8),
}

const fn instrument(name: &'static str, program: u8, lowest: u8, highest: u8) -> Instrument {
    Instrument { name, program, range: (lowest, highest) }
}

/// Melody instruments: few enough to learn, far enough apart to hear.
pub const PALETTE: [Instrument; 18] = [
    instrument("piano", 0, 40, 100),
    instrument("harpsichord", 6, 43, 89),
    instrument("music box", 10, 60, 100),
    instrument("marimba", 12, 48, 91),
    instrument("church organ", 19, 43, 96),
    instrument("accordion", 21, 53, 93),
    instrument("acoustic guitar", 24, 43, 84),
    instrument("distorted electric guitar", 30, 43, 84),
    instrument("violin", 40, 55, 100),
    instrument("cello", 42, 38, 74),
    instrument("trumpet", 56, 54, 86),
    instrument("saxophone", 65, 50, 83),
    instrument("flute", 73, 60, 98),
    instrument("chiptune square synth", 80, 48, 96),
    instrument("saw synth", 81, 45, 91),
    instrument("sitar", 104, 48, 79),
    instrument("banjo", 105, 50, 86),
    instrument("steel drums", 114, 55, 91),
];

/// What sounds beside the melody.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Accompaniment {
    /// Nothing.
    None,
    /// Tonic and fifth, held.
    Drone,
    /// Chords on one instrument.
    Chords,
    /// Chords and a bass.
    BassAndChords,
    /// A drum kit.
    Drums,
    /// Bass, chords and drums.
    Band,
}

/// How often each accompaniment is chosen.
pub(super) const ACCOMPANIMENTS: [(f64, Accompaniment); 6] = [
    (0.28, Accompaniment::None),
    (0.13, Accompaniment::Drone),
    (0.20, Accompaniment::Chords),
    (0.15, Accompaniment::BassAndChords),
    (0.10, Accompaniment::Drums),
    (0.14, Accompaniment::Band),
];

/// Chord instruments: caption name and General MIDI program.
pub(super) const CHORD_INSTRUMENTS: [(&str, u8); 6] =
    [("piano", 0), ("guitar", 25), ("strings", 48), ("organ", 16), ("harp", 46), ("synth pad", 89)];

/// How chords are played.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ChordStyle {
    /// Held until the harmony changes.
    Held,
    /// Struck on each beat.
    Beats,
    /// Struck between the beats.
    OffBeats,
    /// One note after another.
    Arpeggio,
}

impl ChordStyle {
    /// A way that suits a chord instrument.
    pub(super) fn for_program(program: u8, choices: &mut Choices) -> Self {
        match program {
            48 | 89 => ChordStyle::Held,
            16 => *choices.pick(&[ChordStyle::Held, ChordStyle::OffBeats]),
            46 => *choices.pick(&[ChordStyle::Arpeggio, ChordStyle::Beats]),
            _ => *choices.pick(&[ChordStyle::Beats, ChordStyle::OffBeats, ChordStyle::Arpeggio]),
        }
    }
}

/// Tempo class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Tempo {
    /// 44 to 66 beats per minute.
    Slow,
    /// 76 to 100.
    Medium,
    /// 112 to 144.
    Fast,
}

impl Tempo {
    /// Lowest and highest, felt beats per minute.
    pub(super) fn range(self) -> (f64, f64) {
        match self {
            Tempo::Slow => (44.0, 66.0),
            Tempo::Medium => (76.0, 100.0),
            Tempo::Fast => (112.0, 144.0),
        }
    }
}

/// Where the melody lies, by its mean pitch in the excerpt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Register {
    /// Below A3 (MIDI 57).
    Low,
    /// Between.
    Middle,
    /// Above D5 (MIDI 74).
    High,
}
